"""One gathering of vectors for all tokens of a ``generate``, for as long as no vector changes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank, bank_of
from vera_fx.bank.names import BASE
from vera_fx.mixing.check import check_mixture, mixer_of
from vera_fx.mixing.gather import is_learning
from vera_fx.mixing.kept_names import Held
from vera_fx.mixing.mixer import Mix, Mixer


@dataclass(frozen=True, slots=True)
class Kept:
    """A mixture, and the state of everything that it was gathered from.

    Attributes:
        mix: the mixture.
        mixer: what made it; another one after adapters came or went.
        names: one per row.
        tensors: what was read, held so that no other tensor can take their place in memory.
        stamps: their versions and addresses then.
    """

    mix: Mix
    mixer: Mixer
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    stamps: tuple[tuple[int, int], ...]

    def still(self, mixer: Mixer, names: Sequence[str], tensors: Sequence[Tensor]) -> bool:
        """True if gathering again would give the same."""
        return (
            self.mixer is mixer
            and self.names == tuple(names)
            and len(self.tensors) == len(tensors)
            and all(a is b for a, b in zip(self.tensors, tensors, strict=True))
            and self.stamps == _stamps(tensors)
        )


def mix_again(model: nn.Module, names: Sequence[str], held: Held) -> Mix:
    """The mixture for a call inside of a ``generate``; the last one while nothing changed.

    Only a write through ``tensor.data``, which leaves no trace, in the middle of one ``generate``
    would go unnoticed; every ``generate`` starts by gathering.

    Raises:
        AdapterError: as `vera_fx.mixing.check.check_mixture`.
    """
    check_mixture(model, [name for name in names if name not in held.stored] or [BASE])
    bank, mixer = bank_of(model), mixer_of(model)
    wanted = tuple(names if bank.enabled else [BASE] * len(names))
    if is_learning(bank):  # a backward may follow, and frees what was gathered
        return mixer.mix(wanted, held.stored)
    tensors = tuple(_read_by(bank, mixer, wanted, held))
    kept: Kept | None = held.kept
    if kept is not None and kept.still(mixer, wanted, tensors):
        return kept.mix
    mix = mixer.mix(wanted, held.stored)
    if not any(tensor.is_inference() for tensor in tensors):  # those have no version
        held.kept = Kept(mix, mixer, wanted, tensors, _stamps(tensors))
    return mix


def _read_by(bank: AdapterBank, mixer: Mixer, names: Sequence[str], held: Held) -> Iterator[Tensor]:
    """Every tensor that may change and that gathering reads."""
    for name in dict.fromkeys(names):
        if name != BASE and name not in held.stored:
            yield from _own(bank.adapter(name))
    yield from (base for _, base in mixer.bases())


def _own(adapter: Adapter) -> Iterator[Tensor]:
    for vectors in adapter.vectors.by_path.values():
        yield from (p for p in vectors._parameters.values() if p is not None)
    yield from (tensor for _, _, tensor in adapter.copied_tensors())


def _stamps(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((tensor._version, tensor.data_ptr()) for tensor in tensors)
