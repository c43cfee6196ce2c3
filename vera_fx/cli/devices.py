"""Where a command computes."""

import torch

from vera_fx.errors import ConfigError


def device_of(name: str) -> torch.device:
    """The device of a flag: ``auto`` is the accelerator, if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is auto, cpu, or one as cuda:0, not {name!r}") from None
    there = torch.accelerator.device_count() if accelerator else 0
    known = accelerator is not None and device.type == accelerator.type
    if device.type != "cpu" and not (known and (device.index or 0) < there):
        found = f"{there} of type {accelerator.type}" if accelerator else "the CPU alone"
        raise ConfigError(f"there is no device {name!r} here: found {found}")
    return device


def use_threads(count: int) -> None:
    """Let torch compute in so many threads; 0 changes nothing."""
    if count:
        torch.set_num_threads(count)
