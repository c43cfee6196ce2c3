"""PEFT 0.21.2 as an independent oracle, on models of eight architectures."""

import copy

import pytest
import torch
from torch import nn

import vera_fx
from tests.helpers import (
    assert_close,
    assert_far_apart,
    assert_same_gradients,
    gradients,
    loss_of,
    main_output,
    peft_pair,
    vectors_of,
)
from tests.models import FAMILIES, Family
from vera_fx.passes import PLANS

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


@pytest.fixture
def base(family: Family) -> nn.Module:
    torch.manual_seed(0)
    return family.build()


def call(model: nn.Module, family: Family):
    """Call with the family's inputs; PEFT's wrapper for plain modules takes them by position."""
    torch.manual_seed(5)  # both draw the base's dropout masks in the same order
    inputs = family.inputs()
    return model(*inputs.values()) if family.name in {"mlp", "attention"} else model(**inputs)


plans = pytest.mark.parametrize("plan", PLANS)


@families
@modes
def test_factored_outputs_are_bit_equal(base: nn.Module, family: Family, train: bool) -> None:
    theirs, ours = peft_pair(base, plan="factored", **family.config)
    theirs.train(train), ours.train(train), base.train(train)

    expected = main_output(call(theirs, family))
    assert torch.equal(main_output(call(ours, family)), expected)
    assert_far_apart(expected, main_output(call(base, family)))


@families
def test_projections_are_bit_equal(base: nn.Module, family: Family) -> None:
    theirs, ours = peft_pair(base, **family.config)
    state = vera_fx.adapter_state_dict(ours)

    assert torch.equal(state["base_model.vera_A"], theirs.base_model.vera_A["default"])
    assert torch.equal(state["base_model.vera_B"], theirs.base_model.vera_B["default"])


@families
@plans
def test_outputs_and_gradients_agree(base: nn.Module, family: Family, plan: str) -> None:
    theirs, ours = peft_pair(base, plan=plan, **family.config)
    expected = gradients(theirs, lambda m: call(m, family))

    assert_close(main_output(call(ours, family)), main_output(call(theirs, family)), factor=5)
    assert_same_gradients(gradients(ours, lambda m: call(m, family)), expected)
    assert {p for g in vera_fx.explain(ours).graphs for _, p, _ in g.plans} == {plan}


def train_steps(model: nn.Module, family: Family, steps: int = 3) -> dict[str, torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(call(model, family)).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in vectors_of(model).items()}


@families
def test_parameters_after_three_steps_agree(base: nn.Module, family: Family) -> None:
    theirs, ours = peft_pair(base, **family.config)
    start = {name: p.detach().clone() for name, p in vectors_of(ours).items()}
    expected = train_steps(theirs, family)
    actual = train_steps(ours, family)

    for name, value in expected.items():
        assert_close(actual[name], value, factor=50, what=name)
        assert not torch.equal(actual[name], start[name]), f"{name} did not train"


@families
def test_trainable_counts_agree(base: nn.Module, family: Family) -> None:
    theirs, ours = peft_pair(base, **family.config)
    trainable, total = theirs.get_nb_trainable_parameters()

    summary = vera_fx.parameter_summary(ours)
    assert (summary.trainable, summary.total) == (trainable, total)


@families
def test_no_module_is_replaced(base: nn.Module, family: Family) -> None:
    before = dict(base.named_modules())
    kind = type(base)
    parameters = dict(base.named_parameters())
    adapted = vera_fx.adapt(base, vera_fx.VeraConfig(r=4, **family.config))
    call(adapted, family)
    after = {n: m for n, m in adapted.named_modules() if n != "vera" and not n.startswith("vera.")}

    assert adapted is base
    assert isinstance(adapted, kind)
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())
    assert all(adapted.get_parameter(name) is p for name, p in parameters.items())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.generates], ids=lambda f: f.name)
class TestGenerate:
    """Greedy, sampled, beam and batch-1 generation with the key-value cache."""

    def prompt(self, family: Family) -> dict:
        inputs = {k: v for k, v in family.inputs().items() if k != "labels"}
        return {**inputs, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def test_tokens_are_identical(self, base: nn.Module, family: Family) -> None:
        theirs, ours = peft_pair(base.eval(), **family.config)
        for change in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}):
            arguments = {**self.prompt(family), **change}
            torch.manual_seed(3)
            expected = theirs.generate(**arguments)
            torch.manual_seed(3)
            assert torch.equal(ours.generate(**arguments), expected), change
        assert not torch.equal(
            base.generate(**self.prompt(family)), theirs.generate(**self.prompt(family))
        )

    def test_batch_of_one(self, base: nn.Module, family: Family) -> None:
        theirs, ours = peft_pair(base.eval(), **family.config)
        arguments = self.prompt(family)
        one = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}

        assert torch.equal(ours.generate(**one), theirs.generate(**one))

    def test_prefill_and_decode_are_two_graphs(self, base: nn.Module, family: Family) -> None:
        _, ours = peft_pair(base.eval(), **family.config)
        ours.generate(**self.prompt(family))
        first = len(vera_fx.explain(ours).graphs)
        ours.generate(**{**self.prompt(family), "max_new_tokens": 5})

        # T5: the encoder has a graph of its own, and the first decoder call has no cache yet.
        assert first <= (4 if family.name == "t5" else 3)
        assert len(vera_fx.explain(ours).graphs) == first


def test_cache_is_updated_in_place() -> None:
    from transformers import DynamicCache

    family = next(f for f in FAMILIES if f.name == "llama")
    torch.manual_seed(0)
    base = family.build().eval()
    ids = family.inputs()["input_ids"]
    theirs, ours = peft_pair(base, plan="factored", **family.config)
    caches = []
    for model in (theirs, ours):
        cache = DynamicCache(config=base.config)
        model(input_ids=ids, past_key_values=cache)
        result = model(input_ids=ids[:, :1], past_key_values=cache)
        assert result.past_key_values is cache
        caches.append(cache)

    assert caches[0].get_seq_length() == caches[1].get_seq_length() == ids.shape[1] + 1
    for their_layer, our_layer in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(their_layer.keys, our_layer.keys)


def test_encoder_called_on_its_own_is_adapted() -> None:
    family = next(f for f in FAMILIES if f.name == "t5")
    torch.manual_seed(0)
    base = family.build().eval()
    theirs, ours = peft_pair(base, **family.config)
    ids = family.inputs()["input_ids"]

    expected = theirs.base_model.model.get_encoder()(input_ids=ids).last_hidden_state
    assert torch.equal(ours.get_encoder()(input_ids=ids).last_hidden_state, expected)
    # Without gradients: CPU attention rounds otherwise when the (unfrozen) base needs them.
    with vera_fx.disable_adapters(ours), torch.no_grad():
        plain = copy.deepcopy(base).get_encoder()(input_ids=ids).last_hidden_state
        assert torch.equal(ours.get_encoder()(input_ids=ids).last_hidden_state, plain)
