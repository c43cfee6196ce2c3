"""One job of many: what it is, and how far it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from vera_fx.bank.bank import bank_of
from vera_fx.base.targets import with_default_targets
from vera_fx.config import AdapterConfig
from vera_fx.errors import AdapterError, ConfigError
from vera_fx.model.adapt import adapt
from vera_fx.model.adapters import add_adapter
from vera_fx.model.model_class import is_adapted
from vera_fx.training.examples import Examples, Order
from vera_fx.training.settings import TrainSettings

RUNNING, FINISHED, STOPPED, DIVERGED = "running", "finished", "stopped early", "diverged"
_SMOOTH = 0.9


@dataclass(slots=True)
class Progress:
    """How far a job is: what a progress line shows, and what a state file keeps.

    Attributes:
        status: running, finished, stopped early or diverged.
        step: steps that were done.
        loss: training loss, averaged over some ten steps; None before the first.
        held_out: loss on held-out examples at the last evaluation.
        accuracy: share of right answers there, where the loss is one of classes.
        best: lowest held-out loss so far.
        waiting: evaluations since then.
        tokens: tokens of its examples, without padding.
        seconds: of the steps that it took part in.
    """

    status: str = RUNNING
    step: int = 0
    loss: float | None = None
    held_out: float | None = None
    accuracy: float | None = None
    best: float | None = None
    waiting: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def stepped(self, loss: float, tokens: int, seconds: float) -> None:
        """Note a step."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.loss = loss if self.loss is None else _SMOOTH * self.loss + (1 - _SMOOTH) * loss

    def evaluated(self, loss: float, accuracy: float | None) -> bool:
        """Note an evaluation; True if its loss is the lowest so far."""
        self.held_out, self.accuracy = loss, accuracy
        better = self.best is None or loss < self.best
        self.best = loss if better else self.best
        self.waiting = 0 if better else self.waiting + 1
        return better

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(slots=True)
class Job:
    """A job.

    Attributes:
        name: of the job and its adapter.
        config: of the adapter.
        dataset: what it is trained on.
        settings: how.
        held_out: what it is evaluated on; None for nothing.
        order: of the examples.
        progress: how far it is.
        kept: the best values so far, by the keys of tables, where it may stop early.
    """

    name: str
    config: AdapterConfig
    dataset: Examples
    settings: TrainSettings
    held_out: Examples | None
    order: Order
    progress: Progress = field(default_factory=Progress)
    kept: Mapping[str, Tensor] | None = None

    @property
    def runs(self) -> bool:
        """True until it has ended, one way or another."""
        return self.progress.status == RUNNING

    @property
    def is_due(self) -> bool:
        """True if it is to be evaluated after the step that was done last."""
        if self.held_out is None:
            return False
        every, step = self.settings.evaluate_every, self.progress.step
        return step == self.settings.steps or bool(every and step % every == 0)

    @property
    def fingerprint(self) -> str:
        """What a state file must have been made with to go on from it."""
        return f"{self.config!r} {self.settings!r} {len(self.dataset)} examples"


def adapter_for(model: nn.Module, name: str, config: AdapterConfig | None) -> AdapterConfig:
    """See that the model has an adapter of that name that can be trained; its configuration.

    Raises:
        AdapterError: it cannot be trained.
        ConfigError: there is no configuration, or it is another.
    """
    if not is_adapted(model) or name not in bank_of(model).adapters:
        if config is None:
            raise ConfigError(f"the model has no adapter {name!r}; give its configuration")
        if is_adapted(model):
            add_adapter(model, name, config)
        else:
            adapt(model, config, adapter_name=name)
    adapter = bank_of(model).adapter(name)
    if config is not None and with_default_targets(model, config) != adapter.config:
        raise ConfigError(
            f"the adapter {name!r} exists with {adapter.config!r}, which is not {config!r}; give None to "
            "train it further, or another name"
        )
    if not adapter.trainable or adapter.kind.not_mixed:
        why = adapter.kind.not_mixed or "it was made for inference (vera_fx.set_trainable)"
        raise AdapterError(f"adapter {name!r} cannot train beside others: {why}")
    return adapter.config
