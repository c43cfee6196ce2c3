"""The shared frozen tensors of adapters, VeRA's A and B: each set is kept once."""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from vera_fx._torch import stamp
from vera_fx.base.modules import set_child
from vera_fx.branches.kinds import kind_named
from vera_fx.branches.protocol import BranchKind
from vera_fx.passes import Target


class Projections(nn.Module):
    """One set of shared tensors, for every adapter that was trained with them.

    The tensors are frozen buffers under the names that their kind gives them.

    Attributes:
        r: the rank.
        kind_name: the kind of branch that they are of.
    """

    # Version 0.1, whose pickles lack it, had one kind.
    kind_name = "VeRA"

    def __init__(
        self, kind: BranchKind, r: int, tensors: Mapping[str, Tensor], *, persistent: bool = True
    ) -> None:
        super().__init__()
        self.kind_name, self._r = kind.name, r
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=persistent)

    @property
    def kind(self) -> BranchKind:
        """The kind of branch that they are of."""
        return kind_named(self.kind_name)

    @property
    def r(self) -> int:
        """The rank."""
        known = self.__dict__.get("_r")
        if known is None:  # pickled by version 0.1
            dims = self.kind.parameters.shared
            known = next(t.shape[dims[n].index("r")] for n, t in self.tensors.items())
        return known

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return cast("dict[str, Tensor]", self._buffers)

    def keep(self, *, persistent: bool) -> None:
        """Let ``state_dict`` have them if this or any earlier owner asked for it."""
        if persistent:
            for name, value in self.tensors.items():
                self.register_buffer(name, value)

    def equals(self, tensors: Mapping[str, Tensor]) -> bool:
        """True if these are bit for bit the given tensors, and of the same dtypes.

        A graph multiplies them with what has the dtype of the vectors.
        """
        own = self.tensors
        return own.keys() == tensors.keys() and all(_same(own[n], tensors[n]) for n in own)

    def padded(self, max_in: int, max_out: int) -> dict[str, Tensor]:
        """The tensors with zeros up to the given sizes; themselves if large enough.

        Other adapters of a bank may have larger targets. There this adapter's vectors are zero.
        """
        sizes = self.kind.shared_sizes(self.r, max_in, max_out)
        return {name: _grown(tensor, sizes[name]) for name, tensor in self.tensors.items()}

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        return ", ".join(f"{name}={tuple(t.shape)}" for name, t in self.tensors.items())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a))


def _grown(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    missing = [max(size - own, 0) for size, own in zip(sizes, tensor.shape, strict=True)]
    if not any(missing):
        return tensor
    return nn.functional.pad(tensor, [n for size in reversed(missing) for n in (0, size)])


class ProjectionSet:
    """All projections of a bank, by key.

    Attributes:
        kept: those that adapters use; the bank's own ``projections``.
        retired: those that no adapter uses any more, in graphs of mixtures until the next graph is
            made, so that none is made for a deletion.
        alike: whether two of them are or were of one kind and rank, so that compiled code that takes
            the one takes the other as well.
    """

    def __init__(self, kept: nn.ModuleDict) -> None:
        self.kept, self.alike = kept, False
        self.retired: dict[str, Projections] = {}
        self._padded: dict[str, tuple[int, dict[str, Tensor]]] = {}
        self._cast: dict[str, tuple[dict[str, Tensor], torch.dtype, dict[str, Tensor]]] = {}

    def pair(self, key: str) -> Projections:
        """The projections ``key``, in use or retired."""
        return self.retired.get(key) or cast("Projections", self.kept[key])

    def items(self) -> Iterator[tuple[str, Projections]]:
        """Those in use."""
        yield from cast("dict[str, Projections]", self.kept._modules).items()

    def ranks(self) -> set[int]:
        """The ranks of those in use."""
        return {pair.r for _, pair in self.items()}

    def share(self, new: Projections, *, persistent: bool) -> str:
        """Keep the projections once: the key of equal ones, or of these, newly added."""
        known = {**dict(self.items()), **self.retired}
        unused = str(max(map(int, known), default=-1) + 1)
        alike = (k for k, p in known.items() if p.kind is new.kind and p.r == new.r)
        key = next((k for k in alike if known[k].equals(new.tensors)), unused)
        if key not in self.kept:
            self.retired.pop(key, None)
            set_child(self.kept, key, new)
        self.pair(key).keep(persistent=persistent)
        sizes = {(pair.kind_name, pair.r) for pair in known.values()}
        self.alike |= key not in known and (new.kind_name, new.r) in sizes
        return key

    def retire(self, used: set[str]) -> None:
        """Put aside those that no adapter uses."""
        for key in [key for key in self.kept if key not in used]:
            self.retired[key] = cast("Projections", self.kept[key])
            set_child(self.kept, key, None)
            self._padded.pop(key, None)
            self._cast.pop(key, None)

    def padded(
        self, key: str, targets: Mapping[str, Target], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Projections as graphs read them: large enough for every target, and of the vectors' dtype.

        That may differ from their own: FSDP2 gathers vectors in the dtype of its mixed precision.
        """
        found = self._large(key, targets)
        if dtype is None or all(tensor.dtype == dtype for tensor in found.values()):
            return found
        known = self._cast.get(key)
        if known is None or known[0] is not found or known[1] != dtype:
            cast_ = {name: tensor.to(dtype) for name, tensor in found.items()}
            known = self._cast[key] = found, dtype, cast_
        return known[2]

    def _large(self, key: str, targets: Mapping[str, Target]) -> dict[str, Tensor]:
        pair = self.pair(key)
        version, found = stamp([pair._buffers]), self._padded.get(key)
        if found is None or found[0] != version:
            max_in = max(target.in_features for target in targets.values())
            max_out = max(target.out_features for target in targets.values())
            found = self._padded[key] = version, pair.padded(max_in, max_out)
        return found[1]

    def forget_padded(self) -> None:
        """Let what graphs read be made anew."""
        self._padded.clear()
        self._cast.clear()
