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
    """

    median: float
    low: float
    high: float
    first: float
    kept: float
    limit: float


@dataclass
class Spread:
    """Milliseconds over the rounds: median and quartiles."""

    median: float
    low: float
    high: float


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, *, inner: int = 2
) -> dict[str, Spread]:
    """Time functions in turns, so that drift hits all alike; the best of ``inner`` calls counts."""
    for function in functions.values():
        for _ in range(3):
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name].append(min(_milliseconds(function) for _ in range(inner)))
    return {name: Spread(*_quartiles(found)) for name, found in samples.items()}


def _milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def measure(case: Case, names: Sequence[str], rounds: int) -> dict[str, Timing]:
    """Time the methods on one case: all of them in every round, so that drift hits all alike."""
    torch._dynamo.reset()
    base = build(case)
    systems = [make(name, base, case) for name in names]
    arguments = inputs(case)
    first = {}
    for system in systems:
        with torch._inductor.utils.fresh_inductor_cache():
            first[system.name] = _timed(system, arguments) / 1e3
        system.step(arguments)
    samples: dict[str, list[float]] = {system.name: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            samples[system.name].append(_timed(system, arguments))
    rates = {dtype: gemm_rate(dtype) for dtype in {torch.float32, case.dtype}}
    return {
        system.name: Timing(
            *_quartiles(samples[system.name]),
            first[system.name],
            kept_bytes(system, arguments),
            products(system, arguments, rates),
        )
        for system in systems
    }


def products(
    system: System, arguments: dict[str, Any], rates: Mapping[torch.dtype, float]
) -> float:
    """Milliseconds of the matrix products of one step, counted eagerly, at each dtype's rate."""
    eager = dataclasses.replace(system, model=getattr(system.model, "_orig_mod", system.model))
    timed = {operator: _at(rates, flops) for operator, flops in flop_registry.items()}
    with FlopCounterMode(display=False, custom_mapping=timed) as counter:
        eager.step(arguments)
    return counter.get_total_flops() / 1e6


def _at(rates: Mapping[torch.dtype, float], flops: Callable[..., int]) -> Callable[..., float]:
    """A formula for milliseconds times 1e6, from one for floating-point operations."""

    def scaled(first: Tensor, *rest: Any, **options: Any) -> float:
        return flops(first, *rest, **options) / rates[first.dtype]

    scaled._get_raw = True  # tensors, not their shapes
    return scaled


def _timed(system: System, arguments: dict[str, Any]) -> float:
    start = time.perf_counter()
    system.step(arguments)
    return 1e3 * (time.perf_counter() - start)


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


def gemm_rate(dtype: torch.dtype) -> float:
    """Measured GFLOP/s of a (2048, 768) x (768, 768) product: the hardware's limit for the cases."""
    a, b = torch.randn(2048, 768).to(dtype), torch.randn(768, 768).to(dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 * 768 * 768 / best / 1e9
