"""The adapter bank: the module that owns the projections and all adapters of a model.

It hangs on the model as ``model.vera``. Graphs never read an adapter directly: they read *slots*,
plain holders outside of ``state_dict`` that `AdapterBank.bind` points at the active adapters'
tensors. Switching adapters rebinds the slots, so that no graph changes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from vera_fx.adapter import Adapter
from vera_fx.passes import AdaptationPlan, Branch, Redirect, Target
from vera_fx.projections import Projections
from vera_fx.targets import BANK

Structure = tuple[Any, ...]
"""What of the active adapters shapes the adapted graph; all else about them is data."""


class Slot:
    """The tensors of one active adapter as graphs read them; `AdapterBank.bind` sets them."""


class AdapterBank(nn.Module):
    """Owns projections and adapters, and tells graphs which of them are active.

    Attributes:
        projections: `Projections` by key.
        adapters: `Adapter` by name.
        targets: the union of all adapters' targets, by path.
        active: names of the active adapters, in order; their branches add up.
        merged: names of the adapters that are folded into the base weights.
        enabled: False inside ``disable_adapters``.
        kept_bases: base weights as they were before a merge that keeps them, by adapter.
        thawed: paths of the base parameters that trained before the model was adapted.
        structure: what of the current state shapes graphs; empty for the plain base.
    """

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleDict()
        self.adapters = nn.ModuleDict()
        self.targets: dict[str, Target] = {}
        self.base_paths: dict[tuple[str, str], tuple[str, ...]] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.enabled = True
        self.structure: Structure = ()
        self.kept_bases: dict[str, dict[int, Tensor]] = {}
        self.thawed: tuple[str, ...] = ()
        self._names: dict[tuple[str, str], str] = {}
        self.register_load_state_dict_post_hook(_rebind)

    def adapter(self, name: str) -> Adapter:
        """The adapter called ``name``, which must exist."""
        return cast("Adapter", self.adapters[name])

    def projections_of(self, adapter: Adapter) -> Projections:
        """The projections that ``adapter`` was trained with."""
        return cast("Projections", self.projections[adapter.projections])

    def share_projections(self, vera_A: Tensor, vera_B: Tensor, *, persistent: bool) -> str:
        """Keep the projections once: the key of bit-equal ones, or of these, newly added."""
        for key, module in self.projections.items():
            known = cast("Projections", module)
            # Of one dtype, too: a graph multiplies A with what has the dtype of the vectors.
            if known.vera_A.dtype == vera_A.dtype and known.equals(vera_A, vera_B):
                known.keep(persistent=persistent)
                return key
        key = str(max((int(key) for key in self.projections), default=-1) + 1)
        self.projections[key] = Projections(vera_A, vera_B, persistent=persistent)
        return key

    def insert(self, name: str, adapter: Adapter, targets: Mapping[str, Target]) -> None:
        """Add an adapter, inactive. Its targets join the union of targets."""
        self.adapters._modules[name] = adapter
        self.targets.update(targets)
        self._forget_mixtures()
        adapter.requires_grad_(False)

    def remove(self, name: str) -> None:
        """Drop an adapter, and its projections if no other adapter uses them."""
        self._forget_mixtures()
        del self.adapters[name]
        used = {cast("Adapter", adapter).projections for adapter in self.adapters.values()}
        for key in [key for key in self.projections if key not in used]:
            del self.projections[key]
        self.activate(kept for kept in self.active if kept != name)

    def activate(self, names: Iterable[str]) -> None:
        """Make exactly these adapters active: they compute, and train if they are trainable."""
        before, self.active = self.active, tuple(names)
        # All others are frozen already: a switch costs the same however many there are.
        for name in {*before, *self.active} & self.adapters.keys():
            adapter = self.adapter(name)
            adapter.requires_grad_(name in self.active and adapter.trainable)
        self.bind()

    def adapted_paths(self) -> set[str]:
        """Paths, aliases included, of every module with vectors or trained copies in some adapter."""
        copies = {p for name in self.adapters for p in self.adapter(name).copies.by_path}
        return {path for target in self.targets.values() for path in target.paths} | copies

    def computing(self) -> tuple[str, ...]:
        """Names of the adapters whose branches graphs compute now."""
        if not self.enabled:
            return ()
        return tuple(name for name in self.active if name not in self.merged)

    def bind(self) -> None:
        """Point the slots at the tensors of the computing adapters and refresh `structure`."""
        names = self.computing()
        for index, name in enumerate(names):
            self._fill(self._slot(index), self.adapter(name))
        self.structure = tuple(self._layout(self.adapter(name)) for name in names)
        if names:
            self.structure = (len(self.targets), *self.structure)

    def _slot(self, index: int) -> Slot:
        # Kept in __dict__, not as a submodule: slots are views and must not reach state_dict.
        return cast("Slot", self.__dict__.setdefault(f"slot{index}", Slot()))

    def padded(self, key: str) -> tuple[Tensor, Tensor]:
        """Projections as graphs read them: large enough for every target of the bank."""
        max_in = max(target.in_features for target in self.targets.values())
        max_out = max(target.out_features for target in self.targets.values())
        return cast("Projections", self.projections[key]).padded(max_in, max_out)

    def _fill(self, slot: Slot, adapter: Adapter) -> None:
        vera_A, vera_B = self.padded(adapter.projections)
        values: dict[str, Tensor] = {"vera_A": vera_A, "vera_B": vera_B}
        for path, target in self.targets.items():
            lambda_d, lambda_b = self._vectors(adapter, target)
            values[self._name(path, "lambda_d")] = lambda_d
            values[self._name(path, "lambda_b")] = lambda_b
        for path, name, tensor in adapter.copied_tensors():
            values[self._name(path, name)] = tensor
        slot.__dict__.clear()
        slot.__dict__.update(values)

    def slot_tensors(self, adapter: Adapter) -> Iterator[tuple[str, str, str, Tensor]]:
        """``(slot attribute, module path, name, tensor)`` of all that ``adapter`` itself owns."""
        for path in adapter.vectors.by_path:
            vectors = adapter.vectors_at(path)
            if vectors is not None:
                yield self._name(path, "lambda_d"), path, "lambda_d", vectors.vera_lambda_d
                yield self._name(path, "lambda_b"), path, "lambda_b", vectors.vera_lambda_b
        for path, name, tensor in adapter.copied_tensors():
            yield self._name(path, name), path, name, tensor

    def _name(self, path: str, name: str) -> str:
        """A slot's attribute for tensor ``name`` of the module at ``path``: an identifier."""
        if (path, name) not in self._names:
            attribute = f"{path}.{name}".replace(".", "__")
            while attribute in self._names.values():
                attribute += "_"
            self._names[path, name] = attribute
        return self._names[path, name]

    def _vectors(self, adapter: Adapter, target: Target) -> tuple[Tensor, Tensor]:
        """The adapter's vectors for ``target``; zeros, which add nothing, if it has none."""
        found = adapter.vectors_at(target.path)
        if found is not None:
            return found.vera_lambda_d, found.vera_lambda_b
        like = self.projections_of(adapter).vera_A
        return like.new_zeros(like.shape[0]), like.new_zeros(target.out_features)

    def _layout(self, adapter: Adapter) -> Structure:
        copies = tuple(
            (path, name, path in adapter.frozen) for path, name, _ in adapter.copied_tensors()
        )
        dtypes = tuple(sorted({str(p.dtype) for p in adapter.vectors.parameters()}))
        return adapter.config.vera_dropout, copies, dtypes

    def plan(self, is_training: Callable[[str], bool]) -> AdaptationPlan:
        """What the adapting passes need to know of the computing adapters.

        Args:
            is_training: tells for a target's path whether its module is in train mode, in which
                its branches drop elements of their input.
        """
        adapters = [self.adapter(name) for name in self.computing()]
        targets = tuple(self.targets.values())
        branches = tuple(
            tuple(
                self._branch(index, target.path, dropout=adapter.config.vera_dropout * train)
                for index, adapter in enumerate(adapters)
            )
            for target in targets
            for train in [is_training(target.path)]
        )
        redirects = tuple(
            Redirect(path, bases, slot_path(index, self._name(path, name)))
            for index, adapter in enumerate(adapters)
            for path, name, _ in adapter.copied_tensors()
            for bases in self._uses(adapter, path, name)
        )
        return AdaptationPlan(targets, branches, redirects)

    def _uses(self, adapter: Adapter, path: str, name: str) -> list[tuple[str, ...]]:
        """The paths of a base tensor whose reads a copy replaces.

        A tied tensor is replaced inside of the copy's module only; by a frozen copy everywhere.
        """
        bases = self.base_paths[path, name]
        return [(base,) for base in bases] if path in adapter.frozen else [bases]

    def _branch(self, index: int, path: str, *, dropout: float) -> Branch:
        return Branch(
            vera_A=slot_path(index, "vera_A"),
            vera_B=slot_path(index, "vera_B"),
            lambda_d=slot_path(index, self._name(path, "lambda_d")),
            lambda_b=slot_path(index, self._name(path, "lambda_b")),
            dropout=dropout,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterBank":
        """Move or cast, as ``model.to(...)`` does, and point the slots at the new tensors."""
        super()._apply(fn, recurse)
        self._forget_mixtures()
        self.bind()
        return self

    def _forget_mixtures(self) -> None:
        """Let the next batch that mixes adapters lay them out anew (`vera_fx.mixed.Mixer`)."""
        self.__dict__.pop("mixer", None)

    def extra_repr(self) -> str:
        """State for ``print(model)``."""
        state = "" if self.enabled else ", disabled"
        merged = f", merged={list(self.merged)}" if self.merged else ""
        return f"active={list(self.active)}, targets={len(self.targets)}{merged}{state}"


def _rebind(bank: nn.Module, _incompatible: object) -> None:
    """After ``load_state_dict``, which may have replaced tensors (``assign=True``)."""
    cast("AdapterBank", bank)._forget_mixtures()
    cast("AdapterBank", bank).bind()


def bank_of(model: nn.Module) -> AdapterBank:
    """The bank of an adapted model."""
    return cast("AdapterBank", model._modules[BANK])


def slot_path(index: int, attribute: str) -> str:
    """The path under which graphs read an attribute of a slot."""
    return f"{BANK}.slot{index}.{attribute}"
