"""The suite has teeth: sabotaged passes must be caught by the checks that the tests rely on.

Each sabotage is a small change of the graph that a faulty pass could make. It is applied after
the real passes, and the standard check (outputs and gradients against the hook oracle) must fail:
by a value that is wrong. A sabotage that only crashes would say nothing about the check.
"""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

import vera_fx
from tests.helpers import (
    assert_close,
    assert_far_apart,
    assert_same_gradients,
    fill_vectors,
    gradients,
    hook_reference,
    input_gradient,
    loss_of,
    main_output,
    vectors_of,
)
from tests.models import Attention
from vera_fx.graphs.runtime import runtime_of
from vera_fx.passes import tag_of

X = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CONFIG = vera_fx.VeraConfig(r=3, target_modules=["query", "key", "out"], plan="factored")
WRONG_VALUE = r"largest difference \d"
"""What `assert_close` says of values; other failures of the check, crashes above all, do not count."""

aten = torch.ops.aten


def build(plan: str = "factored") -> tuple[nn.Module, nn.Module, GraphModule]:
    """A model, its oracle and the adapted graph that a sabotage may edit."""
    torch.manual_seed(0)
    base = Attention().double().eval()
    model = vera_fx.adapt(copy.deepcopy(base), dataclasses.replace(CONFIG, plan=plan))
    fill_vectors(model)
    model(X)
    (captures,) = runtime_of(model).kept.captures.values()
    (variants,) = captures[0].variants.values()
    (variant,) = variants.values()
    return model, hook_reference(base, model), variant.graph


def standard_check(model: nn.Module, oracle: nn.Module) -> None:
    expected = main_output(oracle(X))
    assert_close(main_output(model(X)), expected)
    with vera_fx.disable_adapters(model):
        plain = main_output(model(X))
    assert_far_apart(expected, plain)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert params, "nothing trains"
    actual = gradients(model, lambda m: m(X))
    assert_same_gradients(actual, oracle_gradients(model, oracle))
    assert_close(input_gradient(model, X), input_gradient(oracle, X), factor=10)


def oracle_gradients(model: nn.Module, oracle: nn.Module) -> dict[str, torch.Tensor]:
    vectors = vectors_of(model)
    values = torch.autograd.grad(loss_of(oracle(X)), list(vectors.values()))
    return dict(zip(vectors, values, strict=True))


def by_role(graph: GraphModule, role: str) -> list[Node]:
    return [n for n in graph.graph.nodes if (tag := tag_of(n)) and tag.role == role]


def drop(role: str) -> Callable[[GraphModule], None]:
    """Let users of a node read its first operand instead."""

    def sabotage(graph: GraphModule) -> None:
        node = by_role(graph, role)[0]
        node.replace_all_uses_with(node.args[0])

    return sabotage


def swap_vectors(graph: GraphModule) -> None:
    first, second = by_role(graph, "h")[:2]
    first.args, second.args = (first.args[0], second.args[1]), (second.args[0], first.args[1])


def wrong_rows_of_B(graph: GraphModule) -> None:
    cut = by_role(graph, "cut_B")[0]
    B, dim, _, size = cut.args
    cut.args = (B, dim, B.meta["val"].shape[0] - size, B.meta["val"].shape[0])


def detach(role: str) -> Callable[[GraphModule], None]:
    def sabotage(graph: GraphModule) -> None:
        node = by_role(graph, role)[0]
        with graph.graph.inserting_after(node):
            cut = graph.graph.call_function(aten.detach.default, (node,))
        node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)

    return sabotage


def branch_twice(graph: GraphModule) -> None:
    node = by_role(graph, "add")[0]
    with graph.graph.inserting_after(node):
        again = graph.graph.call_function(aten.add.Tensor, (node, node.args[1]))
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def ignore_base(graph: GraphModule) -> None:
    node = by_role(graph, "add")[0]
    node.replace_all_uses_with(node.args[1])


def round_to_half(graph: GraphModule) -> None:
    node = by_role(graph, "z")[0]
    with graph.graph.inserting_after(node):
        half = graph.graph.call_function(aten.to.dtype, (node, torch.float32))
        back = graph.graph.call_function(aten.to.dtype, (half, torch.float64))
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not half)
    half.append(back)


def frozen_constant(graph: GraphModule) -> None:
    """Bake the present value of a vector into the graph: right now, stale after a step."""
    node = next(
        n for n in graph.graph.nodes if n.op == "get_attr" and str(n.target).endswith("lambda_b")
    )
    owner = graph
    for atom in str(node.target).split("."):
        owner = getattr(owner, atom)
    graph.__dict__["_baked"] = owner.detach().clone()
    node.target = "_baked"


def swap_places(function: str, first: int, second: int) -> Callable[[GraphModule], None]:
    """Let a function take one of its arguments in the place of another."""

    def sabotage(graph: GraphModule) -> None:
        node = calls_of(graph, function)[0]
        args = list(node.args)
        args[first], args[second] = args[second], args[first]
        node.args = tuple(args)

    return sabotage


def take_of_next(function: str, place: int) -> Callable[[GraphModule], None]:
    """Let a function read what the next call of that function reads."""

    def sabotage(graph: GraphModule) -> None:
        node, following = calls_of(graph, function)[:2]
        node.update_arg(place, following.args[place])

    return sabotage


def without(function: str, place: int) -> Callable[[GraphModule], None]:
    """Let a function do without one of its arguments."""

    def sabotage(graph: GraphModule) -> None:
        calls_of(graph, function)[0].update_arg(place, None)

    return sabotage


def calls_of(graph: GraphModule, function: str) -> list[Node]:
    calls = [n for n in graph.graph.nodes if n.op == "call_function"]
    return [n for n in calls if getattr(n.target, "__name__", "") == function]


def scale(role: str) -> Callable[[GraphModule], None]:
    """Multiply a node by a number that is close to 1."""

    def sabotage(graph: GraphModule) -> None:
        node = by_role(graph, role)[0]
        with graph.graph.inserting_after(node):
            more = graph.graph.call_function(aten.mul.Tensor, (node, 1.0001))
        node.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)

    return sabotage


MERGED = {
    "read another site's lambda_d": take_of_next("merged_weight", 3),
    "read another site's lambda_b": take_of_next("merged_weight", 4),
    "merge into another site's weight": take_of_next("merged_weight", 0),
    "gradients by another site's lambda_d": take_of_next("merged_linear", 7),
    "gradients by another site's lambda_b": take_of_next("merged_linear", 8),
    "forget the bias": without("merged_linear", 4),
    "multiply by the base's weight": swap_places("merged_linear", 2, 3),
}
SCALED = {
    "drop lambda_b": drop("b_rows"),
    "drop lambda_d": drop("E"),
    "cut the gradient of E": detach("E"),
    "cut the gradient of z": detach("z"),
    "a little too much": scale("E"),
    "ignore the branch": drop("scaled"),
}
SABOTAGES = {
    "drop the update": drop("add"),
    "drop lambda_d": drop("h"),
    "drop lambda_b": drop("update"),
    "swap two vectors": swap_vectors,
    "wrong rows of B": wrong_rows_of_B,
    "cut the gradient of z": detach("z"),
    "cut the gradient of h": detach("h"),
    "cut the gradient of the update": detach("update"),
    "add the branch twice": branch_twice,
    "ignore the base": ignore_base,
    "round on the way": round_to_half,
    "bake a vector in": frozen_constant,
}


@pytest.mark.parametrize("plan", ["factored", "merged", "dense", "scaled"])
def test_the_check_passes_without_sabotage(plan: str) -> None:
    model, oracle, _ = build(plan)
    standard_check(model, oracle)


EVERY = [
    *(("factored", name, sabotage) for name, sabotage in SABOTAGES.items()),
    *(("merged", name, sabotage) for name, sabotage in MERGED.items()),
    *(("dense", name, sabotage) for name, sabotage in MERGED.items()),
    *(("scaled", name, sabotage) for name, sabotage in SCALED.items()),
]


@pytest.mark.parametrize(
    ("plan", "sabotage"), [e[::2] for e in EVERY], ids=[": ".join(e[:2]) for e in EVERY]
)
def test_sabotage_is_caught(plan: str, sabotage: Callable[[GraphModule], None]) -> None:
    model, oracle, graph = build(plan)
    sabotage(graph)
    graph.graph.lint()
    graph.recompile()
    with pytest.raises(AssertionError, match=WRONG_VALUE):
        standard_check(model, oracle)


@pytest.mark.parametrize("field", ["vera_A", "vera_B"])
def test_wrong_projections_are_caught(field: str) -> None:
    model, oracle, _ = build()
    setattr(model.vera.slot0, field, getattr(model.vera.slot0, field).roll(1, 0))
    with pytest.raises(AssertionError, match=WRONG_VALUE):
        standard_check(model, oracle)


def test_stale_slot_is_caught() -> None:
    model, oracle, _ = build()
    slot = model.vera.slot0
    for name, value in list(slot.__dict__.items()):
        setattr(slot, name, value.detach().clone() * 1.001)
    with pytest.raises(AssertionError, match=WRONG_VALUE):
        standard_check(model, oracle)


def test_empty_comparisons_are_refused() -> None:
    with pytest.raises(AssertionError):
        assert_same_gradients({}, {})
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    with pytest.raises(AssertionError, match="adds nothing"):
        assert_far_apart(torch.ones(3), torch.ones(3))
