"""A capture takes a bounded time: where opening sizes is slow, fewer are opened, and users are told."""

import io
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, fill_vectors
from vera_fx import _context, debug
from vera_fx.capturing import budget
from vera_fx.graphs.runtime import runtime_of

CONFIG = vera_fx.VeraConfig(r=2, target_modules=["up"], plan="factored")


class Slow(nn.Module):
    """Asks about open sizes for ever: about those of the given dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        bound = 100
        while any(isinstance(x.shape[dim], torch.SymInt) for dim in self.dims):
            bound += int(x.shape[self.dims[0]] * bound > 1)
        return self.up(x).relu()


class Swallows(Slow):
    """Would go on, whatever goes wrong."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except Exception:
            return x


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERA_FX_CAPTURE_SECONDS", "1")
    monkeypatch.setattr(budget, "SECONDS_PER_OPERATOR", 0.0)


def signatures(model: nn.Module) -> list[str]:
    return [row.signature for row in vera_fx.explain(model).graphs]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("kind", [Slow, Swallows])
def test_only_the_batch_stays_open(kind: type[Slow]) -> None:
    base = kind(1)
    model = vera_fx.adapt(base, CONFIG)
    fill_vectors(model)
    plain = base.up.weight, base.up.bias

    with pytest.warns(vera_fx.FixedSizesWarning, match="every size left open") as told:
        model(torch.randn(2, 5, 4))
    assert len(told) == 1
    assert signatures(model) == ["x float32[s0, 5, 4]"]
    for rows in (3, 6):
        check(model, plain, torch.randn(rows, 5, 4))
    assert runtime_of(model).kept.made == 1


@pytest.mark.usefixtures("hurried")
def test_other_sizes_cost_a_capture_but_no_second_wait() -> None:
    model = vera_fx.adapt(Slow(1), CONFIG)
    with pytest.warns(vera_fx.FixedSizesWarning):
        model(torch.randn(2, 5, 4))
    model.eval()

    for tokens in (6, 7):
        check(model, (model.up.weight, model.up.bias), torch.randn(3, tokens, 4))

    assert signatures(model)[1:] == ["x float32[s0, 6, 4]", "x float32[s0, 7, 4]"]


@pytest.mark.usefixtures("hurried")
def test_no_size_stays_open_where_the_batch_is_slow_too() -> None:
    model = vera_fx.adapt(Slow(0), CONFIG)
    with pytest.warns(vera_fx.FixedSizesWarning) as told:
        check(model, (model.up.weight, model.up.bias), torch.randn(2, 5, 4))

    assert [str(w.message).count("no size left open") for w in told] == [0, 1]
    assert signatures(model) == ["x float32[2, 5, 4]"]


def check(model: nn.Module, plain: tuple[Tensor, Tensor], x: Tensor) -> None:
    vectors = model.vera.adapter("default").vectors_at("up")
    bank = model.vera.projections_of(model.vera.adapter("default"))
    A, B = bank.vera_A[:, :4], bank.vera_B[:4]
    branch = ((x @ A.T) * vectors.vera_lambda_d) @ B.T * vectors.vera_lambda_b
    assert_close(model(x), (x @ plain[0].T + plain[1] + branch).relu(), factor=10)


@pytest.mark.usefixtures("hurried")
def test_nothing_of_the_clock_stays() -> None:
    before = _context.residents()["patches"]
    model = vera_fx.adapt(Slow(1), CONFIG)
    with pytest.warns(vera_fx.FixedSizesWarning):
        model(torch.randn(2, 5, 4))

    assert _context.residents()["patches"] == before
    assert _context.now("clock") is None
    assert torch._C._len_torch_function_stack() == 0


def test_a_capture_without_a_budget_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERA_FX_CAPTURE_SECONDS", "0")
    monkeypatch.setattr(budget, "SECONDS_PER_OPERATOR", 0.0)

    def burn(x: Tensor) -> Tensor:
        end = time.thread_time() + 0.3
        while time.thread_time() < end:
            pass
        return x + 0

    class Patient(Slow):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(burn(x))

    model = vera_fx.adapt(Patient(), CONFIG)
    model(torch.randn(2, 5, 4))

    assert signatures(model) == ["x float32[s0, s1, s2]"]


def test_swin_is_captured_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import SwinConfig, SwinModel

    monkeypatch.setenv("VERA_FX_CAPTURE_SECONDS", "2")
    sizes = {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12}
    base = SwinModel(SwinConfig(**sizes, depths=[1, 1], num_heads=[2, 2])).eval()
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    start = time.thread_time()

    with torch.no_grad():
        with pytest.warns(vera_fx.FixedSizesWarning):
            model(torch.randn(2, 3, 32, 32))
        model(torch.randn(3, 3, 32, 32))

    assert time.thread_time() - start < 30
    assert [s.partition("[")[2] for s in signatures(model)] == ["s0, 3, 32, 32]"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What the line shows at the given seconds."""

    def shown(stream: io.StringIO, *seconds: float) -> str:
        now = iter([0.0, *seconds])
        monkeypatch.setattr(budget, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
        monkeypatch.setattr(sys, "stderr", stream)
        found = budget.Line("Net(x)")
        for n, _ in enumerate(seconds):
            found.show(n)
        found.end()
        return stream.getvalue()

    transformers = types.SimpleNamespace(
        is_progress_bar_enabled=lambda: True, get_verbosity=lambda: 30, WARNING=30
    )
    monkeypatch.setitem(sys.modules, "transformers.utils.logging", transformers)
    return shown


def test_a_line_shows_from_the_second_second_on(line: Callable[..., str]) -> None:
    assert line(Terminal(), 0.5, 1.9) == ""
    shown = line(Terminal(), 1.9, 2.1, 2.2, 2.7).split("\r")
    assert [text.partition("\x1b")[0] for text in shown] == [
        "",
        "vera_fx: capturing Net(x): 2 s, 1 operators",
        "vera_fx: capturing Net(x): 3 s, 3 operators",
        "",
    ]


def test_no_line_is_overwritten_in_a_file(line: Callable[..., str]) -> None:
    assert line(io.StringIO(), 2.1, 3.0, 31.0, 33.0) == (
        "vera_fx: capturing Net(x): 2 s, 0 operators\n"
        "vera_fx: capturing Net(x): 33 s, 3 operators\n"
    )


@pytest.mark.parametrize("switch", ["own", "bars", "verbosity"])
def test_the_line_can_be_hidden(
    line: Callable[..., str], monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    logging: Any = sys.modules["transformers.utils.logging"]
    if switch == "own":
        monkeypatch.setenv("VERA_FX_PROGRESS", "0")
    elif switch == "bars":
        logging.is_progress_bar_enabled = lambda: False
    else:
        logging.get_verbosity = lambda: 40

    assert line(Terminal(), 2.1, 5.0) == ""


def test_a_closed_stream_stops_no_capture(line: Callable[..., str]) -> None:
    stream = Terminal()
    stream.write = _closed  # type: ignore[method-assign]
    assert line(stream, 2.1) == ""


def _closed(_text: str) -> int:
    raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize(
    ("knob", "read"),
    [
        ("VERA_FX_CAPTURE_SECONDS", debug.capture_seconds),
        ("VERA_FX_PROGRESS", debug.shows_progress),
    ],
)
def test_wrong_knobs_are_named(
    monkeypatch: pytest.MonkeyPatch, knob: str, read: Callable[[], Any]
) -> None:
    monkeypatch.setenv(knob, "soon")
    with pytest.raises(vera_fx.ConfigError, match=f"{knob} must be .*'soon'"):
        read()
