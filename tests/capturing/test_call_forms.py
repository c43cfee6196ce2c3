"""The forms in which users call a model: every one gives what PEFT's model gives, bit for bit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families.test_matrix import MEMBERS
from tests.helpers import assert_far_apart, peft_pair
from tests.models import tokens, vit

IDS = tokens()
MASK = torch.ones_like(IDS)
MASK[0, :2] = 0
CAUSAL = torch.ones(7, 7).tril().expand(3, 1, 7, 7)
POSITIONS = torch.arange(7).expand(3, -1)
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(3, -1)
LOWEST = torch.finfo(torch.float32).min

FORMS: dict[str, dict[str, Any]] = {
    "positional": {},
    "no mask": {"input_ids": IDS},
    "2-D mask": {"input_ids": IDS, "attention_mask": MASK},
    "2-D mask of ones": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
    "4-D mask of bools": {"input_ids": IDS, "attention_mask": CAUSAL.bool()},
    "4-D mask of floats": {"input_ids": IDS, "attention_mask": (1 - CAUSAL) * LOWEST},
    "positions": {"input_ids": IDS, "attention_mask": MASK, "position_ids": POSITIONS + 2},
    "packed sequences": {"input_ids": IDS, "position_ids": PACKED, "use_cache": False},
    "hidden states": {"input_ids": IDS, "output_hidden_states": True},
    "attentions": {"input_ids": IDS, "output_attentions": True},
    "tuple": {"input_ids": IDS, "return_dict": False, "use_cache": False},
    "some logits": {"input_ids": IDS, "logits_to_keep": 2},
    "loss": {"input_ids": IDS, "labels": IDS},
    "embeddings": {"attention_mask": MASK},
}
UNKNOWN = {
    "bert": ("positions", "packed sequences", "some logits", "loss"),
    "gpt2": ("packed sequences", "positional"),  # its second argument is the cache
}
FAST = "llama"


def tensors_of(result: Any) -> Iterator[Tensor]:
    """Every tensor in a result but those of caches."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        for name, value in result.items():
            if name != "past_key_values":
                yield from tensors_of(value)
    elif isinstance(result, tuple | list):
        for value in result:
            yield from tensors_of(value)


@pytest.fixture(scope="module")
def trio(request) -> tuple[nn.Module, nn.Module, nn.Module]:
    member = next(member for member in MEMBERS if member.name == request.param)
    torch.manual_seed(0)
    base = member.build().eval()
    base.set_attn_implementation("eager" if request.param in {"bert", "gemma2"} else "sdpa")
    return base, *peft_pair(base, plan="factored", **member.config)


def names() -> Iterator[Any]:
    for family in ("llama", "gemma2", "gpt2", "bert"):
        yield pytest.param(family, marks=[] if family == FAST else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:.*graphs of .* have been captured")  # many forms on purpose
@pytest.mark.parametrize("trio", names(), indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_results_are_pefts(trio: tuple[nn.Module, ...], form: str) -> None:
    base, theirs, ours = trio
    if form in UNKNOWN.get(base.config.model_type, ()):
        pytest.skip("the model's forward has no such form")
    arguments = dict(FORMS[form])
    if form == "embeddings":
        arguments["inputs_embeds"] = base.get_input_embeddings()(IDS).detach()
    positional = (IDS, MASK) if form == "positional" else ()
    with torch.no_grad():
        expected = list(tensors_of(theirs.base_model.model(*positional, **arguments)))
        actual = list(tensors_of(ours(*positional, **arguments)))
        plain = list(tensors_of(base(*positional, **arguments)))
    assert len(actual) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert_far_apart(actual[-1], plain[-1])


def test_pictures_of_another_size() -> None:
    torch.manual_seed(0)
    theirs, ours = peft_pair(vit().eval(), plan="factored", target_modules="all-linear")
    call = {"pixel_values": torch.randn(2, 3, 8, 12), "interpolate_pos_encoding": True}
    assert torch.equal(ours(**call).logits, theirs(**call).logits)
