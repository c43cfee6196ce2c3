"""Hooks that users register on modules run, as they do under PEFT, and graphs come back when they go."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import vera_fx
from tests.helpers import adapted_by_peft, assert_close, fill_vectors
from tests.models import MLP, llama, text_inputs

FIELDS: dict[str, Any] = {"r": 3, "target_modules": ["lin0", "lin1"]}
X = torch.randn(4, 10, generator=torch.Generator().manual_seed(3))


def pair() -> tuple[nn.Module, nn.Module]:
    """PEFT's model and ours, with the same vectors."""
    torch.manual_seed(0)
    base = MLP().eval()
    theirs = adapted_by_peft(base, **FIELDS)
    ours = vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(plan="factored", **FIELDS))
    fill_vectors(theirs)
    fill_vectors(ours)
    return theirs, ours


@contextlib.contextmanager
def expected_warning() -> Iterator[None]:
    with pytest.warns(vera_fx.PartialCaptureWarning, match="a hook is registered on"):
        yield


def captures(model: nn.Module) -> int:
    return len(list(model.__dict__["_vera_runtime"].all_captures()))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_forward_hooks_run_with_real_values_once(compiled: bool) -> None:
    theirs, ours = pair()
    call = torch.compile(ours, backend="eager") if compiled else ours
    plain = call(X)
    seen: dict[str, list[Tensor]] = {"theirs": [], "ours": []}
    targets = {"theirs": theirs.base_model.model.lin1, "ours": ours.lin1}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            seen[name].append(output.detach())
            return output * 2

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in targets.items()]
    with expected_warning():
        found = call(X)
    assert_close(found, theirs(X), factor=5)
    assert [len(calls) for calls in seen.values()] == [1, 1]
    assert_close(seen["ours"][0], seen["theirs"][0], factor=5)
    for handle in handles:
        handle.remove()
    assert torch.equal(call(X), plain)
    assert captures(ours) == 1
    assert not vera_fx.explain(ours).python


def test_pre_hooks_change_what_targets_get() -> None:
    theirs, ours = pair()
    ours(X)
    for module in (theirs.base_model.model.lin0, ours.lin0):
        module.register_forward_pre_hook(lambda _m, args: (args[0] * 3,))
    with expected_warning():
        assert_close(ours(X), theirs(X), factor=5)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_run(kind: str) -> None:
    theirs, ours = pair()
    ours(X)
    seen: dict[str, list[Tensor]] = {"theirs": [], "ours": []}

    def watch(name: str) -> Any:
        return lambda _module, *grads: seen[name].append(grads[-1][0].detach())

    getattr(theirs.base_model.model.lin1, kind)(watch("theirs"))
    getattr(ours.lin1, kind)(watch("ours"))
    x = X.clone().requires_grad_()
    with expected_warning():
        ours(x).square().sum().backward()
    theirs(X.clone().requires_grad_()).square().sum().backward()
    assert_close(seen["ours"][0], seen["theirs"][0], factor=10)


def test_hooks_of_all_modules_run() -> None:
    _, ours = pair()
    ours(X)
    seen: list[str] = []
    handle = torch_module.register_module_forward_hook(
        lambda module, _a, _o: seen.append(type(module).__name__)
    )
    try:
        with expected_warning():
            ours(X)
    finally:
        handle.remove()
    assert seen == ["Linear", "Dropout", "Linear", "MLP"]


def test_a_hook_on_the_model_itself_runs_around_its_graph() -> None:
    _, ours = pair()
    plain = ours(X)
    handle = ours.register_forward_hook(lambda _m, _a, output: output + 1)
    assert torch.equal(ours(X), plain + 1)
    handle.remove()
    assert captures(ours) == 1


def test_only_what_is_around_the_hook_runs_in_python() -> None:
    torch.manual_seed(0)
    model = vera_fx.adapt(llama(3).eval(), vera_fx.VeraConfig(r=3, plan="factored"))
    fill_vectors(model)
    inputs = text_inputs(labels=False)
    plain = model(**inputs).logits
    seen: list[Tensor] = []
    model.model.layers[1].mlp.register_forward_hook(lambda _m, _a, y: seen.append(y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vera_fx.PartialCaptureWarning)
        assert_close(model(**inputs).logits, plain, factor=10)
        model(**inputs)

    assert len(seen) == 2
    assert all(torch.isfinite(y).all() and not y.is_meta for y in seen)
    python = dict(vera_fx.explain(model).python)
    assert set(python) == {"", "model", "model.layers.1"}


def test_a_mixture_says_that_hooks_are_in_the_way() -> None:
    _, ours = pair()
    ours.lin0.register_forward_hook(lambda *_: None)
    with pytest.raises(
        vera_fx.CaptureError, match="adapter_names .* a hook is registered on 'lin0'"
    ):
        ours(X, adapter_names=["default"] * 4)


def test_what_gradient_checkpointing_puts_on_embeddings_keeps_the_graph() -> None:
    """``enable_input_require_grads``: all that its hook does has no meaning in a graph."""
    model = vera_fx.adapt(llama(), vera_fx.VeraConfig(r=3))
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**text_inputs())
    assert captures(model) == 1
