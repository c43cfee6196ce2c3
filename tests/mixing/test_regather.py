"""A generate gathers once, and again as soon as anything that it gathered from has changed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close
from tests.mixing.test_mixed import BASE, adapted
from vera_fx.mixing import check as mixed


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    mix = mixed.Mixer.mix

    def counting(self: Any, *args: Any) -> Any:
        calls.append(1)
        return mix(self, *args)

    monkeypatch.setattr(mixed.Mixer, "mix", counting)
    return calls


def generate(model: nn.Module, inputs: dict[str, Any], names: list[str], between: Any) -> Any:
    """Six steps' scores, with ``between`` called after each one."""
    steps: list[int] = []

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        steps.append(1)
        between(len(steps))
        return scores

    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    result = model.generate(
        **inputs, **options, adapter_names=names, logits_processor=[process],
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(result.logits)


def test_one_gathering_serves_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted("llama")
    calls = counted(monkeypatch)
    generate(model, inputs, ["a", BASE, "c"], lambda step: None)
    assert len(calls) == 1
    generate(model, inputs, ["a", BASE, "c"], lambda step: None)
    assert len(calls) == 2


def in_place(model: nn.Module, parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(-3)


def new_data(model: nn.Module, parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * -3


def new_parameter(model: nn.Module, parameter: nn.Parameter) -> None:
    model.vera.adapters["a"].vectors.by_path[PATH].vera_lambda_b = nn.Parameter(parameter * -3)


def loaded(model: nn.Module, parameter: nn.Parameter) -> None:
    state = {k: v.clone() for k, v in vera_fx.adapter_state_dict(model, "a").items()}
    key = f"base_model.model.{PATH}.vera_lambda_b"
    vera_fx.load_adapter_state_dict(model, {**state, key: state[key] * -3}, "a")


def replaced(model: nn.Module, parameter: nn.Parameter) -> None:
    state = {k: v.clone() for k, v in vera_fx.adapter_state_dict(model, "a").items()}
    state[f"base_model.model.{PATH}.vera_lambda_b"] *= -3
    config = model.vera.adapter("a").config
    with pytest.warns(UserWarning, match="No adapter is active now"):
        vera_fx.delete_adapter(model, "a")
    vera_fx.add_adapter(model, "a", config)
    vera_fx.load_adapter_state_dict(model, state, "a")


PATH = "model.layers.0.self_attn.q_proj"


SLOW = [pytest.param(c, marks=pytest.mark.slow) for c in (new_data, new_parameter, loaded)]


@pytest.mark.parametrize("change", [in_place, replaced, *SLOW])
def test_a_change_between_two_tokens_is_seen(change: Any) -> None:
    model, inputs = adapted("llama")
    names = ["a", BASE, "b"]
    vector = model.vera.adapter("a").vectors_at(PATH).vera_lambda_b
    plain = generate(model, inputs, names, lambda step: None)

    def between(step: int) -> None:
        if step == 3:
            change(model, vector)

    changed = generate(model, inputs, names, between)
    assert_close(changed[:3], plain[:3])
    assert_close(changed[:, 1:], plain[:, 1:])
    assert (changed[3, 0] - plain[3, 0]).abs().max() > 1e-3


def test_disabled_between_two_tokens() -> None:
    model, inputs = adapted("llama")
    plain = generate(model, inputs, ["a", BASE, "b"], lambda step: None)
    scope = vera_fx.disable_adapters(model)
    changed = generate(
        model, inputs, ["a", BASE, "b"], lambda step: scope.__enter__() if step == 3 else None
    )
    scope.__exit__(None, None, None)
    assert_close(changed[:3], plain[:3])
    assert (changed[3, 0] - plain[3, 0]).abs().max() > 1e-3


def test_vectors_made_in_inference_mode_are_never_kept() -> None:
    with torch.inference_mode():
        model, inputs = adapted("llama")
        plain = generate(model, inputs, ["a", BASE, "b"], lambda step: None)
        vector = model.vera.adapter("a").vectors_at(PATH).vera_lambda_b
        changed = generate(
            model, inputs, ["a", BASE, "b"], lambda step: vector.mul_(-3) if step == 3 else None
        )
    assert (changed[3, 0] - plain[3, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("first", ["with dropout", "without"])
def test_a_target_in_train_mode_refuses_dropout_that_differs(first: str) -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)).eval()
    options = {"r": 3, "target_modules": ["0"], "plan": "factored"}
    model = vera_fx.adapt(module, vera_fx.VeraConfig(**options), adapter_name="dry")
    vera_fx.add_adapter(model, "wet", vera_fx.VeraConfig(**options, vera_dropout=0.5))
    x, dry, wet = torch.randn(2, 4), ["dry", BASE], ["wet", "dry"]
    with torch.no_grad():
        if first == "without":
            model[0].train()
            model(x, adapter_names=dry)
        else:
            model(x, adapter_names=wet)
            model[0].train()
        for _ in range(2):
            with pytest.raises(
                vera_fx.AdapterError, match="different dropout.*'0' is in train mode"
            ):
                model(x, adapter_names=wet)
        model(x, adapter_names=dry)
        model.eval()
        model(x, adapter_names=wet)
