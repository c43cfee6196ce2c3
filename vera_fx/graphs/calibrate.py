"""Measures what a device can do, for devices that no table knows or that somebody shares."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vera_fx._context import Registration
from vera_fx.errors import ConfigError
from vera_fx.graphs.machine import MEASURED, costs_of, device_name, multiplies_well
from vera_fx.passes import Device

_SECONDS = 1.0
"""How long each of the measurements may take."""


def calibrate(device: torch.device | str | None = None) -> Device:
    """Measure a device in some five seconds; plans that are chosen from now on go by that.

    Graphs that exist keep their plans. What was measured is kept for the process, for all devices of
    that name; nothing is written to disk.

    Args:
        device: which; None for the accelerator, or for the CPU where there is none.

    Returns:
        Operations a second of large products, bytes a second, seconds of an operator.

    Raises:
        ConfigError: there is no such device here.
    """
    place = _place(device)
    known = costs_of(place)
    with torch.inference_mode():
        single = _rate(torch.float32, place)
        quick = [d for d in (torch.bfloat16, torch.float16) if multiplies_well(d, place)]
        half = _rate(quick[0], place) if quick else single
        found = replace(
            known,
            name=f"{known.name}, measured",
            single=single,
            half=half,
            bandwidth=_bandwidth(place),
            launch=_launch(place),
        )
    Registration(MEASURED, device_name(place), found)
    return found


def _place(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"calibrate was asked to measure {str(device)!r}, and nothing can be put there ({error}); "
            "name a device that torch can use here, such as 'cpu'"
        ) from error
    return place


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: a @ b, device)


def _bandwidth(device: torch.device) -> float:
    count = 2**23 if device.type == "cpu" else 2**27
    source, target = (torch.zeros(count, device=device) for _ in range(2))
    return 2.0 * source.nbytes / _best(lambda: target.copy_(source), device)


def _launch(device: torch.device) -> float:
    """Seconds of an operator that has nothing to do, one after the other."""
    x = torch.zeros(1, device=device)
    many = 200

    def chain() -> Tensor:
        for _ in range(many):
            x.add_(1)
        return x

    return _best(chain, device) / many


def _best(function: Callable[[], Tensor], device: torch.device) -> float:
    """The shortest of the runs that fit into a second, the first of which does not count."""
    best, end = float("inf"), time.perf_counter() + _SECONDS
    function()
    while True:
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
