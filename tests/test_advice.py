"""Calls that are captured over and over are not suffered in silence."""

import warnings

import pytest
import torch
from torch import nn

import vera_fx


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return self.lin(x) * factor


def test_a_number_that_changes_with_every_call_is_named() -> None:
    model = vera_fx.adapt(Scales(), vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    x = torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(11):
            model(x, factor=float(step))
        model(x, factor=3.0)  # known
    with pytest.warns(UserWarning, match="12 graphs of Scales.*10.0 -> 11.0"):
        model(x, factor=11.0)


def test_sliding_window_caches_warn_and_stay_right() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    base = MistralForCausalLM(config).eval()
    options = {"max_new_tokens": 13, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.randint(3, 90, (2, 5))
    expected = base.generate(input_ids=ids, **options)
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=2, target_modules=["q_proj"]))

    with pytest.warns(UserWarning, match="sliding-window"):
        tokens = model.generate(input_ids=ids, **options)
    assert torch.equal(tokens, expected)  # lambda_b is zero: the branch adds nothing yet

    again = vera_fx.adapt(
        MistralForCausalLM(MistralConfig(**{**config.to_dict(), "sliding_window": None})).eval(),
        vera_fx.VeraConfig(r=2, target_modules=["q_proj"]),
    )
    again.generate(input_ids=ids, **options)
    assert len(vera_fx.explain(again).graphs) <= 3
