"""A Llama under FSDP2: training with its own loss, generate, tied embeddings, accelerate."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.test_fsdp2 import mesh
from tests.distributed.training import assert_trained, mine, vectors
from tests.helpers import fill_vectors
from tests.models import llama, tokens

IDS = tokens(4, 6)


def adapted(base: nn.Module) -> nn.Module:
    fields: dict[str, Any] = {"r": 5, "target_modules": "all-linear", "plan": "factored"}
    model = vera_fx.adapt(base, vera_fx.VeraConfig(**fields))
    fill_vectors(model)
    return model


def train(model: Any, ids: Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh())
    return fully_shard(model, mesh=mesh())


@pytest.mark.parametrize("checkpointing", [False, True])
@two_processes
def test_trains_and_generates(checkpointing: bool) -> None:
    base = llama()
    model, alone = adapted(copy.deepcopy(base)), adapted(base)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sharded(model)
    train(model, mine(IDS))
    train(alone, IDS)
    assert_trained(model, vectors(alone), factor=5)
    assert len(vera_fx.explain(model).graphs) == 2  # one of each layer
    if checkpointing:
        return
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.eval().generate(IDS, **options)
    assert torch.equal(found, alone.eval().generate(IDS, **options))


@two_processes
def test_tied_embeddings() -> None:
    base = llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    model, alone = adapted(copy.deepcopy(base)), adapted(base)
    sharded(model)
    train(model, mine(IDS))
    train(alone, IDS)
    assert_trained(model, vectors(alone), factor=5)


@pytest.mark.parametrize("sparing", [False, True], ids=["plain", "cpu_ram_efficient_loading"])
@two_processes
def test_accelerates_plugin(sparing: bool) -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=sparing,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    base = llama()
    model, alone = adapted(copy.deepcopy(base)), adapted(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        accelerator.backward(model(input_ids=mine(IDS), labels=mine(IDS), use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()
    train(alone, IDS)
    assert_trained(model, vectors(alone), factor=5)


@two_processes
def test_a_second_model_generates_the_same_from_kept_captures(tmp_path: Path) -> None:
    """Layers whose code asks for their number are captured each, and kept each."""
    base, options = llama(), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = adapted(copy.deepcopy(base)).eval().generate(IDS, **options)
    own = tmp_path / str(torch.distributed.get_rank())
    with vera_fx.capture_cache(own):
        for _ in range(2):
            model = sharded(adapted(copy.deepcopy(base)).eval())
            assert torch.equal(model.generate(IDS, **options), expected)
