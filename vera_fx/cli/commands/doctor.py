"""``vera-fx doctor``: what this machine and its installation can do."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from vera_fx.cli.arguments import Json
from vera_fx.cli.main import reported
from vera_fx.cli.output import show
from vera_fx.graphs.machine import costs_of, multiplies_well

_LIBRARIES = (
    "vera-fx", "torch", "transformers", "accelerate", "peft", "safetensors", "bitsandbytes", "torchao",
    "hqq", "optimum-quanto", "onnx", "onnxscript", "onnxruntime", "executorch", "trl", "datasets", "tensorboard",
)  # fmt: skip


@reported
def doctor(json: Json = False) -> None:
    """Versions, devices, what this machine multiplies fast, and which extras are installed."""
    show(diagnosis(), as_json=json)


def diagnosis() -> dict[str, Any]:
    """Versions, device and what plans go by."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = accelerator or torch.device("cpu")
    costs = costs_of(device)
    return {
        "python": platform.python_version(),
        "libraries": [{"name": name, "version": _version(name)} for name in _LIBRARIES],
        "device": str(device),
        "known as": costs.name,
        "cores": os.cpu_count(),
        "bfloat16 is fast": multiplies_well(torch.bfloat16, device),
        "float16 is fast": multiplies_well(torch.float16, device),
        "torch.compile": _compiles(device),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiles(device: torch.device) -> str:
    """Whether a compiler is there: tried, on two numbers."""
    try:
        result = torch.compile(lambda x: x * 2 + 1)(torch.ones(2, device=device))
    except Exception as error:  # whatever a missing compiler ends in
        return (
            f"does not work: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        )
    return "works" if result.tolist() == [3.0, 3.0] else "gives wrong results"
