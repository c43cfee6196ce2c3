"""The adapter bank: the module that owns the adapters of a model and says which of them are active.

It hangs on the model as ``model.vera``. Graphs read the active adapters through slots, which
`AdapterBank.bind` puts in place.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from vera_fx._torch_graphs import Unmarked
from vera_fx.bank.adapter import Adapter, Folded
from vera_fx.bank.projections import Projections, ProjectionSet
from vera_fx.bank.slot_table import SlotTable, alone
from vera_fx.bank.slots import open_ranks
from vera_fx.bank.structure import Bases, Structure
from vera_fx.base.modules import BANK, set_child
from vera_fx.errors import CheckpointError, listing
from vera_fx.passes import Target

MERGED = "merged"
"""Key, below the bank's, that says that adapters are merged into the weights of a state_dict."""

_DERIVED = re.compile(r"(slot|served)\d+|mixer|rows|store|owner")
"""What is put on a bank for graphs to read, and what others keep there: made of what it holds."""


class AdapterBank(Unmarked):
    """The registry of adapters. Three parts of it have jobs of their own.

    Attributes:
        projections: the shared tensors in use, by key.
        adapters: `Adapter` by name.
        shared: keeps equal projections once, and pads them for graphs.
        structure: what of the adapters shapes graphs.
        slots: what graphs read.
        active: names of the active adapters, in order; their branches add up.
        together: the adapters that train in the place of the active ones, each on its own rows.
        folded: the adapters that are merged, in order, and what takes them out of the base again.
        disabled: how many ``disable_adapters`` blocks are open, in all threads.
        resting: inside them, the adapters with parameters that required gradients, these, and whether
            the adapter was learning.
        owed: True in a copy made inside them, until its model has the merged adapters in its weights again.
        thawed: paths of the base parameters that trained before the model was adapted.
        unpacked: paths of the base's modules that are kept from packing their weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleDict()
        self.adapters = nn.ModuleDict()
        self.shared = ProjectionSet(self.projections)
        self.structure = Structure()
        self.slots = SlotTable(self)
        self.active: tuple[str, ...] = ()
        self.together: tuple[str, ...] = ()
        self.folded: dict[str, Folded] = {}
        self.disabled = 0
        self.resting: list[tuple[Adapter, list[str], bool]] = []
        self.owed = False
        self.thawed: tuple[str, ...] = ()
        self.unpacked: tuple[str, ...] = ()
        self.register_load_state_dict_post_hook(_rebind)

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are merged, though maybe not inside ``disable_adapters``."""
        return tuple(self.folded)

    @property
    def enabled(self) -> bool:
        """False inside ``disable_adapters``."""
        return not self.disabled

    def adapter(self, name: str) -> Adapter:
        """The adapter called ``name``, which must exist."""
        return cast("Adapter", self.adapters[name])

    def projections_of(self, adapter: Adapter) -> Projections:
        """The projections that ``adapter`` was trained with."""
        return self.shared.pair(adapter.projections)

    @alone
    def insert(
        self,
        name: str,
        adapter: Adapter,
        projections: Mapping[str, Tensor],
        targets: Mapping[str, Target],
        bases: Bases,
    ) -> None:
        """Add an adapter, inactive.

        Args:
            name: its name.
            adapter: the adapter.
            projections: the shared tensors that it was or will be trained with.
            targets: its targets by path.
            bases: what it has copies of.
        """
        persistent = adapter.config.saves_shared
        new = Projections(adapter.kind, adapter.config.r, projections, persistent=persistent)
        adapter.projections = self.shared.share(new, persistent=persistent)
        if (
            len(self.shared.ranks()) > 1
        ):  # before anything is compiled that a switch would compile anew
            open_ranks(self, "slot")
        set_child(self.adapters, name, adapter)
        self.structure.exact |= adapter.config.plan == "factored"
        if self.structure.grow(targets, bases):
            self.slots.forget()
        if self.structure.lay_out(adapter, targets):
            self._drop_retired()
        self._forget_derived()
        adapter.requires_grad_(False).train(self.training)

    @alone
    def remove(self, name: str) -> None:
        """Drop an adapter, and its projections if no other adapter uses them."""
        self._forget_derived()
        self.slots.forget_adapter(name)
        set_child(self.adapters, name, None)
        self.shared.retire({cast("Adapter", a).projections for a in self.adapters.values()})
        self.together = tuple(kept for kept in self.together if kept != name)
        self.activate(kept for kept in self.active if kept != name)

    @alone
    def activate(self, names: Iterable[str], together: Iterable[str] | None = None) -> None:
        """Make exactly these adapters active: they compute, and train if they are trainable.

        Args:
            names: the adapters.
            together: those that train instead, each on its own rows; None for the same as before.
        """
        before, self.active = (*self.active, *self.together), tuple(names)
        self.together = self.together if together is None else tuple(together)
        learning = self.together or self.active
        # All others are frozen already: a switch costs the same however many there are.
        for name in dict.fromkeys((*before, *self.active, *self.together)):
            if name in self.adapters:
                self.adapter(name).let_train(allowed=name in learning, now=self.enabled)
        self.bind()

    def computing(self) -> tuple[str, ...]:
        """Names of the adapters whose branches graphs compute now."""
        if not self.enabled:
            return ()
        return tuple(name for name in self.active if name not in self.merged)

    def bind(self) -> None:
        """Put the slots of the computing adapters in place."""
        self.slots.bind()

    @alone
    def rebind(self) -> None:
        """Make all slots anew, from what the modules hold now."""
        self.slots.forget()
        self._forget_derived()
        for name in self.adapters:
            self.structure.follow_dtype(self.adapter(name))
        self.bind()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterBank":
        """Move or cast, as ``model.to(...)`` does, and point the slots at the new tensors."""
        super()._apply(fn, recurse)
        self._drop_retired()
        self.rebind()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Say in a ``state_dict()`` of the model if base weights in it have adapters merged in."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.folded and self.enabled:
            destination[f"{prefix}{MERGED}"] = torch.ones((), dtype=torch.bool)

    def _forget_derived(self) -> None:
        """Let the next batch that mixes adapters lay them out anew (`vera_fx.mixing.mixer`)."""
        self.__dict__.pop("mixer", None)

    def _drop_retired(self) -> None:
        for key in self.shared.retired:
            del self.structure.groups[key]
        self.shared.retired.clear()

    def extra_repr(self) -> str:
        """State for ``print(model)``."""
        state = f", merged={list(self.merged)}" if self.merged else ""
        state += "" if self.enabled else ", disabled"
        return f"active={list(self.active)}, targets={len(self.structure.targets)}{state}"

    def __getstate__(self) -> dict[str, Any]:
        return {n: value for n, value in self.__dict__.items() if not _DERIVED.fullmatch(n)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"together": (), "unpacked": (), "owed": False} | state)
        if "structure" not in state:
            _take_over(self, state)
        if self.disabled:  # the blocks are the original's: nobody would end them for a copy
            self.disabled, self.owed = 0, True
            wake(self)


def rest(bank: AdapterBank) -> None:
    """Let nothing require gradients; `wake` gives back who did."""
    for name in bank.adapters:
        adapter = bank.adapter(name)
        if adapter.learning or name in bank.active:
            named = [(n, p) for n, p in adapter.named_parameters() if p.requires_grad]
            bank.resting.append((adapter, [n for n, _ in named], adapter.learning))
            for _, parameter in named:
                parameter.requires_grad = False


def wake(bank: AdapterBank) -> None:
    """Let those require gradients that did; after a switch, those of the adapters active now."""
    resting, bank.resting = bank.resting, []
    for name in bank.adapters:
        adapter = bank.adapter(name)
        before = [(names, learnt) for other, names, learnt in resting if other is adapter]
        # One that never learns may have parameters that somebody thawed by hand.
        if before and (adapter.learning or (name in bank.active and not before[0][1])):
            for parameter in before[0][0]:
                adapter.get_parameter(parameter).requires_grad = True
        elif adapter.learning:
            adapter.let_train(allowed=True)


def check_loading(bank: AdapterBank, state: Iterable[str], prefix: str) -> None:
    """Refuse a ``load_state_dict`` of the model that would leave a branch twice or not at all.

    Args:
        bank: of the model.
        state: the keys.
        prefix: of the model's own keys among them.

    Raises:
        CheckpointError: base weights with adapters merged in, there or here.
    """
    if f"{prefix}{BANK}.{MERGED}" in state:
        raise CheckpointError(
            "this state_dict is of a model whose adapters were merged into its base weights, and an "
            "adapted model would add their branches once more; take the state_dict after "
            "vera_fx.unmerge(model), or load merged weights without adapters "
            "(vera_fx.unload(model, merge=True))"
        )
    if bank.folded and bank.enabled and any(key.startswith(prefix) for key in state):
        raise CheckpointError(
            f"{listing(bank.folded)} is merged into this model's base weights, which load_state_dict "
            "would replace; call vera_fx.unmerge(model) first"
        )


def _take_over(bank: AdapterBank, state: Mapping[str, Any]) -> None:
    """Make the parts that version 0.1, which pickled the bank, had as attributes of it."""
    if state["merged"]:
        raise CheckpointError(
            f"this model was pickled by version 0.1 with {listing(state['merged'])} merged into its base, "
            "and does not say what the base was; load it there, unmerge it and pickle it again"
        )
    for name in set(state) - set(AdapterBank().__dict__):
        del bank.__dict__[name]
    bank.folded, bank.disabled, bank.resting = {}, 0, []
    bank.shared = ProjectionSet(bank.projections)
    bank.structure = Structure.restored(state)
    bank.slots = SlotTable(bank, stale=True)
    for name in bank.adapters:
        adapter = bank.adapter(name)
        adapter.learning = adapter.trainable and name in bank.active
        targets = {path: bank.structure.targets[path] for path in adapter.vectors.by_path}
        bank.structure.lay_out(adapter, targets)


def _rebind(bank: nn.Module, _incompatible: object) -> None:
    """After ``load_state_dict``, which may have replaced tensors (``assign=True``)."""
    cast("AdapterBank", bank).rebind()


def adapted_paths(bank: AdapterBank) -> set[str]:
    """Paths, aliases included, of every module with vectors or trained copies in some adapter."""
    copies = {p for name in bank.adapters for p in bank.adapter(name).copies.by_path}
    return {path for t in bank.structure.targets.values() for path in t.paths} | copies


def bank_of(model: nn.Module) -> AdapterBank:
    """The bank of an adapted model."""
    bank = model._modules.get(BANK)
    # Containers of modules keep it beside their elements.
    return cast("AdapterBank", model.__dict__[BANK] if bank is None else bank)
