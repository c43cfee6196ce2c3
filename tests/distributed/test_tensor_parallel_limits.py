"""Tensor parallelism: what is compiled, what travels, what runs in Python, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import vera_fx
from benchmarks.traffic import Traffic
from tests.distributed.pair import two_processes
from tests.distributed.tensor_parallel import PAIRED, adapted_parallel, mesh, parallel
from tests.distributed.training import (
    HIDDEN,
    RANK,
    WIDTH,
    adapted,
    assert_trained,
    base,
    batches,
    config,
    mean_loss,
    train,
    trained_alone,
)
from tests.helpers import assert_close, fill_vectors, gradients

X = batches(1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["factored", "scaled"])
@two_processes
def test_compiled(plan: str) -> None:
    torch._dynamo.reset()
    model = adapted_parallel(plan=plan)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(compiled, batches())
    assert_trained(model, trained_alone(plan=plan), factor=5)
    compiled(X[:5])  # from here on the number of rows is open
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(compiled(X[:4]), adapted_like(model)(X[:4]), factor=5)
    with torch.no_grad():
        assert_close(compiled(X[:3]), adapted_like(model)(X[:3]), factor=5)


def adapted_like(model: nn.Module) -> nn.Module:
    alone = adapted()
    vera_fx.load_adapter_state_dict(alone, vera_fx.adapter_state_dict(model))
    return alone


@two_processes
def test_what_travels() -> None:
    """What the base sends, and the vectors' gradients: branches send nothing of their own forward."""
    model = adapted_parallel(plan="scaled", target_modules=["up", "down"])
    train(model, [X])
    with Traffic() as forward:
        loss = mean_loss(model(X))
    with Traffic() as backward:
        loss.backward()
    assert forward.numbers == {"all_reduce": 3 * X.numel()}
    vectors = 3 * (RANK + HIDDEN + RANK + WIDTH)
    assert vectors == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert backward.numbers == {
        "all_reduce": 2 * X.numel() + vectors
    }  # the first needs none of its input


class Two(nn.Module):
    """Two layers read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).sigmoid() * self.second(x))


@two_processes
def test_gradients_of_one_input_travel_once() -> None:
    torch.manual_seed(0)
    alone = vera_fx.adapt(Two(), vera_fx.VeraConfig(r=5, target_modules="all-linear"))
    torch.manual_seed(0)
    plan: dict[str, Any] = {
        "first": ColwiseParallel(), "second": ColwiseParallel(), "out": RowwiseParallel()
    }  # fmt: skip
    model = parallelize_module(Two(), mesh(), plan)
    vera_fx.adapt(model, vera_fx.VeraConfig(r=5, target_modules="all-linear"))
    for net in (model, alone):
        fill_vectors(net)
    found = [X.clone().requires_grad_() for _ in range(2)]
    with Traffic() as traffic:
        for net, x in zip((model, alone), found, strict=True):
            mean_loss(net(x)).backward()
    assert_close(found[0].grad, found[1].grad)
    vectors = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert traffic.numbers == {"all_reduce": X.numel() + X.numel() + vectors}


class Normed(nn.Module):
    """An embedding, and layers around a norm, as torch's guides make them parallel by sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.block = Two()

    def forward(self, ids: Tensor) -> Tensor:
        return self.block(self.norm(self.words(ids)))


@two_processes
def test_other_styles_run_in_python() -> None:
    """Modules that are no targets may be parallel in any way; the parts around targets have graphs."""
    nets: list[Any] = []
    for is_parallel in (True, False):
        torch.manual_seed(0)
        net = Normed()
        if is_parallel:
            rowwise = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
            parallelize_module(net, mesh(), {
                "words": rowwise, "norm": SequenceParallel(),
                "block": PrepareModuleInput(
                    input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
                ),
                "block.first": ColwiseParallel(), "block.second": ColwiseParallel(),
                "block.out": RowwiseParallel(),
            })  # fmt: skip
        nets.append(vera_fx.adapt(net, vera_fx.VeraConfig(r=5, target_modules=r"block\..*")))
        fill_vectors(net)
    ids = torch.arange(12).reshape(3, 4) % 7
    assert_close(nets[0](ids), nets[1](ids))
    found, expected = (gradients(net, lambda m: m(ids)) for net in nets)
    assert len(found) == 6
    for name, value in found.items():
        assert_close(value, expected[name], what=name)
    ((path, reason),) = vera_fx.explain(nets[0]).python
    assert path == ""
    assert "parallel" in reason
    assert len(vera_fx.explain(nets[0]).graphs) == 1  # block's


REFUSED = {
    "output by rows": (ColwiseParallel(output_layouts=Shard(0)), {}, r"outputs Shard\(dim=0\)"),
    "input by rows": (ColwiseParallel(input_layouts=Shard(0)), {}, r"inputs Shard\(dim=0\)"),
    "DTensors": (ColwiseParallel(use_local_output=False), {}, "gives DTensors"),
    "dropout": (ColwiseParallel(), {"vera_dropout": 0.1}, "use a dropout of 0"),
    "random": (ColwiseParallel(), {"init_weights": False}, "draws other vectors in each process"),
    "merged": (ColwiseParallel(), {"plan": "merged"}, "plan='merged' reads the base's weight"),
    "saved": (ColwiseParallel(), {"modules_to_save": ["up"], "target_modules": ["down"]},
              "'layers.0.up' is under tensor parallelism, .* train a whole copy"),
    "bias": (ColwiseParallel(), {"bias": "vera_only"}, "cannot train the bias of 'layers.0.up'"),
}  # fmt: skip


@two_processes
def test_refused_by_adapt() -> None:
    for style, fields, reason in REFUSED.values():
        model = parallel(base(), {"up": style})
        with pytest.raises(vera_fx.TargetError, match=reason):
            vera_fx.adapt(model, config(**fields))
        assert not hasattr(model, "vera")
    with pytest.raises(vera_fx.TargetError, match="DVoRA is not computed: its magnitude"):
        vera_fx.adapt(parallel(base()), vera_fx.DVoraConfig(r=5, target_modules=["up"]))


@two_processes
def test_cut_by_two_hands_or_by_none() -> None:
    grid = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    model = base()
    for layer in model.layers:  # type: ignore[union-attr]
        parallelize_module(layer, grid["tensor"], PAIRED)
        fully_shard(layer, mesh=grid["data"])
    with pytest.raises(vera_fx.TargetError, match="by tensor parallelism and by fully_shard"):
        vera_fx.adapt(model, config())
    model = base()
    up: Any = model.layers[0].up  # type: ignore[index]
    up.weight = nn.Parameter(distribute_tensor(up.weight, mesh(), [Shard(0)]))
    with pytest.raises(vera_fx.TargetError, match="neither a parallel style nor fully_shard"):
        vera_fx.adapt(model, config())


@two_processes
def test_what_needs_the_whole_model_is_refused() -> None:
    model = adapted_parallel().eval()
    with pytest.raises(vera_fx.ExportError, match="tensor parallelism, and a program holds whole"):
        vera_fx.export_program(model, (X,))
    with pytest.raises(vera_fx.AdapterError, match="adapter_names cannot be used under tensor par"):
        model(X, adapter_names=["default"] * len(X))


@two_processes
def test_a_style_that_comes_later_and_cannot_be_followed() -> None:
    model: Any = adapted()
    model(X)
    parallel(model, {"up": ColwiseParallel(output_layouts=Shard(0))})
    with pytest.raises(vera_fx.TargetError, match=r"'layers.0.up' .*outputs Shard\(dim=0\)"):
        model(X)
