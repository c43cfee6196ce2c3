"""What torch keeps of traces for good ends with the capture: their sizes, and the printed code of graphs."""

import gc
import linecache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import graph_module, symbolic_trace
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import vera_fx
from tests.helpers import assert_close
from vera_fx.capturing.trace import nothing_kept
from vera_fx.graphs.runtime import runtime_of

X = torch.arange(24.0).reshape(3, 8) / 24


class Net(nn.Module):
    """An attribute of it is baked into every capture."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 7)
        self.gain = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.gain < 0:
            raise ValueError("no gain")
        return self.down(self.up(x).relu()) + self.gain


def environments() -> int:
    gc.collect()
    return sum(type(found) is ShapeEnv for found in gc.get_objects())


def sources() -> set[str]:
    gc.collect()
    return set(graph_module._loader.eval_cache)


def limited(graphs: int) -> Any:
    config = vera_fx.VeraConfig(r=3, target_modules=["up", "down"])
    model: Any = vera_fx.adapt(Net().eval(), config)
    runtime_of(model).kept.graphs = graphs
    return model


@pytest.mark.filterwarnings("ignore:.*graphs of Net have been captured")
def test_captures_that_went_leave_no_sizes_and_no_code() -> None:
    model = limited(2)
    plain = model(X)
    found: list[tuple[int, int, int]] = []
    for turn in range(1, 9):
        model.gain = turn
        assert_close(model(X), plain + turn, what=f"gain {turn}")
        lines = sum(name.startswith("<eval_with_key>") for name in linecache.cache)
        found.append((environments(), len(sources()), lines))

    assert len(list(runtime_of(model).kept.all())) == 2
    assert found[3:] == [found[3]] * 5


def test_traces_that_fail_leave_none_either() -> None:
    known, before, failing = environments(), sources(), Net()
    failing.gain = -1
    for _ in range(3):
        with pytest.raises(ValueError, match="no gain"), nothing_kept():
            torch.export.export(
                failing, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False
            )

    assert environments() <= known  # clearing the caches may free older ones
    assert sources() <= before


def test_graphs_that_live_keep_their_code() -> None:
    before = sources()
    with nothing_kept():
        graph = symbolic_trace(Net())
    (name,) = sources() - before

    assert "down" in "".join(linecache.getlines(name))
    assert graph.forward.__code__.co_filename == name
    del graph
    assert name not in sources()
    assert name not in linecache.cache


def test_code_of_graphs_that_others_make_stays() -> None:
    before = sources()
    graph = symbolic_trace(Net())
    (name,) = sources() - before
    del graph

    assert name in sources()
