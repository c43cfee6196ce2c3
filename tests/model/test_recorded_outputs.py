"""Hooks by which transformers notes hidden states: in graphs' way only in calls that ask for them."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    HubertConfig,
    HubertForSequenceClassification,
)

import vera_fx
from tests import models
from tests.helpers import assert_close, fill_vectors, peft_pair
from vera_fx.base.hf import recorded_by, recording
from vera_fx.graphs.runtime import runtime_of


def llama() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    return models.llama().eval(), models.text_inputs()


def hubert() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=16,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        use_weighted_layer_sum=True,
    )
    batch = {"input_values": torch.randn(2, 4000), "labels": torch.tensor([0, 1])}
    return HubertForSequenceClassification(config).eval(), batch


def adapted(base: Any) -> Any:
    model: Any = vera_fx.adapt(base, vera_fx.VeraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    fill_vectors(model)
    return model


def test_a_base_that_noted_its_states_before_is_captured_whole() -> None:
    base, batch = llama()
    fresh = adapted(copy.deepcopy(base))
    base(**batch, output_hidden_states=True)
    layer = base.model.layers[0]
    assert {recorded_by(hook) for hook in layer._forward_hooks.values()} == {"hidden_states"}
    model = adapted(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", vera_fx.PartialCaptureWarning)
        for asked in ({}, {"output_hidden_states": True}, {}):
            expected, found = fresh(**batch, **asked), model(**batch, **asked)
            torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
            assert (found.hidden_states is None) == (not asked)
    states = model(**batch, output_hidden_states=True).hidden_states
    expected = fresh(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 3
    for one, two in zip(states, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        assert one.abs().max() > 0


def test_layers_of_a_model_that_notes_their_outputs_are_captured() -> None:
    """In train mode NumPy masks Hubert's input, so that it runs in Python, and it asks for all states."""
    base, batch = hubert()
    model = adapted(base).train()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", vera_fx.PartialCaptureWarning)
        model(**batch).loss.backward()
    about = [str(w.message) for w in told if w.category is vera_fx.PartialCaptureWarning]
    assert about
    assert not [text for text in about if text.startswith("'hubert.encoder.layers")]
    layers = {f"hubert.encoder.layers.{n}" for n in range(2)}
    assert layers <= {
        path for path, entry in runtime_of(model).entries.items() if entry.kept.captures
    }


@pytest.mark.filterwarnings("ignore::vera_fx.PartialCaptureWarning")
def test_what_is_noted_is_what_pefts_model_notes() -> None:
    """The weighted sum of all hidden states: without the hooks there would be none to sum."""
    base, batch = hubert()
    theirs, ours = peft_pair(base, target_modules=["q_proj", "v_proj"], plan="factored")
    found: list[Any] = []
    for model in (theirs.train(), ours.train()):
        np.random.seed(5)  # masks
        found.append(model(**batch).logits)
    assert_close(found[1], found[0])


def test_nothing_is_noted_outside_of_a_call() -> None:
    base, batch = llama()
    base(**batch, output_hidden_states=True)
    assert not recording()
    assert recorded_by(lambda *_: None) is None


@pytest.mark.parametrize("own", [False, True], ids=["theirs", "the user's"])
def test_a_hook_of_the_users_runs_all_the_same(own: bool) -> None:
    base, batch = llama()
    base(**batch, output_hidden_states=True)
    model, seen = adapted(base), []
    if own:
        model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        with pytest.warns(vera_fx.PartialCaptureWarning, match="layers.1"):
            model(**batch)
    else:
        model(**batch)
    assert len(seen) == own
