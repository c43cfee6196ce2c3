"""Where benchmarks run: waiting for a device, and the memory that it took."""

import torch


def wait(device: str) -> None:
    """Until everything that was asked of the device is done; at once on a CPU."""
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def begin_peak(device: str) -> None:
    """Count the most memory that tensors take from here on."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: str) -> float:
    """MiB that tensors took at most since `begin_peak`; 0 where torch does not count them."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.startswith("cuda") else 0.0


def name_of(device: str) -> str:
    """What the device is called in tables."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
