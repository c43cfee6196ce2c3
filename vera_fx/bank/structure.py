"""What of a bank's adapters shapes graphs: targets, tensors that have copies, layouts of rows."""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter, is_everywhere
from vera_fx.bank.packed import Group
from vera_fx.passes import ReadWeight, Redirect, Target, resolve

Base = tuple[tuple[str, ...], nn.Module]
"""The paths under which a tensor of the base is read, and the module that it belongs to."""

_FIELDS = fields(Target)

Bases = Mapping[tuple[str, str], Base]
"""`Base` for each ``(module path, tensor name)`` that an adapter has a copy of."""


class Structure:
    """The union of what adapters have or had. All else about them is data, which graphs read.

    Attributes:
        targets: all targets by path.
        base_paths: ``(module path, tensor name)`` of every tensor that has a copy -> the paths under
            which the base's own is read.
        homes: the base's modules that these tensors belong to, by path.
        groups: for each set of projections, how mixtures lay out what their adapters have.
        exact: some adapter asks or asked for the plan ``"factored"``, PEFT's order of operations.
    """

    def __init__(self) -> None:
        self.targets: dict[str, Target] = {}
        self.base_paths: dict[tuple[str, str], tuple[str, ...]] = {}
        self.homes: dict[str, nn.Module] = {}
        self.groups: dict[str, Group] = {}
        self.exact = False
        self._numbers: dict[Hashable, int] = {}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Structure":
        """From what version 0.1 pickled as attributes of the bank; groups are laid out anew."""
        made = cls()
        made.base_paths, made.homes = dict(state["base_paths"]), dict(state["homes"])
        made.exact = state["exact"]
        for path, target in state["targets"].items():
            # Fields that are newer than the file have their defaults.
            known = {f.name: getattr(target, f.name) for f in _FIELDS if hasattr(target, f.name)}
            made.targets[path] = Target(**{**known, "product": ReadWeight(target.product)})
        return made

    def grow(self, targets: Mapping[str, Target], bases: Bases) -> bool:
        """Take in an adapter's targets and copies; True if there are new ones."""
        sizes = len(self.targets), len(self.base_paths)
        self.targets.update(targets)
        paths = self.base_paths | {place: paths for place, (paths, _) in bases.items()}
        # Reads inside of a copy's module first: what stands for every read takes the rest.
        self.base_paths = dict(sorted(paths.items(), key=lambda item: is_everywhere(item[0][0])))
        self.homes.update((path, home) for (path, _), (_, home) in bases.items())
        return sizes != (len(self.targets), len(self.base_paths))

    def follow(self, targets: Mapping[str, Target], bases: Bases) -> bool:
        """Take what the model has now in the place of what it had; True if that differs."""
        before = self.targets, self.base_paths, self.homes
        self.targets = dict(targets)
        self.base_paths = {place: bases[place][0] for place in bases}
        self.homes = {place[0]: bases[place][1] for place in bases}
        return before != (self.targets, self.base_paths, self.homes)

    def lay_out(self, adapter: Adapter, targets: Mapping[str, Target]) -> bool:
        """Make room for an adapter in the rows of its group; True if that changed them."""
        key = adapter.projections
        known = self.groups.get(key)
        group = known or Group(
            key, adapter.config.r, dtype_of(adapter), kind_name=adapter.kind.name
        )
        self.groups[key] = group.reaching(targets)
        return self.groups[key] is not known

    def follow_dtype(self, adapter: Adapter) -> None:
        """Note that an adapter was cast."""
        group = self.groups[adapter.projections]
        self.groups[group.key] = replace(group, dtype=dtype_of(adapter))

    def number(self, structure: Hashable) -> int:
        """A small number for what shapes graphs, the same for the same: cheap as part of a key."""
        return self._numbers.setdefault(structure, len(self._numbers) + 1)

    def bases(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """The place and the base's own tensor of everything that has copies."""
        for path, name in self.base_paths:
            yield (path, name), resolve(self.homes[path], name)

    def redirect(self, place: tuple[str, str], copy: str) -> Redirect:
        """Let graphs read ``copy`` for the base's tensor at ``place``, a key of `base_paths`."""
        path = place[0]
        return Redirect("" if is_everywhere(path) else path, self.base_paths[place], copy)


def dtype_of(adapter: Adapter) -> torch.dtype:
    """The dtype of an adapter's vectors."""
    return next(adapter.vectors.parameters()).dtype
