"""Several adapters on one base: add, delete, switch, disable, count."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from vera_fx._renamed import renamed
from vera_fx._torch import normal_tensors
from vera_fx.bank.bank import AdapterBank, rest, wake
from vera_fx.bank.blueprint import blueprint
from vera_fx.bank.build import build_adapter, draw, install
from vera_fx.bank.names import check_known, check_name
from vera_fx.base.sharding import at_rest
from vera_fx.base.targets import resolve_targets
from vera_fx.config import AdapterConfig
from vera_fx.errors import AdapterError, listing
from vera_fx.folding.mergeable import check_compatible
from vera_fx.folding.merging import resume, suspend, unmerge
from vera_fx.graphs.runtime import require_adapted
from vera_fx.model.adapt import checked_config
from vera_fx.processes.wrapped import unwrapped


@renamed(name="adapter_name")
def add_adapter(
    model: nn.Module,
    adapter_name: str,
    config: AdapterConfig | None = None,
    *,
    autocast_adapter_dtype: bool = True,
) -> None:
    """Add another adapter, not active yet. It may differ in rank, seed and targets.

    Args:
        model: an adapted model.
        adapter_name: the new adapter's name.
        config: its configuration; None for that of the first adapter.
        autocast_adapter_dtype: keep the vectors of half-precision models in float32, as PEFT does.

    Raises:
        AdapterError: the name cannot be used, there is no configuration to take over, or the
            adapter would start from copies of base modules while others are merged into the base.
        TargetError: the targets do not fit the model.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    at_rest(model)
    with bank.slots.lock:
        check_name(adapter_name, bank.adapters)
        config = config or _first_config(bank)
        config = checked_config(config)
        targets = resolve_targets(model, config)
        plan = blueprint(model, config, targets, autocast=autocast_adapter_dtype)
        if bank.merged and (plan.saved or plan.biases):
            raise AdapterError(
                f"adapter {adapter_name!r} would start from copies of {listing([*plan.saved, *plan.biases])}, and "
                f"{listing(bank.merged)} is merged into the base; unmerge the model before adding it"
            )
        with normal_tensors():
            adapter = build_adapter(model, plan, trainable=not config.inference_mode)
            install(model, bank, adapter_name, adapter, draw(plan), plan.targets)
        bank.bind()


def _first_config(bank: AdapterBank) -> AdapterConfig:
    for name in bank.adapters:
        return bank.adapter(name).config
    raise AdapterError(
        "the model has no adapter left whose configuration could be reused; give one"
    )


@renamed(name="adapter_name")
def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter. If it was active, the others that are active stay so.

    None takes its place: without another active adapter the model computes its plain base, and a
    warning says so where there are others to choose from.

    Raises:
        AdapterError: there is no such adapter, or it is merged.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    at_rest(model)
    with bank.slots.lock:
        check_known(adapter_name, bank.adapters)
        if adapter_name in bank.merged:
            raise AdapterError(
                f"adapter {adapter_name!r} is merged into the base; unmerge the model before deleting it"
            )
        was_active = bank.active
        bank.remove(adapter_name)
        if was_active == (adapter_name,) and bank.adapters:
            warnings.warn(
                f"Adapter {adapter_name!r} was active which is now deleted. No adapter is active now, so the model "
                f"computes its plain base; choose one of {listing(bank.adapters)} with set_adapter.",
                stacklevel=3,
            )


@renamed(names="adapter_names")
def set_adapter(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Make one adapter active, or several whose branches add up.

    Only active adapters train, and of those only the ones that were not loaded for inference.

    Raises:
        AdapterError: an unknown name, or two adapters that each bring their own copy of one module.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    at_rest(model)
    wanted = (
        (adapter_names,) if isinstance(adapter_names, str) else tuple(dict.fromkeys(adapter_names))
    )
    with bank.slots.lock:
        for name in wanted:
            check_known(name, bank.adapters)
        check_compatible(bank, wanted)
        if bank.merged:
            warnings.warn(
                "Adapter cannot be set when the model is merged. Unmerging the model first.",
                stacklevel=3,
            )
            unmerge(model)
        bank.activate(wanted, together=())


def train_adapters(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Let several adapters train at once, each on the rows that ``adapter_names`` gives it.

    Which adapters are active, and serve calls without ``adapter_names``, stays. These train instead
    of the active ones until `set_adapter` chooses again. Make optimisers after this.

    Args:
        model: an adapted model.
        adapter_names: exactly those that are to train.

    Raises:
        AdapterError: an unknown name, none at all, or an adapter that may not train (`set_trainable`);
            nothing is changed then.
    """
    bank = require_adapted(model)
    if isinstance(adapter_names, str) or not adapter_names:
        raise AdapterError(f"train_adapters needs a list of adapters' names, got {adapter_names!r}")
    with bank.slots.lock:
        for name in adapter_names:
            check_known(name, bank.adapters)
            if not bank.adapter(name).trainable:
                raise AdapterError(
                    f"adapter {name!r} was made for inference and does not train; call "
                    f"vera_fx.set_trainable(model, {name!r}) first"
                )
        bank.activate(bank.active, together=dict.fromkeys(adapter_names))


@renamed(names="adapter_names")
def set_trainable(
    model: nn.Module, adapter_names: str | Sequence[str], *, trainable: bool = True
) -> None:
    """Let adapters train, or freeze them, whatever they were made for.

    One that may train does so while it is active; one that may not stays frozen through every
    switch. Optimisers must be made after this, as they hold the parameters that train.

    Args:
        model: an adapted model.
        adapter_names: one adapter or several.
        trainable: False to freeze them.

    Raises:
        AdapterError: an unknown name; nothing is changed then.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    at_rest(model)
    chosen = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
    with bank.slots.lock:
        for name in chosen:
            check_known(name, bank.adapters)
        for name in chosen:
            adapter = bank.adapter(name)
            adapter.let_train(allowed=False)
            adapter.trainable = trainable
        bank.activate(bank.active)


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters; empty inside `disable_adapters`."""
    model = unwrapped(model)
    bank = require_adapted(model)
    return list(bank.active) if bank.enabled else []


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters, in the order they were added."""
    return list(require_adapted(unwrapped(model)).adapters)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block the model is its plain base; may be nested, and used by several threads.

    It is so for the whole model, whichever thread calls it, until the last block ends. Vectors and
    copies require no gradients inside. Merged adapters are taken out of the weights for the block and
    merged again after it; inside, adapters may be set, added and deleted, but not merged.

    A deepcopy or a pickle made inside the block is of the model as it is outside of it: adapters are on,
    as nobody would end the block for a copy.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    _disable(model, bank)
    try:
        yield
    finally:
        _enable(model, bank)


def _disable(model: nn.Module, bank: AdapterBank) -> None:
    at_rest(model)
    with bank.slots.lock:
        if not bank.disabled:
            suspend(model, bank)
            rest(bank)
        bank.disabled += 1
        bank.bind()


def _enable(model: nn.Module, bank: AdapterBank) -> None:
    at_rest(model)
    with bank.slots.lock:
        bank.disabled -= 1
        if not bank.disabled:
            wake(bank)
            resume(model, bank)
        bank.bind()


@dataclass(frozen=True, slots=True)
class ParameterSummary:
    """Counts of parameters; ``str()`` is PEFT's line.

    Attributes:
        trainable: parameters that train now.
        total: all parameters of the model and its adapters (the projections are no parameters).
    """

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return (
            f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || "
            f"trainable%: {share:.4f}"
        )


def parameter_summary(model: nn.Module) -> ParameterSummary:
    """Count trainable and all parameters."""
    parameters = list(model.parameters())
    return ParameterSummary(
        sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
    )
