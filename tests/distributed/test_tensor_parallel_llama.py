"""Transformers' tensor parallelism (``tp_plan="auto"``): a Llama and a Qwen3 that are loaded in parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.test_fsdp2_files import shared
from tests.distributed.test_fsdp2_llama import IDS, adapted, train
from tests.distributed.training import assert_trained, vectors
from tests.helpers import assert_close, gradients
from tests.models import llama

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def qwen3() -> nn.Module:
    """Its norms of attention heads have a style of their own, for gradients that no adapter takes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))


MODELS = {"llama": llama, "qwen3": qwen3}


def loaded(name: str, folder: Path) -> tuple[Any, Any]:
    """The model in parts, and whole."""
    from transformers.distributed.configuration_utils import DistributedConfig

    folder = shared(folder) / name
    torch.manual_seed(0)
    whole = MODELS[name]()
    if dist.get_rank() == 0:
        whole.save_pretrained(folder)
    dist.barrier()
    options = DistributedConfig(tp_plan="auto", tp_size=2)
    return type(whole).from_pretrained(folder, distributed_config=options), whole


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@two_processes
def test_trains_and_generates(name: str, tmp_path: Path) -> None:
    model, whole = (adapted(net) for net in loaded(name, tmp_path))
    found, expected = (
        gradients(net, lambda m: m(input_ids=IDS, labels=IDS, use_cache=False))
        for net in (model, whole)
    )
    assert len(found) == 28
    for key, value in found.items():
        assert_close(value, expected[key], factor=5, what=key)
    train(model, IDS, steps=3)
    train(whole, IDS, steps=3)
    assert_trained(model, vectors(whole), factor=10)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = model.eval().generate(IDS, **options)
    assert torch.equal(tokens, whole.eval().generate(IDS, **options))
    assert vera_fx.explain(model).python == ()  # whole graphs


@two_processes
def test_adapters_on_disk(tmp_path: Path) -> None:
    import peft

    model, plain = loaded("llama", tmp_path)
    train(adapted(model), IDS)
    folder = vera_fx.save_adapter(model, shared(tmp_path) / "adapter")
    dist.barrier()
    theirs = peft.PeftModel.from_pretrained(plain, folder).eval()
    again = vera_fx.load_adapter(loaded("llama", tmp_path)[0], folder)
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
        assert_close(logits, theirs(input_ids=IDS).logits, factor=5)
        assert_close(again.eval()(input_ids=IDS).logits, logits, factor=5)
