"""Mixtures of experts: adapted attention, routing that follows the tokens, and what cannot be."""

import copy

import pytest
import torch
from torch import nn

import vera_fx
from tests.families.test_matrix import MEMBERS
from tests.helpers import assert_close, assert_far_apart, fill_vectors, peft_pair
from tests.models import tokens

MIXTRAL = next(member for member in MEMBERS if member.name == "mixtral")


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return MIXTRAL.build().eval()


def other_tokens(seed: int) -> torch.Tensor:
    return torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(seed))


def test_routing_follows_the_tokens(base: nn.Module) -> None:
    theirs, ours = peft_pair(base, plan="factored")
    for ids in (tokens(), other_tokens(2), other_tokens(3)):
        expected = theirs(input_ids=ids, output_router_logits=True)
        actual = ours(input_ids=ids, output_router_logits=True)
        assert torch.equal(actual.logits, expected.logits)
        for mine, other in zip(actual.router_logits, expected.router_logits, strict=True):
            assert torch.equal(mine, other)
    chosen = [r.topk(2).indices for r in expected.router_logits]
    assert all(len(c.unique()) > 2 for c in chosen), "every token goes to the same experts"
    assert len(vera_fx.explain(ours).graphs) == 1


def test_training_with_noise_and_the_routers_loss(base: nn.Module) -> None:
    base.config.router_jitter_noise = 0.3
    for module in base.modules():
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.3
    theirs, ours = peft_pair(base, plan="factored")
    losses = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(4)
        losses.append(model(input_ids=tokens(), labels=tokens(), output_router_logits=True).loss)
    assert torch.equal(*losses)
    torch.manual_seed(5)
    assert not torch.equal(ours(input_ids=tokens(), labels=tokens()).loss, losses[0])


def test_implementations_of_the_experts(base: nn.Module) -> None:
    model = vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(r=4, plan="factored"))
    fill_vectors(model)
    with torch.no_grad():
        grouped = model(input_ids=tokens()).logits
        model.set_experts_implementation("batched_mm")
        assert_close(model(input_ids=tokens()).logits, grouped, factor=10)
        assert_far_apart(grouped, base(input_ids=tokens()).logits)
        assert len(vera_fx.explain(model).graphs) == 2
        model.set_experts_implementation("eager")
        with pytest.warns(
            vera_fx.PartialCaptureWarning, match=r'set_experts_implementation\("grouped_mm"'
        ):
            logits = model(input_ids=tokens()).logits
        assert_close(logits, grouped, factor=10)


def test_experts_themselves_are_no_targets(base: nn.Module) -> None:
    """Their weights are stacked parameters, which no linear module owns."""
    with pytest.raises(vera_fx.TargetError, match="MixtralExperts; only nn.Linear"):
        vera_fx.adapt(base, vera_fx.VeraConfig(r=2, target_modules=["experts"]))
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=2, target_modules="all-linear"))
    assert {path.rpartition(".")[2] for path in model.vera.structure.targets} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
