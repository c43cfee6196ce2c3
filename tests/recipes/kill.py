"""Runs ``vera-fx`` and kills it without a word, at the nth call of a function.

python -m tests.recipes.kill MODULE:NAME N before|after ARGUMENTS...
"""

import importlib
import os
import signal
import sys
from typing import Any


def kill_at(place: str, count: int, when: str) -> None:
    """Let the nth call of a function, or method, end the process."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


if __name__ == "__main__":
    import torch

    from vera_fx.cli.main import main

    torch.set_num_threads(1)
    kill_at(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    sys.argv = ["vera-fx", *sys.argv[4:]]
    main()
