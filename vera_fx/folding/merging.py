"""Fold adapters into the base weights and take them out again."""

import warnings
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from vera_fx._renamed import renamed
from vera_fx.bank.adapter import Adapter, Folded
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.build import attribute_of
from vera_fx.bank.names import check_known
from vera_fx.base.sharding import at_rest, cut, local_part
from vera_fx.errors import AdapterError
from vera_fx.folding.mergeable import (
    Change,
    changed,
    check_compatible,
    check_mergeable,
    check_seen,
    check_ties,
    check_together,
    deltas,
)
from vera_fx.folding.requantising import check_coarse, is_called, put_back, rewrite, tell_loss
from vera_fx.graphs.runtime import require_adapted
from vera_fx.processes.wrapped import unwrapped


@renamed(names="adapter_names")
def merge(
    model: nn.Module,
    adapter_names: Sequence[str] | str | None = None,
    *,
    safe: bool = True,
    keep_base: bool = False,
    requantise: bool = False,
) -> None:
    """Add ``diag(b) B diag(d) A`` of each adapter to its targets' weights, in place.

    Afterwards calls run the plain base graph, at the base's speed; active adapters that were not
    merged go on computing their branches beside it.

    Args:
        model: an adapted model.
        adapter_names: adapters to merge; None for the active ones.
        safe: refuse to merge if a result has NaN or infinity, before any weight is changed.
        keep_base: keep a copy of the weights, so that `unmerge` restores them bit for bit, not to rounding.
        requantise: merge into weights of 4 bits as well, whose rounding may be larger than what the
            adapter adds. Quantised weights are read, added to and quantised again, as in PEFT; unlike
            there `unmerge` gives back the very weights that were.

    Raises:
        AdapterError: an unknown name, a weight that cannot be merged, or values that are not finite.

    Warns:
        RequantisedWarning: weights were quantised again, with how much of the change that lost.
    """
    bank = require_adapted(model := unwrapped(model))
    with bank.slots.lock:
        at_rest(model, everything=True)
        check_enabled(bank)
        todo = _to_merge(bank, adapter_names)
        check_mergeable(model, bank, todo, safe=safe)
        check_coarse(model, bank, todo, asked=requantise)
        _check_bank(bank, todo)
        _fold_all(model, bank, todo, keep_base=keep_base)


def _check_bank(bank: AdapterBank, todo: Sequence[str]) -> None:
    check_ties(bank, todo)
    check_together(bank, todo)
    check_compatible(bank, [*bank.merged, *todo], "be merged")
    check_seen(bank, [*bank.merged, *todo])


def _fold_all(
    model: nn.Module, bank: AdapterBank, names: Sequence[str], *, keep_base: bool
) -> None:
    for name in names:
        # What depends on the weight cannot be subtracted again.
        exact = keep_base or not bank.adapter(name).kind.maths.adds_up
        bank.folded[name] = _fold(model, bank, name, exact=exact)
        tell_loss(model, bank, name)
    bank.bind()


def unmerge(model: nn.Module) -> None:
    """Take every merged adapter out of the base weights again, last merged first.

    What is taken out is what was folded in, whatever has become of the adapter's vectors since.

    Raises:
        AdapterError: the model is not adapted.
    """
    model = unwrapped(model)
    bank = require_adapted(model)
    with bank.slots.lock:
        at_rest(model, everything=True)
        if bank.enabled:  # otherwise they are out already
            suspend(model, bank)
        bank.folded.clear()
        bank.bind()


def suspend(model: nn.Module, bank: AdapterBank) -> None:
    """Take the merged adapters out of the weights, and remember that they are merged."""
    for name, folded in reversed(bank.folded.items()):
        _unfold(model, bank, bank.adapter(name), folded)


def resume(model: nn.Module, bank: AdapterBank) -> None:
    """Fold the adapters in again that `suspend` took out."""
    suspended, bank.folded = bank.folded, {}
    for name, folded in suspended.items():
        bank.folded[name] = _fold(model, bank, name, exact=folded.exact)


def check_enabled(bank: AdapterBank) -> None:
    """Refuse to merge while all adapters are off.

    Raises:
        AdapterError: inside ``disable_adapters``.
    """
    if not bank.enabled:
        raise AdapterError(
            "adapters cannot be merged inside disable_adapters, where the model is its plain base; merge "
            "before or after the block"
        )


def _to_merge(bank: AdapterBank, names: Sequence[str] | str | None) -> list[str]:
    wanted = bank.active if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        check_known(name, bank.adapters)
    todo = [name for name in dict.fromkeys(wanted) if name not in bank.merged]
    if wanted and not todo:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=4)
    return todo


def _fold(model: nn.Module, bank: AdapterBank, name: str, *, exact: bool) -> Folded:
    """Change the base's tensors to what they are with the adapter, beside those that are folded."""
    adapter = bank.adapter(name)
    folded = Folded({path: _copied(adapter, path) for path in adapter.vectors.by_path}, exact=exact)
    if exact:
        folded.kept = {path: w.detach().clone() for path, w in changed(model, bank, adapter)}
    found = deltas(model, bank, adapter)
    _add({path: change for path, change in found.items() if not is_called(bank, path)})
    rewrite(model, {path: found[path] for path in found if is_called(bank, path)}, folded)
    replaced = set(_replace(model, adapter, folded))
    for other, before in bank.folded.items():
        # Their updates went with the tensors that this adapter has its own of.
        found = deltas(model, bank, bank.adapter(other), before.vectors)
        _add({path: found[path] for path in found if f"{path}.weight" in replaced})
    return folded


def _add(changes: Mapping[str, Change], *, sign: int = 1) -> None:
    for weight, delta in changes.values():
        local_part(weight.data).add_(cut(delta(), weight).to(weight.device), alpha=sign)


def _replace(model: nn.Module, adapter: Adapter, folded: Folded) -> Iterator[str]:
    """Put the adapter's copies in the place of the base's tensors; the paths of these."""
    seen = set[int]()
    for path, name, copy in adapter.copied_tensors():
        base = attribute_of(model.get_submodule(path), name)
        if id(base) not in seen:  # tied, with equal frozen copies
            seen.add(id(base))
            folded.kept[f"{path}.{name}"] = base.detach().clone()
            base.data.copy_(copy.data)
            yield f"{path}.{name}"


def _copied(adapter: Adapter, path: str) -> dict[str, Tensor]:
    vectors = adapter.vectors_at(path)
    found = {} if vectors is None else vectors.tensors
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _unfold(model: nn.Module, bank: AdapterBank, adapter: Adapter, folded: Folded) -> None:
    """Give the base's tensors back what they were."""
    if folded.exact:
        for path, weight in changed(model, bank, adapter):
            weight.data.copy_(folded.kept[path])
    else:
        found = deltas(model, bank, adapter, folded.vectors)
        _add({path: found[path] for path in found if not is_called(bank, path)}, sign=-1)
    put_back(model, folded)
    for path, name, _ in adapter.copied_tensors():
        held = folded.kept.get(f"{path}.{name}")
        if held is not None:
            attribute_of(model.get_submodule(path), name).data.copy_(held)
