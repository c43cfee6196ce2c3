"""Texts as long as a model has positions, and longer ones: one graph, one error in the library's words."""

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import vera_fx
from tests.helpers import fill_vectors
from vera_fx.base.positions import room_of
from vera_fx.graphs.runtime import runtime_of

ROOM = 24
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": ROOM,
    "initializer_range": 0.3,
}
PADDING = 1


def bert() -> Any:
    config = transformers.BertConfig(**SIZES, intermediate_size=32)
    return transformers.BertForSequenceClassification(config)


def roberta() -> Any:
    sizes = {**SIZES, "max_position_embeddings": ROOM + PADDING + 1, "pad_token_id": PADDING}
    return transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**sizes, intermediate_size=32)
    )


def gpt2() -> Any:
    config = transformers.GPT2Config(
        initializer_range=0.3,
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=ROOM,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def opt() -> Any:
    sizes = {name: value for name, value in SIZES.items() if name != "initializer_range"}
    config = transformers.OPTConfig(**sizes, init_std=0.3, ffn_dim=32, word_embed_proj_dim=16)
    return transformers.OPTForCausalLM(config)


KINDS = {"bert": bert, "roberta": roberta, "gpt2": gpt2, "opt": opt}


def made(kind: str) -> tuple[Any, Any]:
    """An adapted model with vectors that show, and the same under hooks alone."""
    torch.manual_seed(0)
    plain = KINDS[kind]().eval()
    model = vera_fx.adapt(copy.deepcopy(plain), vera_fx.VeraConfig(r=5, plan="factored"))
    fill_vectors(model)
    return model, plain


def asked(length: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (2, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def in_python(model: Any, length: int) -> Tensor:
    """What the branches add when no graph runs: hooks keep a model in Python."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        twin = copy.deepcopy(model)
        for module in twin.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_hook(lambda *_: None)
        return twin(**asked(length)).logits


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_call_of_all_positions_leaves_the_size_open(kind: str) -> None:
    model, plain = made(kind)
    assert room_of(model) is not None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", vera_fx.PartialCaptureWarning)
        for length in (ROOM, 5, ROOM - 1, ROOM):
            found = model(**asked(length)).logits
            torch.testing.assert_close(found, in_python(model, length), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found, plain(**asked(length)).logits, atol=1e-3)
    assert len(list(runtime_of(model).all_captures())) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["graph", "mixed", "compiled"])
def test_longer_ones_are_an_error_that_says_so(kind: str, how: str) -> None:
    model, plain = made(kind)
    run = compiled(model) if how == "compiled" else model
    rows = {"adapter_names": ["default", "__base__"]} if how == "mixed" else {}
    words = rf"called with {ROOM + 1} tokens.*has room for {ROOM}; .*max_length={ROOM}\)"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", vera_fx.PartialCaptureWarning)
        for length in (ROOM + 1, ROOM, ROOM + 1):  # before there is a graph, and after
            if length > ROOM:
                with pytest.raises(vera_fx.LengthError, match=words) as caught:
                    run(**asked(length), **rows)
                kinds = (vera_fx.CaptureError, IndexError, RuntimeError)
                assert (
                    type(caught.value.__cause__) in kinds
                )  # what happened, not what Dynamo met then
            else:
                before = run(**asked(length), **rows).logits
        assert torch.equal(run(**asked(ROOM), **rows).logits, before)
        with pytest.raises((IndexError, RuntimeError)) as own:  # the plain model's stays its own
            plain(**asked(ROOM + 1))
    assert not isinstance(own.value, vera_fx.VeraFxError)


def test_it_is_what_torch_raises_as_well() -> None:
    assert issubclass(vera_fx.LengthError, (vera_fx.VeraFxError, IndexError, RuntimeError))
    assert {IndexError, RuntimeError} < set(vera_fx.LengthError.__mro__)


def test_padding_has_no_position_where_a_model_counts_tokens() -> None:
    model, _ = made("roberta")
    ids = torch.full((2, ROOM + 6), PADDING)
    ids[:, :ROOM] = asked(ROOM)["input_ids"]
    mask = (ids != PADDING).long()
    given = {"token_type_ids": torch.zeros_like(ids), "attention_mask": mask}
    with torch.no_grad():
        wide = model(input_ids=ids, **given).logits
        torch.testing.assert_close(wide, model(**asked(ROOM)).logits, rtol=1e-4, atol=1e-5)


def test_positions_of_ones_own_are_no_length() -> None:
    model, _ = made("gpt2")
    twice = {name: value.repeat(1, 2) for name, value in asked(ROOM).items()}
    places = torch.arange(ROOM).repeat(2, 2)
    with torch.no_grad():
        assert model(**twice, position_ids=places).logits.shape[1] == 2 * ROOM
        with pytest.raises(vera_fx.LengthError, match=f"called with {ROOM + 1} tokens"):
            model(**twice, position_ids=places + 1)


@pytest.mark.parametrize("how", ["graph", "compiled"])
def test_another_error_stays_its_own(how: str) -> None:
    model, _ = made("gpt2")
    given = asked(ROOM)
    given["input_ids"][0, 0] = 50  # no word
    with torch.no_grad(), pytest.raises(IndexError) as caught:
        (compiled(model) if how == "compiled" else model)(**given)
    assert not isinstance(caught.value, vera_fx.VeraFxError)


def test_generation_past_the_last_position_counts_what_the_cache_holds() -> None:
    model, _ = made("gpt2")
    with pytest.raises(vera_fx.LengthError, match=f"called with {ROOM + 1} tokens"):
        model.generate(**asked(ROOM - 2), max_new_tokens=5, min_new_tokens=5, do_sample=False)


def test_rotary_positions_have_no_room_to_run_out_of() -> None:
    config = transformers.LlamaConfig(**SIZES, intermediate_size=32)
    model: Any = vera_fx.adapt(
        transformers.LlamaForCausalLM(config).eval(), vera_fx.VeraConfig(r=4)
    )
    assert room_of(model) is None
    with torch.no_grad():
        assert model(**asked(2 * ROOM)).logits.shape[1] == 2 * ROOM
