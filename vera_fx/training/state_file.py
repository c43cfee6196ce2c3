"""The state of many jobs on disk: one file that is there whole or not at all, and nothing in it is code."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vera_fx.disk.files import moved_into, writing
from vera_fx.disk.safetensors_file import SHA256, digest, open_weights
from vera_fx.errors import CheckpointError, listing, shown
from vera_fx.training.job import Progress
from vera_fx.training.tables import PARTS, Row

STATE_FILE = "training_state.safetensors"
_KEY = "vera_fx.training"
_VERSION = 1


@dataclass(slots=True)
class Saved:
    """One job as a state file has it.

    Attributes:
        fingerprint: what it was made with.
        progress: how far it is.
        rows: its part of the tables, by key.
        kept: its best values so far, by key.
    """

    fingerprint: str
    progress: Progress
    rows: dict[str, Row] = field(default_factory=dict[str, Row])
    kept: dict[str, Tensor] | None = None


@dataclass(slots=True)
class State:
    """All jobs, and what belongs to none of them.

    Attributes:
        jobs: by name.
        figures: the run's seconds, passes and tokens so far.
        generators: states of torch's random generators, by device (`by_rank`).
    """

    jobs: dict[str, Saved]
    figures: dict[str, Any]
    generators: dict[str, Tensor]


def write_state(folder: Path, state: State) -> None:
    """Write a state into a folder, in the place of the last one.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {f"generator.{k}": t for k, t in state.generators.items()}
    jobs: list[Any] = []
    for number, (name, saved) in enumerate(state.jobs.items()):
        keys = list(saved.rows)
        jobs.append(
            [name, saved.fingerprint, saved.progress.as_dict(), keys, saved.kept is not None]
        )
        for at, key in enumerate(keys):
            tensors |= {
                f"{number}.{at}.{p}": saved.rows[key][p] for p in PARTS if p in saved.rows[key]
            }
            if saved.kept is not None:
                tensors[f"{number}.{at}.kept"] = saved.kept[key]
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    text = json.dumps({"version": _VERSION, "jobs": jobs, "figures": state.figures})
    metadata = {_KEY: text}
    metadata[SHA256] = digest(tensors, metadata)
    try:
        with writing(folder), moved_into(folder) as aside:
            save_file(tensors, aside / STATE_FILE, metadata)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} cannot be written: {error}") from error


def read_state(folder: Path) -> State | None:
    """The state in a folder; None if there is none.

    Raises:
        CheckpointError: the file is damaged, or no state of this version.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        with open_weights(path, str) as file:
            tensors, text = file.read(), file.metadata.get(_KEY, "")
        found = json.loads(text)
        if found["version"] != _VERSION:
            raise ValueError(f"it is of version {shown(found['version'])}, not {_VERSION}")  # noqa: TRY301
        jobs = {
            job[0]: _saved(number, job[1:], tensors) for number, job in enumerate(found["jobs"])
        }
        start = "generator."
        generators = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
        return State(jobs, found["figures"], generators)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is no state of train_many that can be read ({error}); delete it to begin anew"
        ) from error


def _saved(number: int, values: list[Any], tensors: Mapping[str, Tensor]) -> Saved:
    fingerprint, progress, keys, has_kept = values
    rows = {
        key: {p: t for p in PARTS if (t := tensors.get(f"{number}.{at}.{p}")) is not None}
        for at, key in enumerate(keys)
    }
    kept = (
        {key: tensors[f"{number}.{at}.kept"] for at, key in enumerate(keys)} if has_kept else None
    )
    return Saved(fingerprint, Progress(**progress), rows, kept)


def check_same(name: str, saved: Saved, fingerprint: str) -> None:
    """Refuse to go on with a job that was begun as another.

    Raises:
        CheckpointError: configuration, settings or the number of examples differ.
    """
    if saved.fingerprint != fingerprint:
        raise CheckpointError(
            f"the state has a job {name!r} of other configuration, settings or data: it was begun with "
            f"{shown(saved.fingerprint, limit=600)}, and now it is {shown(fingerprint, limit=600)}; give "
            "the same, another folder, or delete the state"
        )


def check_none_left(left: Mapping[str, Saved]) -> None:
    """Refuse to drop jobs that a state has and nobody asks for.

    Raises:
        CheckpointError: there are some.
    """
    if left:
        raise CheckpointError(
            f"the state has the jobs {listing(left)}, which this call does not; give them as well, or "
            "another folder"
        )


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that dropout draws from."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def by_rank(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The generators of all processes under one another: the first ones keep their names."""
    return {
        f"{rank}.{device}" if rank else device: state
        for rank, own in enumerate(states)
        for device, state in own.items()
    }


def of_rank(states: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """One process's generators out of `by_rank`; none if there were fewer processes."""
    start = f"{rank}." if rank else ""
    return {
        device.removeprefix(start): state
        for device, state in states.items()
        if device.startswith(start) and ("." in device) == bool(rank)
    }


def restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators back to where they stood."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
