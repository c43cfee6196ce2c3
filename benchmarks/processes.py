"""Measurements that need a process of their own: peak memory, caches that are empty."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.cases import Case, case_of

_ONE = "--one"


def apart(module: str, name: str, case: Case, **environment: str) -> Any:
    """What `module`'s measurement gives for one method, in a new process.

    Args:
        module: the benchmark's module, whose main calls `answer`.
        name: of the method.
        case: the case.
        environment: variables for the process.
    """
    values = {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
    done = subprocess.run(
        [sys.executable, "-m", module, _ONE, name, json.dumps(values)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def answer(measurement: Callable[[str, Case], Any]) -> bool:
    """Print the measurement that `apart` asked this process for; False if it asked for none."""
    if sys.argv[1:2] != [_ONE]:
        return False
    print(json.dumps(measurement(sys.argv[2], case_of(json.loads(sys.argv[3])))))
    return True
