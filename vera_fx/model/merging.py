"""Fold adapters into the base weights and take them out again."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.build import attribute_of
from vera_fx.bank.names import check_known
from vera_fx.base.hf import unset_tied
from vera_fx.errors import AdapterError, listing
from vera_fx.graphs.runtime import require_adapted
from vera_fx.products.kinds import weight_of


def merge(
    model: nn.Module,
    names: Sequence[str] | str | None = None,
    *,
    safe: bool = True,
    keep_base: bool = False,
) -> None:
    """Add ``diag(b) B diag(d) A`` of each adapter to its targets' weights, in place.

    Afterwards calls run the plain base graph, at the base's speed; active adapters that were not
    merged go on computing their branches beside it.

    Args:
        model: an adapted model.
        names: adapters to merge; None for the active ones.
        safe: refuse to merge if a result has NaN or infinity, before any weight is changed.
        keep_base: keep a copy of the weights, so that `unmerge` restores them bit for bit. Without
            it `unmerge` subtracts, which restores them to rounding.

    Raises:
        AdapterError: an unknown name, a weight that cannot be merged, or values that are not finite.
    """
    bank = require_adapted(model)
    todo = _to_merge(bank, names)
    _check_ties(bank, todo)
    check_mergeable(model, bank, todo, safe=safe)
    _check_alone(bank, todo)
    for name in todo:
        # What depends on the weight cannot be subtracted again.
        if keep_base or not bank.adapter(name).kind.maths.adds_up:
            bank.kept_bases[name] = {
                path: w.detach().clone() for path, w in _changed(model, bank.adapter(name))
            }
        _add(model, bank, bank.adapter(name), sign=1)
        _swap_copies(model, bank.adapter(name))
        bank.merged += (name,)
    bank.bind()


def unmerge(model: nn.Module) -> None:
    """Take every merged adapter out of the base weights again, last merged first.

    Raises:
        AdapterError: the model is not adapted.
    """
    bank = require_adapted(model)
    for name in reversed(bank.merged):
        adapter = bank.adapter(name)
        kept = bank.kept_bases.pop(name, None)
        if kept is None:
            _add(model, bank, adapter, sign=-1)
        else:
            for path, weight in _changed(model, adapter):
                weight.data.copy_(kept[path])
        _swap_copies(model, adapter)
    bank.merged = ()
    bank.bind()


def folded_weights(model: nn.Module, bank: AdapterBank, name: str) -> dict[str, Tensor]:
    """What each target's weight is with the adapter folded in, ``(out, in)``, a tensor of its own.

    Raises:
        AdapterError: values that are not finite.
    """
    adapter, folded = bank.adapter(name), dict[str, Tensor]()
    for path, (weight, delta) in _deltas(model, bank, adapter).items():
        if weight.is_meta:
            raise _on_meta(name, path)
        folded[path] = (weight.detach() + delta()).to(weight.dtype)
        if not torch.isfinite(folded[path]).all():
            raise _not_finite(name)
    return folded


def _to_merge(bank: AdapterBank, names: Sequence[str] | str | None) -> list[str]:
    wanted = bank.active if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        check_known(name, bank.adapters)
    todo = [name for name in dict.fromkeys(wanted) if name not in bank.merged]
    if wanted and not todo:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
    return todo


def check_mergeable(
    model: nn.Module, bank: AdapterBank, names: Sequence[str], *, safe: bool
) -> None:
    """Refuse adapters that cannot be merged, whatever their weights are tied to.

    Raises:
        AdapterError: a weight is computed or without values; or, if ``safe``, a merged weight would
            not be finite.
    """
    for name in names:
        for path, weight in _changed(model, bank.adapter(name)):
            if not bank.structure.targets[path].weights:
                raise _refused(name, path, "is computed (parametrised)")
            if weight.is_meta:
                raise _on_meta(name, path)
    if safe:
        _check_finite(model, bank, names)


def _check_alone(bank: AdapterBank, todo: Sequence[str]) -> None:
    names = [*bank.merged, *todo]
    kinds = {name: bank.adapter(name).kind for name in names}
    alone = next((name for name in names if not kinds[name].maths.adds_up), None)
    if alone is not None and len(names) > 1:
        raise AdapterError(
            f"adapter {alone!r} cannot be merged beside {listing(n for n in names if n != alone)}: the "
            f"change of a {kinds[alone].name} adapter depends on the weight that it is merged into; "
            "merge it alone, or run the adapters unmerged"
        )


def _check_ties(bank: AdapterBank, names: Iterable[str]) -> None:
    for name in names:
        for path, tensor, others in _ties(bank, name):
            raise AdapterError(
                f"adapter {name!r} cannot be merged: the {tensor} of {path!r} is tied to "
                f"{listing(others)}, and merging would change that as well; unload(merge=True) unties "
                "it, or untie it first, or run unmerged"
            )


def _ties(bank: AdapterBank, name: str) -> Iterator[tuple[str, str, list[str]]]:
    """``(module path, tensor name, paths elsewhere)`` of tied tensors that merging would change.

    Frozen copies stand for every use of a tensor, so that changing all of them is right.
    """
    adapter = bank.adapter(name)
    for path in adapter.vectors.by_path:
        target = bank.structure.targets[path]
        own = {f"{p}.weight" for p in target.paths}
        others = [weight for weight in target.weights if weight not in own]
        if others:
            yield path, "weight", others
    for path, tensor, _ in adapter.copied_tensors():
        others = [
            p for p in bank.structure.base_paths[path, tensor] if not p.startswith(f"{path}.")
        ]
        if others and path not in adapter.frozen:
            yield path, tensor, others


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Give the tied weights that merging these adapters would change a copy of their own.

    Captured graphs do not see it: this is for a model that is about to be unloaded.
    """
    bank = require_adapted(model)
    for name in names:
        for path, tensor, others in list(_ties(bank, name)):
            _untie(model, bank, path, tensor)
            if any(other in bank.thawed for other in others):
                bank.thawed += (f"{path}.{tensor}",)
            warnings.warn(
                f"{path}.{tensor} was tied to {listing(others)} and has a copy of its own now, with the "
                f"adapter {name!r} merged into it",
                stacklevel=4,
            )
            unset_tied(model)


def _untie(model: nn.Module, bank: AdapterBank, path: str, tensor: str) -> None:
    *parents, attribute = f"{path}.{tensor}".split(".")
    owner = model.get_submodule(".".join(parents))
    base = owner._parameters[attribute]
    if base is not None:
        owner._parameters[attribute] = nn.Parameter(base.detach().clone(), requires_grad=False)
    if path in bank.structure.targets and tensor == "weight":
        target = bank.structure.targets[path]
        own = tuple(f"{p}.weight" for p in target.paths)
        bank.structure.targets[path] = dataclasses.replace(target, weights=own)
    if (path, tensor) in bank.structure.base_paths:
        bank.structure.base_paths[path, tensor] = (f"{path}.{tensor}",)


def _deltas(
    model: nn.Module, bank: AdapterBank, adapter: Adapter
) -> dict[str, tuple[Tensor, Callable[[], Tensor]]]:
    """For each target its weight and what the adapter adds to it, both ``(out, in)``."""
    shared = bank.projections_of(adapter).tensors
    found: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {}
    for path in adapter.vectors.by_path:
        vectors, weight = adapter.vectors_at(path), weight_of(model, path)
        if vectors is not None:
            tensors = shared | vectors.tensors
            found[path] = weight, functools.partial(_delta, adapter, weight, tensors)
    return found


def _delta(adapter: Adapter, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """In float32 at least: it is rounded once, when it is added."""
    with torch.no_grad():
        wide = {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in tensors.items()}
        return adapter.kind.maths.delta(wide, weight.shape[1], lambda: weight)


def _check_finite(model: nn.Module, bank: AdapterBank, names: Iterable[str]) -> None:
    totals: dict[int, Tensor] = {}
    for name in names:
        for weight, delta in _deltas(model, bank, bank.adapter(name)).values():
            total = totals.get(weight.data_ptr(), weight.detach()) + delta()
            totals[weight.data_ptr()] = total.to(weight.dtype)
            if not torch.isfinite(total.to(weight.dtype)).all():
                raise _not_finite(name, " (merge with safe=False to do it anyway)")


def _refused(name: str, path: str, reason: str) -> AdapterError:
    return AdapterError(
        f"adapter {name!r} cannot be merged: the weight of {path!r} {reason}; run unmerged"
    )


def _on_meta(name: str, path: str) -> AdapterError:
    return _refused(name, path, "is on the meta device")


def _not_finite(name: str, hint: str = "") -> AdapterError:
    return AdapterError(
        f"adapter {name!r} cannot be merged: the merged weights would have NaN or infinity; "
        f"the adapter seems to be broken{hint}"
    )


def _changed(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for path in adapter.vectors.by_path:
        yield path, weight_of(model, path)


def _add(model: nn.Module, bank: AdapterBank, adapter: Adapter, *, sign: int) -> None:
    for weight, delta in _deltas(model, bank, adapter).values():
        weight.data.add_(delta().to(weight.device), alpha=sign)


def _swap_copies(model: nn.Module, adapter: Adapter) -> None:
    """Exchange the values of the adapter's copies and the base tensors they stand for."""
    swapped: set[int] = set()
    for path, name, copy in adapter.copied_tensors():
        base = attribute_of(model.get_submodule(path), name)
        if id(base) in swapped:  # tied, with equal frozen copies
            continue
        swapped.add(id(base))
        held = base.data.clone()
        base.data.copy_(copy.data)
        copy.data.copy_(held)
