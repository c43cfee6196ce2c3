"""The jobs that train together: they come, make steps in one batch, and end, each for itself."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vera_fx.bank.bank import bank_of
from vera_fx.config import AdapterConfig
from vera_fx.errors import AdapterError, ConfigError, shown
from vera_fx.processes.checksums import Checksum, checksums
from vera_fx.processes.group import Processes
from vera_fx.training.adamw import gradient_norms, update
from vera_fx.training.examples import Examples, Order
from vera_fx.training.forward import Forward, evaluate, gradients, modes_kept
from vera_fx.training.job import DIVERGED, FINISHED, STOPPED, Job, adapter_for
from vera_fx.training.results import TrainResults
from vera_fx.training.settings import TrainSettings
from vera_fx.training.state_file import (
    Saved,
    State,
    by_rank,
    check_none_left,
    check_same,
    generator_states,
    of_rank,
    read_state,
    restore_generators,
    write_state,
)
from vera_fx.training.tables import Row as TableRow
from vera_fx.training.tables import Tables, fill, tables_for


@dataclass
class ManyJobs:
    """The jobs of one `train_many`, which hands this to its ``on_step``.

    Attributes:
        forward: how rows go through the model.
        jobs: all of them by name, those that have ended included.
        tables: the values of those that run.
    """

    forward: Forward
    jobs: dict[str, Job] = field(default_factory=dict[str, Job])
    tables: Tables = field(default_factory=Tables)
    _saved: dict[str, Saved] = field(default_factory=dict[str, Saved])
    _seconds: float = 0.0
    _ended: int = 0

    def has_ended(self) -> bool:
        """True if jobs have ended since this was asked last."""
        before, self._ended = self._ended, len(self.jobs) - len(self.running)
        return self._ended != before

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self.forward.model

    @property
    def processes(self) -> Processes:
        """The processes that share the rows."""
        return self.forward.processes

    @property
    def running(self) -> list[Job]:
        """The jobs that have not ended, in the order in which they came."""
        return [job for job in self.jobs.values() if job.runs]

    @property
    def results(self) -> TrainResults:
        """What came of the jobs until now."""
        figures = self.forward.figures
        share = 1 - figures["own"] / figures["tokens"] if figures["tokens"] else 0.0
        found = {name: job.progress for name, job in self.jobs.items()}
        first = self.processes.is_first
        return TrainResults(found, self._seconds, figures["passes"], share, writes=first)

    def add(
        self,
        name: str,
        config: AdapterConfig | None,
        dataset: Examples,
        settings: TrainSettings,
        held_out: Examples | None = None,
    ) -> None:
        """Let a job take part from the next step on.

        Args:
            name: of the job, and of its adapter: made if the model has none of that name, and else
                trained further.
            config: of the adapter; None for that which it has.
            dataset: its examples.
            settings: how it is trained.
            held_out: examples to evaluate it on.

        Raises:
            AdapterError: the name is a job's already, or its adapter cannot be trained this way.
            ConfigError: no examples, no configuration, or another than the adapter has.
            CheckpointError: the state has a job of this name that is another.
        """
        self.processes.same(
            f"job {name!r}", lambda: self._add(name, config, dataset, settings, held_out)
        )

    def _add(
        self,
        name: str,
        config: AdapterConfig | None,
        dataset: Examples,
        settings: TrainSettings,
        held_out: Examples | None,
    ) -> tuple[str, int, Mapping[str, Checksum]]:
        """As `add`; what all processes must have alike of the job."""
        if name in self.jobs:
            raise AdapterError(f"there is a job {name!r} already; give every job a name of its own")
        if not isinstance(settings, TrainSettings) or not len(dataset):
            raise ConfigError(
                f"job {name!r} needs TrainSettings and examples, got {shown(settings)} and "
                f"{len(dataset)} examples"
            )
        config = adapter_for(self.model, name, config)
        order = Order(settings, len(dataset))
        job = self.jobs[name] = Job(name, config, dataset, settings, held_out, order)
        self._lay_out({name: self._found(job)})
        own = bank_of(self.model).adapter(name).named_parameters()
        sums = checksums(dict(own)) if self.processes.size > 1 else {}
        return job.fingerprint, len(held_out or ()), sums

    def _found(self, job: Job) -> Mapping[str, TableRow] | None:
        """What the state has of a new job; a job that had ended gets its values at once."""
        saved = self._saved.pop(job.name, None)
        if saved is None:
            return None
        check_same(job.name, saved, job.fingerprint)
        job.progress, job.kept = saved.progress, saved.kept
        if not job.runs:
            fill(self.model, job.name, {key: row["values"] for key, row in saved.rows.items()})
        return saved.rows

    def _lay_out(self, new: Mapping[str, Mapping[str, TableRow] | None] | None = None) -> None:
        """Make the tables anew for those that run now."""
        known = {job.name: self.tables.rows(job.name) for job in self.running}
        self.tables = tables_for(
            self.model, {**known, **{n: r for n, r in (new or {}).items() if n in known}}
        )

    def stop(self, name: str) -> None:
        """End a job now, with the values that it has.

        Raises:
            AdapterError: no job of that name runs.
        """
        if name not in self.jobs or not self.jobs[name].runs:
            raise AdapterError(f"there is no job {name!r} that runs")
        self._end(self.jobs[name], STOPPED)
        self._lay_out()

    def step(self) -> None:
        """One step of every job that runs."""
        start, jobs = time.perf_counter(), self.running
        rows = [(job, at) for job in jobs for at in job.order.at(job.progress.step)]
        own = self.forward.figures["own"]
        mine = ((job.name, job.dataset[at]) for job, at in self.processes.share(rows))
        what = f"a step of {', '.join(f'{job.name} ({job.progress.step})' for job in jobs)}"
        losses = gradients(self.forward, mine, self.tables, what)
        own = self.forward.figures["own"] - own
        norms = gradient_norms(self.tables, [job.name for job in jobs])
        fine = [
            job
            for job in jobs
            if math.isfinite(losses[job.name]) and math.isfinite(norms[job.name])
        ]
        settings = {job.name: job.settings for job in jobs}
        update(self.tables, settings, {job.name: job.progress.step for job in fine}, norms)
        seconds = time.perf_counter() - start
        for job in jobs:
            if job in fine:
                tokens = own * job.settings.batch_size // len(rows)
                job.progress.stepped(losses[job.name], tokens, seconds)
        self._after([job for job in jobs if job not in fine], rows=len(rows))
        self._seconds += time.perf_counter() - start

    def _after(self, diverged: list[Job], rows: int) -> None:
        """Evaluate those that are due, and end those that are done."""
        due = [job for job in self.running if job.is_due and job not in diverged]
        self._evaluate(due, max(rows, 32))
        before = len(self.running)
        for job in diverged:
            self._end(job, DIVERGED)
        for job in self.running:
            patience = job.settings.patience
            if patience and job.progress.waiting >= patience:
                self._end(job, STOPPED)
            elif job.progress.step == job.settings.steps:
                self._end(job, FINISHED)
        if len(self.running) < before:
            self._lay_out()

    def _evaluate(self, due: list[Job], rows: int) -> None:
        if not due:
            return
        with modes_kept(self.model):
            self.model.eval()
            found = evaluate(self.forward, due, self.tables, rows)
        for job in due:
            better = job.progress.evaluated(*found[job.name])
            if better and job.settings.patience:
                job.kept = {key: row["values"] for key, row in self.tables.rows(job.name).items()}

    def _end(self, job: Job, status: str) -> None:
        job.progress.status = status
        self.tables.write_back(self.model, [job.name])
        if job.kept is not None:
            fill(self.model, job.name, job.kept)
            job.kept = None

    def write_back(self) -> None:
        """Put the values of the jobs that run into their adapters, to be saved or served."""
        self.tables.write_back(self.model, [job.name for job in self.running])

    def save(self, folder: Path) -> None:
        """Write all there is to a state file, from which `train_many` goes on.

        In several processes all of them call this, and the first writes.

        Raises:
            CheckpointError: it cannot be written.
        """
        processes = self.processes
        states = processes.agree("saving", lambda: generator_states(self._device))
        if processes.is_first:
            processes.agree("writing", lambda: write_state(folder, self._state(states)))
        else:
            processes.agree("writing", lambda: None)

    def _state(self, generators: Sequence[dict[str, Tensor]]) -> State:
        there = bank_of(self.model).adapters
        ended = tables_for(
            self.model, {n: None for n, j in self.jobs.items() if not j.runs and n in there}
        )
        jobs = dict(self._saved)
        for name, job in self.jobs.items():
            rows = self.tables.rows(name) if job.runs else _values_of(ended, name)
            jobs[name] = Saved(job.fingerprint, job.progress, rows, _dict(job.kept))
        figures = {"seconds": self._seconds, **self.forward.figures}
        return State(jobs, figures, by_rank(generators))

    def resume(self, folder: Path) -> None:
        """Take over what a folder has, before jobs are added; nothing if it has no state.

        In several processes the first reads it for all.

        Raises:
            CheckpointError: the state cannot be read.
        """
        first = self.processes.is_first
        found = self.processes.agree("reading", lambda: read_state(folder) if first else None)
        if (state := found[0]) is not None:
            self._saved = state.jobs
            self._seconds = state.figures.pop("seconds")
            self.forward.figures.update(state.figures)
            restore_generators(of_rank(state.generators, self.processes.rank), self._device)

    def check_complete(self) -> None:
        """Refuse a call that forgets jobs which the state has, unless later steps may add them.

        Raises:
            CheckpointError: the state has further jobs.
        """
        check_none_left(self._saved)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _values_of(tables: Tables, name: str) -> dict[str, TableRow]:
    return {key: {"values": row["values"]} for key, row in tables.rows(name).items()}


def _dict(kept: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    return None if kept is None else dict(kept)
