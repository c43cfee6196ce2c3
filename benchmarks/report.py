"""Writes what a benchmark found: figures as JSON, with the versions that they were measured with."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console

console = Console(width=120)


def write(output: Path, figures: dict[str, Any]) -> None:
    """Put the figures into a JSON file, and say where."""
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"versions": versions, **figures}, indent=2) + "\n")
    console.print(f"written to {output}; " + ", ".join(f"{k} {v}" for k, v in versions.items()))


def resident(pid: int | None = None, *, peak: bool = False) -> int:
    """Bytes of memory that a process holds, or held at most: this one, or another. Linux only."""
    path, key = Path("/proc", str(pid or "self"), "status"), "VmHWM" if peak else "VmRSS"
    line = next(line for line in path.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])
