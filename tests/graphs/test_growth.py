"""Nothing grows without bound: graphs, slots, choices, process-wide lists, memory."""

import copy
import gc
import resource
import warnings
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from vera_fx import _context
from vera_fx.graphs.kept import Kept
from vera_fx.graphs.runtime import runtime_of

PATHS = ["up", "down"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.gain = 0

    def forward(self, x: Tensor, scale: int = 1) -> Tensor:
        return self.down(self.up(x).relu()) * scale + self.gain


def adapted(*ranks: int) -> nn.Module:
    names = "abcdef"
    model = vera_fx.adapt(Net().eval(), config(ranks[0]), adapter_name="a")
    for name, rank in zip(names[1:], ranks[1:], strict=False):
        vera_fx.add_adapter(model, name, config(rank))
    return model


def config(rank: int) -> vera_fx.VeraConfig:
    return vera_fx.VeraConfig(r=rank, target_modules=PATHS)


X = torch.ones(3, 8)


def sizes(model: nn.Module) -> dict[str, int]:
    """How much of everything is kept."""
    gc.collect()
    runtime, slots = runtime_of(model), model.vera.slots
    captures = list(runtime.all_captures())
    return {
        "captures": len(captures),
        "graphs": sum(len(v) for c in captures for v in c.variants.values()),
        "planners": sum(len(c.planners) for c in captures),
        "choices": sum(len(p.chosen) for c in captures for p in c.planners.values()),
        "calls": len(runtime.kept._known),
        "states": len(runtime.watch._states),
        "slots": len(slots._kept),
        "names": len(slots.names._names),
        "groups": len(model.vera.structure.groups),
        "sources": len(torch.compiler.config.dynamic_sources.split(",")),
        **_context.residents(),
    }


def peak() -> int:
    """MiB that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def grown(model: nn.Module, step: Callable[[int], None], warm: int, times: int) -> dict[str, int]:
    """What there is more of after many steps than after some, and memory above 20 MiB."""
    for turn in range(warm):
        step(turn)
    before, memory = sizes(model), peak()
    for turn in range(warm, warm + times):
        step(turn)
    more = {name: n for name, n in sizes(model).items() if n > before[name]}
    return more | ({"MiB": peak() - memory} if peak() - memory > 20 else {})


def times(few: int, many: int) -> list[object]:
    return [few, pytest.param(many, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", times(300, 10_000))
def test_switches(count: int) -> None:
    model = adapted(2, 3, 5)

    def step(turn: int) -> None:
        vera_fx.set_adapter(model, "abc"[turn % 3])
        with torch.set_grad_enabled(turn % 2 == 0):
            model(X)

    assert grown(model, step, 12, count) == {}


@pytest.mark.parametrize("count", times(60, 2_000))
def test_adding_and_deleting(count: int) -> None:
    model = adapted(2, 3)

    def step(turn: int) -> None:
        name, rank = f"n{turn}", turn % 3 + 2
        vera_fx.add_adapter(model, name, config(rank))
        vera_fx.set_adapter(model, name)
        model(X)
        vera_fx.set_adapter(model, "a")
        vera_fx.delete_adapter(model, name)

    assert grown(model, step, 12, count) == {}


def limited(count: int) -> tuple[nn.Module, Kept]:
    """A model, and what it keeps: at most half of so many graphs."""
    model = adapted(2)
    kept = runtime_of(model).kept
    kept.graphs = min(count // 2, kept.graphs)
    return model, kept


@pytest.fixture
def few_graphs() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*graphs of Net have been captured")
        yield


@pytest.mark.usefixtures("few_graphs")
@pytest.mark.parametrize("count", times(10, 1_000))
def test_signatures(count: int) -> None:
    model, kept = limited(count)

    def step(turn: int) -> None:
        assert torch.equal(model(X, scale=turn), turn * model(X))

    more = grown(model, step, kept.graphs + 1, count - kept.graphs - 1)
    assert more.keys() <= {"calls"}  # far below its limit
    assert len(list(kept.all())) == kept.graphs


@pytest.mark.usefixtures("few_graphs")
@pytest.mark.parametrize("count", times(10, 1_000))
def test_values_of_an_attribute(count: int) -> None:
    model, kept = limited(count)
    plain = model(X)

    def step(turn: int) -> None:
        model.gain = turn
        assert torch.allclose(model(X), plain + turn)

    more = grown(model, step, kept.graphs + 1, count - kept.graphs - 1)
    assert more.keys() <= {"states", "calls"}  # far below their limits
    assert len(list(kept.all())) == kept.graphs


@pytest.mark.parametrize("count", times(5, 100))
def test_copies(count: int) -> None:
    model = adapted(2, 3)
    twins: list[weakref.ref[nn.Module]] = []

    def step(_turn: int) -> None:
        twin = copy.deepcopy(model)
        twins.append(weakref.ref(twin))
        with torch.no_grad():
            twin(X)
        del twin
        gc.collect()

    more = grown(model, step, 3, count)

    # Of every graph that was ever made torch keeps the code, for tracebacks: half a MiB a copy.
    assert more.pop("MiB", 0) <= count
    assert more == {}
    assert [twin for twin in twins if twin() is not None] == []


def test_sizes_of_calls() -> None:
    model = adapted(2)

    def step(turn: int) -> None:
        with torch.no_grad():
            model(torch.ones(turn + 2, 8))

    more = grown(model, step, 520, 80)

    assert more.keys() <= {"calls"}
    (capture,) = runtime_of(model).all_captures()
    (planner,) = capture.planners.values()
    assert len(planner.chosen) == 512


@pytest.mark.usefixtures("few_graphs")
def test_what_is_kept_can_be_seen() -> None:
    model = adapted(2, 3)
    kept = runtime_of(model).kept
    kept.graphs = 2
    for scale in (1, 2, 3):
        model(X, scale=scale)
    vera_fx.set_adapter(model, "b")
    with torch.no_grad():
        model(X, scale=3)

    told = vera_fx.explain(model)

    assert told.kept == vera_fx.report.explain.KeptRow(3, 2, 2, 3, 4096)
    assert "kept: 2 captures (3 made, at most 2 of one entry), 3 known calls (at most 4096)" in str(
        told
    )
