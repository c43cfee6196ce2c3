"""State of sharded models by torch's and accelerate's own ways, and stages of a pipeline."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.test_fsdp2 import sharded
from tests.distributed.test_fsdp2_files import shared
from tests.distributed.training import (
    Layer,
    adapted,
    assert_trained,
    base,
    batches,
    config,
    mean_loss,
    mine,
    train,
    vectors,
)
from tests.helpers import assert_close, fill_vectors

X = batches(1)[0]


@two_processes
def test_distributed_checkpoints(tmp_path: Path) -> None:
    model, folder = sharded(adapted()), shared(tmp_path) / "dcp"
    train(model, map(mine, batches()))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    fresh = vera_fx.adapt(base(), config())
    sharded(fresh)
    state = {"model": get_model_state_dict(fresh)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(fresh, state["model"])
    assert_trained(fresh, vectors(model))
    with torch.no_grad():
        assert_close(fresh(X), model(X))


@two_processes
def test_whole_state_from_the_first_process() -> None:
    """What accelerate does to load weights in one process alone."""
    source = adapted()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model = sharded(vera_fx.adapt(base(), config()))
    state = source.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=options)
    with torch.no_grad():
        assert_close(model(X), source(X))


class Stage(nn.Module):
    """A layer and, in the last one, a head."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        torch.manual_seed(int(last))
        self.layer = Layer()
        self.head = nn.Linear(6, 4) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


def stage(*, last: bool) -> nn.Module:
    model = vera_fx.adapt(Stage(last=last), config(target_modules=["up", "down"]))
    fill_vectors(model)
    return model


@two_processes
def test_adapted_stages_of_a_pipeline() -> None:
    rank = dist.get_rank()
    own = stage(last=rank == 1)
    placed = PipelineStage(own, rank, 2, torch.device("cpu"))
    schedule: Any = ScheduleGPipe(placed, n_microbatches=2, loss_fn=lambda y, _: mean_loss(y))
    if rank == 0:
        schedule.step(X)
    else:
        schedule.step(target=X)
    alone = nn.Sequential(stage(last=False), stage(last=True))
    (sum(mean_loss(alone(half)) for half in X.chunk(2)) / 2).backward()
    expected = dict(alone[rank].named_parameters())
    trained = [(n, p) for n, p in own.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    for name, parameter in trained:
        assert_close(parameter.grad, expected[name].grad, factor=5, what=name)
