"""Debugging knobs, read from the environment in this one place.

``VERA_FX_DUMP=dir`` writes every graph before and after each pass; ``VERA_FX_VERIFY=1`` checks each
pass against its report; ``VERA_FX_PASS_LIMIT=n`` stops after n passes; ``VERA_FX_OUTLINE=n`` makes
one function of n and more equal layers, however little work they are (0: of none).
``VERA_FX_CAPTURE_SECONDS=n`` is how long a capture that leaves every size open may take (0: any
time), and ``VERA_FX_PROGRESS=0`` hides the line that shows how far it is.
"""

import os
from pathlib import Path

from vera_fx._context import next_number
from vera_fx.errors import ConfigError
from vera_fx.passes import RunOptions


def run_options(stage: str) -> RunOptions:
    """The options for one run of a pipeline, from the environment.

    Raises:
        ConfigError: a knob has a value that it cannot have.
    """
    dump = os.environ.get("VERA_FX_DUMP")
    verify = os.environ.get("VERA_FX_VERIFY", "0")
    limit = os.environ.get("VERA_FX_PASS_LIMIT")
    if verify not in {"0", "1"}:
        raise ConfigError(f"VERA_FX_VERIFY must be 0 or 1, got {verify!r}")
    if limit is not None and not limit.isdecimal():
        raise ConfigError(f"VERA_FX_PASS_LIMIT must be a number of passes, got {limit!r}")
    return RunOptions(
        dump=Path(dump) / f"{next_number():03d}_{stage}" if dump else None,
        verify=verify == "1",
        limit=int(limit) if limit is not None else None,
    )


def outline_least() -> int | None:
    """How many equal layers become calls of one function, which torch.compile compiles once.

    None where nobody says: then their work decides.

    Raises:
        ConfigError: the knob is no number.
    """
    least = os.environ.get("VERA_FX_OUTLINE")
    if least is not None and not least.isdecimal():
        raise ConfigError(f"VERA_FX_OUTLINE must be a number of layers or 0, got {least!r}")
    return None if least is None else int(least)


def capture_seconds() -> float:
    """How long opening sizes may take, beside what every operator takes; 0 for any time.

    Raises:
        ConfigError: the knob is no number.
    """
    seconds = os.environ.get("VERA_FX_CAPTURE_SECONDS", "10")
    if not seconds.isdecimal():
        raise ConfigError(f"VERA_FX_CAPTURE_SECONDS must be a number of seconds, got {seconds!r}")
    return float(seconds)


def shows_progress() -> bool:
    """Whether a capture that takes a while may say so.

    Raises:
        ConfigError: the knob has a value that it cannot have.
    """
    progress = os.environ.get("VERA_FX_PROGRESS", "1")
    if progress not in {"0", "1"}:
        raise ConfigError(f"VERA_FX_PROGRESS must be 0 or 1, got {progress!r}")
    return progress == "1"
