"""FSDP2 over an adapted model: two processes train what one does on the whole batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.training import (
    Checkpointed,
    adapted,
    assert_trained,
    base,
    batches,
    config,
    mean_loss,
    mine,
    train,
    trained_alone,
    vectors,
)
from tests.helpers import assert_close, assert_far_apart, fill_vectors, graphs_run

X = batches(1)[0]


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(model: nn.Module, *, layers: bool = True, **options: Any) -> Any:
    for layer in model.layers if layers else ():
        fully_shard(layer, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("layers", [True, False], ids=["layers and root", "root"])
@two_processes
def test_two_train_what_one_does(layers: bool, reshard: bool) -> None:
    model = sharded(adapted(), layers=layers, reshard_after_forward=reshard)
    with graphs_run() as count:
        train(model, map(mine, batches()))
    assert count() == (9 if layers else 3)  # a graph of each layer, or of the whole model
    assert_trained(model, trained_alone())


@pytest.mark.parametrize("plan", ["merged", "scaled", "dense", "auto"])
@two_processes
def test_every_plan(plan: str) -> None:
    model = sharded(adapted(plan=plan))
    train(model, map(mine, batches()))
    assert_trained(model, trained_alone(plan=plan), factor=5)


@two_processes
def test_offloaded() -> None:
    model = sharded(adapted(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    train(model, map(mine, batches()))
    assert_trained(model, trained_alone())


@two_processes
def test_clipped() -> None:
    model, alone = sharded(adapted()), adapted()

    def clip(m: nn.Module) -> Callable[[], Any]:
        return lambda: nn.utils.clip_grad_norm_(
            [p for p in m.parameters() if p.requires_grad], 1e-3
        )

    train(model, map(mine, batches()), before=clip(model))
    train(alone, batches(), before=clip(alone))
    assert_trained(model, vectors(alone), factor=5)


@two_processes
def test_gradient_checkpointing() -> None:
    inner = base()
    inner.__class__ = Checkpointed
    model = vera_fx.adapt(inner, config())
    fill_vectors(model)
    sharded(model)
    train(model, map(mine, batches()))
    assert_trained(model, trained_alone())


@two_processes
def test_mixed_precision() -> None:
    """The vectors are gathered in bfloat16: losses are those of a bfloat16 run to its rounding."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model, alone = adapted(), adapted()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh(), mp_policy=half)
    last = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard(model, mesh=mesh(), mp_policy=last)
    before = vectors(model)
    losses: list[float] = []
    train(model, map(mine, batches()), loss=lambda y: noted(mean_loss(y), losses))
    exact: list[float] = []
    train(alone, batches(), loss=lambda y: noted(mean_loss(y), exact))
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    assert (mean / 2).tolist() == pytest.approx(exact, rel=3e-2), (mean / 2, exact)
    after = vectors(model)
    assert all(value.dtype == torch.float32 for value in after.values())
    for name, value in after.items():
        assert_far_apart(value, before[name])


def noted(loss: Tensor, into: list[float]) -> Tensor:
    into.append(loss.item())
    return loss


@two_processes
def test_compiled_layers() -> None:
    torch._dynamo.reset()
    inner = adapted()
    for layer in inner.layers:
        layer.compile(backend="aot_eager", fullgraph=False)
    model = sharded(inner)
    train(model, map(mine, batches()))
    assert_trained(model, trained_alone(), factor=5)


@two_processes
def test_eval_switch_and_disable() -> None:
    model, alone = adapted().eval(), adapted().eval()
    for m in (model, alone):
        vera_fx.add_adapter(m, "other", config(r=3))
        with torch.no_grad():
            for parameter in m.vera.adapters["other"].parameters():
                parameter.fill_(0.3)
    sharded(model)
    plain = base()
    with torch.no_grad():
        assert_close(model(X), alone(X))
        for m in (model, alone):
            vera_fx.set_adapter(m, "other")
        assert_close(model(X), alone(X))
        assert_far_apart(model(X), plain(X))
        with vera_fx.disable_adapters(model):
            assert_close(model(X), plain(X))
        assert_close(model(X), alone(X))
    model.train()
    model.reshard()  # torch keeps the root's parameters gathered after a forward: no place for optimisers
    alone.train()
    train(model, map(mine, batches()))
    train(alone, batches())
    assert_trained(model, vectors(alone))


@two_processes
def test_mixtures_are_refused() -> None:
    model = sharded(adapted().eval())
    with pytest.raises(vera_fx.CaptureError, match="as one graph, but its parameters are sharded"):
        model(X, adapter_names=["default", *["__base__"] * 7])


def wide() -> Any:
    """Of sizes for which folding the branch into the weight is the cheapest way."""
    model = base()
    for layer in model.layers:
        layer.up, layer.down = nn.Linear(6, 160), nn.Linear(160, 6)
        layer.up = nn.Sequential(layer.up, nn.Linear(160, 128), nn.Linear(128, 160))
    fields: dict[str, Any] = {"r": 96, "target_modules": r".*up\.[12]"}
    model = vera_fx.adapt(model, vera_fx.VeraConfig(**fields))
    fill_vectors(model)
    return model


@two_processes
def test_no_weight_of_full_size_is_kept() -> None:
    """Where one process would fold the branch into the weight, a sharded model does not."""
    many, found = torch.randn(8192, 6), list[set[str]]()
    for model in (wide(), sharded(wide())):
        mean_loss(model(many)).backward()
        found.append({plan for g in vera_fx.explain(model).graphs for _, plan, _ in g.plans})
    assert found[0] & {"merged", "dense"}
    assert not found[1] & {"merged", "dense"}
    assert found[1]
