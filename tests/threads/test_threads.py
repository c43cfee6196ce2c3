"""One model in several threads: right answers, or an error that says which thread did what."""

import copy
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import fill_adapters

SECONDS = 3.0
PATHS = ["up", "down", "0", "1", "2", "3"]
X = torch.randn(7, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SWITCHED = "another thread switched"


class Net(nn.Module):
    """Equal layers, so that graphs with gradients have functions of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.mid = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.up(x).relu()
        for layer in self.mid:
            x = x + layer(x).tanh()
        return self.down(x) * scale


class Stage:
    """A model with adapters of three structures, what it must answer, and a file of one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        wide = vera_fx.VeraConfig(r=3, target_modules=PATHS)
        self.model = vera_fx.adapt(Net().double().eval(), wide, adapter_name="a")
        vera_fx.add_adapter(self.model, "b", vera_fx.VeraConfig(r=5, target_modules=PATHS))
        vera_fx.add_adapter(self.model, "c", vera_fx.VeraConfig(r=5, target_modules=["up"]))
        fill_adapters(self.model)
        vera_fx.save_adapter(self.model, folder / "b", adapter_name="b")
        self.expected = dict(self._answers(copy.deepcopy(self.model)))

    def _answers(self, alone: nn.Module) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            for name in "abc":
                vera_fx.set_adapter(alone, name)
                yield name, alone(X)
            with vera_fx.disable_adapters(alone):
                yield "__base__", alone(X)

    def calls(self, allowed: str) -> Callable[[int], None]:
        """Calls of changing sizes, constants and grad modes."""

        def call(turn: int) -> None:
            rows, scale = turn % 7 or 7, 1.0 + turn % 3
            with torch.set_grad_enabled(turn % 2 == 0):
                result = self.model(X[:rows], scale=scale)
            if result.requires_grad:
                result.sum().backward()
            names = ["__base__" if name == "-" else name for name in allowed]
            answers = [self.expected[name][:rows] * scale for name in names]
            assert any(torch.allclose(result, answer, atol=1e-9) for answer in answers), "wrong"

        return call

    def rows(self, turn: int) -> None:
        names = [("a", "b", "c", "__base__")[(turn + row) % 4] for row in range(turn % 5 + 2)]
        with torch.no_grad():
            result = self.model(X[: len(names)], adapter_names=names)
        answer = torch.stack([self.expected[name][row] for row, name in enumerate(names)])
        assert torch.allclose(result, answer, atol=1e-9), "wrong"

    def switch(self, turn: int) -> None:
        vera_fx.set_adapter(self.model, "abc"[turn % 3])

    def disable(self, _turn: int) -> None:
        with vera_fx.disable_adapters(self.model):
            time.sleep(0)

    def load(self, turn: int) -> None:
        name = f"of_{threading.get_ident()}_{turn}"
        vera_fx.load_adapter(self.model, self.folder / "b", adapter_name=name)
        vera_fx.delete_adapter(self.model, name)

    def save(self, turn: int) -> None:
        place = self.folder / f"{threading.get_ident()}_{turn % 3}"
        vera_fx.save_adapter(self.model, place, adapter_name="b")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    interval = sys.getswitchinterval()
    built = Stage(tmp_path)
    sys.setswitchinterval(2e-5)
    yield built
    sys.setswitchinterval(interval)


def beside(*works: Callable[[int], None]) -> Counter[str]:
    """Run each work over and over in a thread of its own; how often what happened."""
    seen: Counter[str] = Counter()
    end = time.monotonic() + SECONDS

    def work(number: int, step: Callable[[int], None]) -> None:
        turn = 0
        while time.monotonic() < end or turn < 3:
            turn += 1
            try:
                step(turn)
                seen[f"{number} done"] += 1
            except vera_fx.VeraFxError as error:
                seen[SWITCHED if SWITCHED in str(error) else f"{number}: {error}"] += 1
            except Exception as error:
                seen[f"{number} crashed: {error!r}"] += 1

    threads = [threading.Thread(target=work, args=item) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "threads wait for one another"
    assert {f"{number} done" for number in range(len(works))} <= seen.keys()
    return seen


def strange(seen: Counter[str]) -> list[str]:
    return [what for what in seen if what != SWITCHED and not what.endswith(" done")]


def test_calls_beside_calls(stage: Stage) -> None:
    seen = beside(*[stage.calls("a")] * 3)
    assert strange(seen) == []
    assert SWITCHED not in seen


@pytest.mark.parametrize("other", ["load", "save"])
def test_calls_beside_files(stage: Stage, other: str) -> None:
    seen = beside(stage.calls("a"), stage.calls("a"), getattr(stage, other))
    assert strange(seen) == []
    assert SWITCHED not in seen


@pytest.mark.parametrize("other", ["switch", "disable"])
def test_calls_beside_switches_are_right_or_refused(stage: Stage, other: str) -> None:
    seen = beside(stage.calls("abc-"), stage.calls("abc-"), getattr(stage, other))
    assert strange(seen) == []


def test_mixed_batches_beside_all_else(stage: Stage) -> None:
    seen = beside(stage.rows, stage.rows, stage.switch, stage.load, stage.save)
    assert strange(seen) == []
    assert SWITCHED not in seen


def test_writers_beside_writers(stage: Stage) -> None:
    seen = beside(stage.switch, stage.load, stage.load, stage.save)
    assert strange(seen) == []
    vera_fx.set_adapter(stage.model, "c")
    assert vera_fx.adapter_names(stage.model) == ["a", "b", "c"]
    stage.calls("c")(2)
    trains = {n.split(".")[2] for n, p in stage.model.named_parameters() if p.requires_grad}
    assert trains == {"c"}


def test_a_switch_in_the_middle_of_a_call_is_told(stage: Stage) -> None:
    model = stage.model

    class Switches(nn.Module):
        """Stands for another thread: switches while the graph runs."""

        def forward(self, *leaves: Tensor) -> list[Tensor]:
            vera_fx.set_adapter(model, "b")
            return [leaves[0]]

    from vera_fx.graphs.around import finish, prepare, run

    prepared = prepare(model, (X,), {})
    assert prepared is not None
    prepared.graph = Switches()  # type: ignore[assignment]
    outputs = run(prepared)
    with pytest.raises(vera_fx.AdapterError, match=f"{SWITCHED}.*lock.*adapter_names"):
        finish(prepared, outputs)


def test_a_crash_by_a_switch_is_told_as_well(stage: Stage) -> None:
    model = stage.model

    class Crashes(nn.Module):
        def forward(self, *leaves: Tensor) -> list[Tensor]:
            vera_fx.set_adapter(model, "b")
            raise RuntimeError("sizes of two adapters")

    from vera_fx.graphs.around import prepare, run

    prepared = prepare(model, (X,), {})
    assert prepared is not None
    prepared.graph = Crashes()  # type: ignore[assignment]
    with pytest.raises(vera_fx.AdapterError, match=SWITCHED):
        run(prepared)
    vera_fx.set_adapter(model, "b")
    prepared.switches = model.vera.slots.switches
    with pytest.raises(RuntimeError, match="sizes of two"):
        run(prepared)
