"""Interleaved times and peak memory of steps, on whatever device they run."""

import ctypes
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.utils.benchmark import Measurement, TaskSpec, timer

Step = Callable[[], object]
_STATUS = Path("/proc/self/status")


def interleaved(steps: Mapping[str, Step], rounds: int) -> dict[str, Measurement]:
    """Time steps in turns, so that drift hits all alike, after two untimed calls of each.

    torch's timer waits for the device before it reads the clock.
    """
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    return {
        name: Measurement(1, found, TaskSpec(stmt=name, setup="")) for name, found in times.items()
    }


def seconds(step: Step) -> float:
    """Of one step."""
    start = timer()
    step()
    return timer() - start


def peak(step: Step, device: torch.device) -> float | None:
    """MiB that a step takes at most beyond what is held before it; None where nobody counts.

    On accelerators by torch's allocator, on Linux by the kernel's high-water mark.
    """
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        step()
        torch.accelerator.synchronize(device)
        return (torch.accelerator.max_memory_allocated(device) - before) / 2**20
    if sys.platform != "linux" or not _STATUS.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what earlier steps freed and the allocator kept would hide this one
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # begins the mark anew
    step()
    return max(0, _resident("VmHWM") - before) / 1024


def _resident(key: str) -> int:
    """KiB of memory that this process holds, or held at most."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
