"""Merged programs of weights that are read elsewhere, too: only the target's calls are changed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.export.export_models import adapted, call_of, eager, fixed_of
from tests.export.test_onnx import run, session_of
from tests.helpers import assert_close, assert_far_apart, fill_vectors, hook_reference
from vera_fx.branches.vera.reference import vera_delta

HEADS = {
    "gpt2": (["lm_head", "c_attn"], "transformer.wte.weight"),
    "t5": (["lm_head", "q", "wo"], "shared.weight"),
    "opt": (["lm_head", "q_proj"], "model.decoder.embed_tokens.weight"),
}


def with_head(name: str) -> tuple[nn.Module, nn.Module, str]:
    """A family with its head, tied to the embedding, among the targets."""
    targets, embedding = HEADS[name]
    base, model = adapted(name, target_modules=targets)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return base, model, embedding


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_folded_and_the_embedding_stays(name: str) -> None:
    base, model, embedding = with_head(name)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    example = {**call_of(name), **fixed_of(name)}
    program = vera_fx.export_program(model, kwargs=example, form="merged")

    for batch, length in ((3, 7), (2, 9)):
        call = call_of(name, batch, length)
        result = program.module()(**call)["logits"]
        assert_close(result, eager(hook_reference(base, model), name, call), factor=5)
        assert_far_apart(result, eager(base, name, call))
    weight, vectors = (
        base.lm_head.weight.detach(),
        model.vera.adapter("default").vectors_at("lm_head"),
    )
    pair = model.vera.projections_of(model.vera.adapter("default"))
    d, b = vectors.vera_lambda_d.detach(), vectors.vera_lambda_b.detach()
    delta = vera_delta(pair.vera_A, pair.vera_B, d, b, weight.shape[1])
    assert torch.equal(program.state_dict[embedding], weight)
    assert_close(program.state_dict["lm_head.weight"], weight + delta)
    assert "lm_head" in vera_fx.program_sites(program)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


def test_files_have_both(tmp_path: Path) -> None:
    base, model, embedding = with_head("gpt2")
    example = {**call_of("gpt2"), **fixed_of("gpt2")}
    program = vera_fx.export_program(model, kwargs=example)
    loaded = vera_fx.load_program(vera_fx.save_program(program, tmp_path / "p.pt2"))
    path = vera_fx.export_onnx(model, tmp_path / "m.onnx", kwargs=example)
    call = call_of("gpt2", 2, 9)
    expected = eager(hook_reference(base, model), "gpt2", call)

    assert {embedding, "lm_head.weight"} <= loaded.state_dict.keys()
    assert_close(loaded.module()(**call)["logits"], expected, factor=5)
    assert_close(run(session_of(path), call), expected, factor=10)


class ThreeOfOne(nn.Module):
    """One weight in three layers and in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.table = nn.Embedding(4, 4)
        self.table.weight = self.b.weight = self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x))))) + self.table(torch.tensor(2))


@pytest.mark.parametrize("targets", [["a"], ["a", "b"], ["a", "b", "c"], ["c"]])
def test_layers_that_share_a_weight_get_their_own(targets: list[str]) -> None:
    base = ThreeOfOne().eval()
    weight = base.a.weight.detach().clone()
    config = vera_fx.VeraConfig(r=2, target_modules=targets)
    model = vera_fx.adapt(ThreeOfOne(), config).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    fill_vectors(model)
    program = vera_fx.export_program(model, (torch.randn(3, 4),))

    for x in (torch.randn(3, 4), torch.randn(5, 4)):
        expected = hook_reference(base, model)(x).detach()
        assert_close(program.module()(x), expected)
        assert_far_apart(expected, base(x).detach())
    held = [value for key, value in program.state_dict.items() if "weight" in key]
    assert sum(torch.equal(value, weight) for value in held) == 1
    assert len(held) == len(targets) + 1


class Normed(nn.Module):
    """A layer whose weight is computed on every call, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
        self.plain = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(torch.tanh(self.normed(x)))


def test_a_computed_weight_is_folded() -> None:
    config = vera_fx.VeraConfig(r=2, target_modules=["normed", "plain"])
    model = vera_fx.adapt(Normed().eval(), config).eval()
    fill_vectors(model)
    program = vera_fx.export_program(model, (torch.randn(3, 5),))

    x = torch.randn(6, 5)
    assert_close(program.module()(x), model(x).detach())
    with vera_fx.disable_adapters(model):
        assert_far_apart(program.module()(x), model(x).detach())
    names = [f"{layer}.{name}" for layer in ("normed", "plain") for name in ("bias", "weight")]
    assert sorted(program.state_dict) == names


def test_the_model_itself_still_refuses() -> None:
    _, model, embedding = with_head("gpt2")
    with pytest.raises(vera_fx.AdapterError, match=f"tied to '{embedding}'"):
        vera_fx.merge(model)


def test_values_that_are_not_finite() -> None:
    _, model, _ = with_head("gpt2")
    with torch.no_grad():
        model.vera.adapter("default").vectors_at("lm_head").vera_lambda_b[0] = float("inf")
    with pytest.raises(vera_fx.ExportError, match="NaN or infinity"):
        vera_fx.export_program(model, kwargs={**call_of("gpt2"), **fixed_of("gpt2")})
