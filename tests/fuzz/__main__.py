"""python -m tests.fuzz: hunts for hours; what it keeps is under out/fuzz."""

import argparse
import faulthandler
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.fuzz.loop import hunt
from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzz every target in turn until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--targets", nargs="+", choices=[*TARGETS], default=[*TARGETS])
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.fsync = lambda _: None  # contents are tried here, not disks
    share = 60 * options.minutes / len(options.targets)
    for name in options.targets:
        with tempfile.TemporaryDirectory() as folder:
            counts = hunt(TARGETS[name](Path(folder)), options.seed, share, options.out)
        result = (
            f"{counts['mutations']:,} mutations, {counts['faults']} faults, seed {options.seed}"
        )
        sys.stdout.write(f"{name}: {result}\n")


if __name__ == "__main__":
    main()
