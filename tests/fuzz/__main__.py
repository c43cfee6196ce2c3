"""python -m tests.fuzz: hunts for hours; what it keeps is under out/fuzz.

Failures belong into tests/fuzz/found, a folder each, when they are mended: `test_fuzz` runs them again.
"""

import argparse
import faulthandler
import functools
import logging
import os
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

import torch

from tests.fuzz.kills import KINDS
from tests.fuzz.loop import hunt
from tests.fuzz.targets import TARGETS

MEMORY = Path("/dev/shm")
"""A file system that costs no disk."""


def main() -> None:
    """Fuzz every target in turn until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--targets", nargs="+", choices=[*TARGETS], default=[*TARGETS])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--kills", type=int, default=1000, help="of each kind of writer")
    options = parser.parse_args()
    if options.kills:
        _kill(options.kills, options.seed)
    faulthandler.enable()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.fsync = lambda _: None  # contents are tried here, not disks
    typing.get_type_hints = functools.cache(typing.get_type_hints)  # a third of reading a program
    share = 60 * options.minutes / len(options.targets)
    for name in options.targets:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            counts = hunt(TARGETS[name](Path(folder)), options.seed, share, options.out)
        result = (
            f"{counts['mutations']:,} mutations, {counts['faults']} faults, seed {options.seed}"
        )
        sys.stdout.write(f"{name}: {result}\n")
        sys.stdout.flush()


def _kill(kills: int, seed: int) -> None:
    """In a process of its own, whose writers flush as they do in earnest."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "tests.fuzz.kills", str(kills), str(seed), folder, *KINDS]
        subprocess.run([sys.executable, *command], check=True)


if __name__ == "__main__":
    main()
