"""`train_many`: the loop around jobs that train in one batch."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

from torch import nn
from torch.distributed import ProcessGroup

from vera_fx.bank.bank import bank_of
from vera_fx.base.modules import original_class
from vera_fx.checkpoint.saved import path_of
from vera_fx.config import AdapterConfig
from vera_fx.errors import AdapterError, ConfigError
from vera_fx.model.model_class import is_adapted
from vera_fx.processes.group import Processes, processes_of
from vera_fx.training.examples import Collate, Examples, padding_for
from vera_fx.training.forward import Forward, base_and_call, modes_kept
from vera_fx.training.many import ManyJobs
from vera_fx.training.progress import ProgressRows
from vera_fx.training.results import TrainResults
from vera_fx.training.settings import TrainSettings

JobSpec = tuple[AdapterConfig | None, Examples, TrainSettings]
"""A job of `train_many`: configuration (None for an adapter that the model has), examples, settings.

Examples have a length and are given by number: mappings of the model's arguments without a batch
dimension, ``labels`` among them.
"""


def train_many(  # noqa: PLR0913
    model: nn.Module,
    jobs: Mapping[str, JobSpec],
    *,
    held_out: Mapping[str, Examples] | None = None,
    collate: Collate | None = None,
    kind: str | None = None,
    tokens_per_pass: int | None = None,
    state: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    progress: bool | TextIO = True,
    on_step: Callable[[ManyJobs], None] | None = None,
    group: ProcessGroup | None = None,
) -> TrainResults:
    """Train many adapters at once: the rows of all jobs go through the frozen base in one batch.

    Every job ends with the vectors that it would have reached alone, to rounding, with its own loss, AdamW
    and schedule; one whose loss or gradient is not finite ends with its last finite values.

    Args:
        model: a model, adapted or not, or what ``torch.compile`` made of one.
        jobs: `JobSpec` by name, which is also the adapter's.
        held_out: examples to evaluate jobs on, by name.
        collate: makes a batch of examples; None pads on the right.
        kind: of the loss, as in `row_losses`; None takes it from the model's class.
        tokens_per_pass: cut steps of more tokens, with padding, into passes of rows of like length.
        state: a folder for a state file. If it has one, the run goes on from there.
        save_every: steps between writes of it; it is written when a job ends, too.
        progress: rows on the standard error output, or on another stream; False for none.
        on_step: called after every step with the jobs, of which it may add and stop some.
        group: of processes that share the rows of every step; None for torch's default, if there is any.

    Raises:
        ConfigError, AdapterError: a job cannot be trained here, processes differ, or another one failed.
        CheckpointError: the state cannot be read or written, or is of other jobs.
    """
    forward = _forward(model, collate, kind, tokens_per_pass, processes_of(group))
    with forward.processes.telling("train_many"):
        many = _begin(forward, jobs, held_out or {}, state)
        return _run(many, None if state is None else path_of(state), save_every, progress, on_step)


def _run(
    many: ManyJobs,
    folder: Path | None,
    save_every: int,
    progress: bool | TextIO,
    on_step: Callable[[ManyJobs], None] | None,
) -> TrainResults:
    if on_step is None:
        many.check_complete()
    with _training(many):
        for step in _steps(many, progress):
            if on_step is not None:
                on_step(many)
            if folder is not None and (step % save_every == 0 or many.has_ended()):
                many.save(folder)
    many.processes.agree("the end", lambda: None)
    return many.results


def _forward(
    model: nn.Module,
    collate: Collate | None,
    kind: str | None,
    tokens_per_pass: int | None,
    processes: Processes,
) -> Forward:
    base, call = base_and_call(model)
    pad = getattr(getattr(base, "config", None), "pad_token_id", None)
    gather = collate or padding_for(pad)
    return Forward(base, call, gather, kind, tokens_per_pass, processes=processes)


def _begin(
    forward: Forward,
    jobs: Mapping[str, JobSpec],
    held_out: Mapping[str, Examples],
    state: str | os.PathLike[str] | None,
) -> ManyJobs:
    """The jobs, checked and laid out; where a state has them, as they were then."""
    base, many = forward.model, ManyJobs(forward)
    strangers = sorted(held_out.keys() - jobs.keys())
    if not jobs or strangers:
        raise ConfigError(
            f"train_many needs jobs, and held-out examples of these alone; got {list(jobs)[:9]}"
            + (f" and examples for {strangers}" if strangers else "")
        )
    _check_state(base)
    if state is not None:
        many.resume(path_of(state))
    for name, job in jobs.items():
        config, dataset, settings = _parts(name, job)
        many.add(name, config, dataset, settings, held_out.get(name))
    weights = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    forward.processes.same_tensors("the model's weights", weights)
    return many


def _parts(name: str, job: JobSpec) -> JobSpec:
    if not isinstance(job, tuple) or len(job) != 3:  # noqa: PLR2004
        raise ConfigError(
            f"job {name!r} must be (config, dataset, TrainSettings), got {type(job).__name__}"
        )
    return job


def _check_state(model: nn.Module) -> None:
    if is_adapted(model):
        bank = bank_of(model)
        if not bank.enabled or bank.merged:
            raise AdapterError(
                f"this {original_class(model).__name__} has its adapters disabled or merged, so that "
                "nothing would train; leave the disable_adapters block, or unmerge it"
            )


@contextlib.contextmanager
def _training(many: ManyJobs) -> Iterator[None]:
    """Train mode inside; afterwards the modes as they were, and all values in the adapters."""
    with modes_kept(many.model):
        many.model.train()
        try:
            yield
        finally:
            many.write_back()


def _steps(many: ManyJobs, progress: bool | TextIO) -> Iterator[int]:
    """Make steps until no job runs; gives how many there were after each."""
    shown = None
    if progress is not False and many.processes.is_first:
        shown = ProgressRows(None if progress is True else progress)
    step = 0
    while many.running:
        many.step()
        step += 1
        yield step
        if shown is not None:
            shown.show(many.jobs.values(), now=not many.running)
