"""Interleaved timing, bytes kept for backward, and time of the first compiled step."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.cases import Case, build, inputs
from benchmarks.devices import begin_peak, peak, wait
from benchmarks.systems import System, make


@dataclass(frozen=True)
class Timing:
    """One method on one case.

    Attributes:
        median: milliseconds of a step over the rounds.
        low: the lower quartile.
        high: the upper quartile.
        first: seconds of the first step, capture and compilation included, with empty caches.
        kept: MiB of tensors that autograd keeps between forward and backward, parameters left out.
        limit: milliseconds that the matrix products of a step take at the rate of a single large one.
        peak: MiB that tensors take at most in a step, the model's included; 0 on a CPU.
    """

    median: float
    low: float
    high: float
    first: float
    kept: float
    limit: float
    peak: float = 0.0


@dataclass
class Spread:
    """Milliseconds over the rounds: median and quartiles."""

    median: float
    low: float
    high: float


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    inner: int = 2,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Spread]:
    """Time functions in turns, so that drift hits all alike; the best of ``inner`` calls counts.

    On a busy machine ``clock=time.process_time`` and one thread measure the work alone.
    """
    for function in functions.values():
        for _ in range(3):
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name].append(min(_milliseconds(function, device, clock) for _ in range(inner)))
    return {name: Spread(*_quartiles(found)) for name, found in samples.items()}


def _milliseconds(
    function: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    wait(device)
    start = clock()
    function()
    wait(device)
    return 1e3 * (clock() - start)


def measure(case: Case, names: Sequence[str], rounds: int) -> dict[str, Timing]:
    """Time the methods on one case: all of them in every round, so that drift hits all alike."""
    torch._dynamo.reset()
    base = build(case)
    systems = [make(name, base, case) for name in names]
    arguments = inputs(case)
    first = {}
    for system in systems:
        with torch._inductor.utils.fresh_inductor_cache():
            first[system.name] = _timed(system, arguments, case.device) / 1e3
        system.step(arguments)
    samples: dict[str, list[float]] = {system.name: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            samples[system.name].append(_timed(system, arguments, case.device))
    rates = {dtype: gemm_rate(dtype, case.device) for dtype in {torch.float32, case.dtype}}
    return {
        system.name: Timing(
            *_quartiles(samples[system.name]),
            first[system.name],
            kept_bytes(system, arguments),
            products(system, arguments, rates),
            peak_of(system, arguments, case.device),
        )
        for system in systems
    }


def products(
    system: System, arguments: dict[str, Any], rates: Mapping[torch.dtype, float]
) -> float:
    """Milliseconds of the matrix products of one step, counted eagerly, at each dtype's rate."""
    eager = dataclasses.replace(system, model=getattr(system.model, "_orig_mod", system.model))
    timed = {operator: _at(rates, flops) for operator, flops in flop_registry.items()}
    counter = FlopCounterMode(display=False, custom_mapping=timed)
    counter.mod_tracker = _NoModules()  # its own has hooks on all modules, past which no graph runs
    with counter:
        eager.step(arguments)
    return counter.get_total_flops() / 1e6


class _NoModules:
    """Counts for the whole model alone."""

    parents = frozenset({"Global"})

    def __enter__(self) -> "_NoModules":
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _at(rates: Mapping[torch.dtype, float], flops: Callable[..., int]) -> Callable[..., float]:
    """A formula for milliseconds times 1e6, from one for floating-point operations."""

    def scaled(first: Tensor, *rest: Any, **options: Any) -> float:
        return flops(first, *rest, **options) / rates[first.dtype]

    scaled._get_raw = True  # tensors, not their shapes
    return scaled


def _timed(system: System, arguments: dict[str, Any], device: str) -> float:
    wait(device)
    start = time.perf_counter()
    system.step(arguments)
    wait(device)
    return 1e3 * (time.perf_counter() - start)


def peak_of(system: System, arguments: dict[str, Any], device: str) -> float:
    """MiB of tensors at most in one step, all other methods' models left out; 0 on a CPU."""
    wait(device)
    begin_peak(device)
    before = torch.cuda.memory_allocated(device) / 2**20 if device.startswith("cuda") else 0.0
    system.step(arguments)
    wait(device)
    own = sum(t.nbytes for t in _state(getattr(system.model, "_orig_mod", system.model))) / 2**20
    return peak(device) - before + own if before else 0.0


def _quartiles(samples: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(samples, n=4)
    return median, low, high


def kept_bytes(system: System, arguments: dict[str, Any]) -> float:
    """MiB that one step keeps for backward, each storage once, parameters and buffers left out."""
    module = getattr(system.model, "_orig_mod", system.model)
    own = {t.untyped_storage().data_ptr() for t in _state(module)}
    own |= {v.untyped_storage().data_ptr() for v in arguments.values() if isinstance(v, Tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        system.step(arguments)
    return sum(kept.values()) / 2**20


def _state(module: nn.Module) -> list[Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    for holder in (getattr(module, "base_model", None), module):
        for name in ("vera_A", "vera_B"):
            tensors += list(getattr(holder, name, {}).values()) if hasattr(holder, name) else []
    return tensors


def gemm_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Measured GFLOP/s of a (2048, 768) x (768, 768) product: the hardware's limit for the cases."""
    a, b = (torch.randn(rows, 768, device=device).to(dtype) for rows in (2048, 768))
    best = float("inf")
    for _ in range(20):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 * 768 * 768 / best / 1e9
