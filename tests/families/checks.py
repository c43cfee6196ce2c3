"""What every family has to pass, a function for each column of the table."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import vera_fx
from tests.families.folded import FoldedReference
from tests.families.member import Member
from tests.graphs.compiling import assert_fullgraph
from tests.helpers import (
    assert_close,
    assert_far_apart,
    assert_same_gradients,
    fill_vectors,
    gradients,
    peft_pair,
)
from tests.mixing.test_mixed import BASE, fill_all


def pair(member: Member, plan: str = "factored") -> tuple[nn.Module, Any, nn.Module]:
    """The base, an oracle, and our model, all with the same weights and vectors."""
    torch.manual_seed(0)
    base = member.build()
    if member.oracle == "peft":
        return base, *peft_pair(base, plan=plan, **member.config)
    ours = vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(r=6, plan=plan, **member.config))
    fill_vectors(ours)
    return base, FoldedReference(base, ours), ours


def compare_outputs(member: Member, *, train: bool) -> None:
    """The same outputs as the oracle's, bit for bit where it is PEFT; every target has a site."""
    base, oracle, ours = pair(member)
    base.train(train), oracle.train(train), ours.train(train)
    expected, actual = member.output(member.call(oracle)), member.output(member.call(ours))
    if member.oracle == "peft":
        assert torch.equal(actual, expected)
    assert_close(actual, expected, factor=10)
    assert_far_apart(expected, member.output(member.call(base)))
    graphs = vera_fx.explain(ours).graphs
    assert len(graphs) == 1
    assert {site.partition("#")[0] for site in graphs[0].sites} == set(ours.vera.structure.targets)


def check_capture(member: Member) -> None:
    """Both modes become graphs with the oracle's outputs."""
    for train in (True, False):
        compare_outputs(member, train=train)


def check_train(member: Member) -> None:
    """Gradients of every vector are the oracle's, in both modes, by any plan."""
    for plan in ("factored", "auto"):
        _, oracle, ours = pair(member, plan)
        for train in (True, False):
            oracle.train(train), ours.train(train)
            expected = gradients(oracle, member.call)
            weakest = min(expected, key=lambda name: expected[name].abs().max())
            assert expected[weakest].abs().max() > 1e-4, f"nothing to compare: {weakest}"
            assert_same_gradients(gradients(ours, member.call), expected)


def check_generate(member: Member) -> None:
    """Greedy tokens are PEFT's, whatever the length; graphs are few and used again."""
    base, theirs, ours = (model.eval() for model in pair(member))
    prompt = {k: v for k, v in member.inputs().items() if k != "labels"}
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(**prompt, **options, max_new_tokens=14)
    assert torch.equal(ours.generate(**prompt, **options, max_new_tokens=14), expected)
    assert not torch.equal(base.generate(**prompt, **options, max_new_tokens=14), expected)
    captured = len(vera_fx.explain(ours).graphs)
    assert captured <= 4, captured
    expected = theirs.generate(**prompt, **options, max_new_tokens=9, num_beams=2)
    assert torch.equal(ours.generate(**prompt, **options, max_new_tokens=9, num_beams=2), expected)
    assert len(vera_fx.explain(ours).graphs) == captured


def check_compile(member: Member) -> None:
    """One graph per signature, no breaks, at most one recompile each, none after that."""
    _, _, ours = pair(member, "auto")
    sizes = ((3, 7), (2, 5), (3, 7))
    if member.parts:
        expected, compiled = member.call(ours), torch.compile(ours, backend="aot_eager")
        assert_close(member.output(member.call(compiled)), member.output(expected), factor=10)
        return
    assert_fullgraph(member, ours, "aot_eager", sizes=sizes, output=member.output)


def check_export(member: Member) -> None:
    """An exported program gives our outputs, for another batch size too."""
    _, _, ours = (model.eval() if isinstance(model, nn.Module) else model for model in pair(member))
    inputs = member.inference()
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    program = vera_fx.export_program(ours, kwargs=inputs, form="constant").module()
    for rows in (3, 2):
        call = {name: value[:rows] for name, value in tensors.items()}
        with torch.no_grad():
            expected = member.output(ours(**{**inputs, **call}))
            actual = program(**call)
        actual = SimpleNamespace(**actual) if isinstance(actual, dict) else actual
        assert_close(member.output(actual), expected, factor=10)


def check_mixed(member: Member) -> None:
    """Every row of a mixed batch is its adapter's."""
    torch.manual_seed(0)
    config = {"target_modules": None, **member.config, "plan": "factored"}
    base = member.build().eval()
    ours = vera_fx.adapt(base, vera_fx.VeraConfig(r=4, **config), adapter_name="a")
    vera_fx.add_adapter(ours, "b")
    vera_fx.add_adapter(ours, "c", vera_fx.VeraConfig(r=3, projection_prng_key=7, **config))
    fill_all(ours)
    inputs = member.inference()

    def alone(name: str) -> Tensor:
        with torch.no_grad():
            if name == BASE:
                with vera_fx.disable_adapters(ours):
                    return member.output(ours(**inputs))
            vera_fx.set_adapter(ours, name)
            return member.output(ours(**inputs))

    results = {name: alone(name) for name in ("a", "b", "c", BASE)}
    assert_far_apart(results["a"], results["b"])
    for names in (["a", BASE, "b"], ["c", "a", BASE]):
        with torch.no_grad():
            mixed = member.output(ours(**inputs, adapter_names=names))
        for row, name in enumerate(names):
            assert_close(mixed[row], results[name][row], factor=5, what=f"row {row}, {name}")


CHECKS: dict[str, Callable[[Member], None]] = {
    "capture": check_capture,
    "train": check_train,
    "generate": check_generate,
    "compile": check_compile,
    "export": check_export,
    "mixed": check_mixed,
}
