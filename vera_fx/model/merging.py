"""Fold adapters into the base weights and take them out again."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.build import attribute_of
from vera_fx.bank.names import check_known
from vera_fx.base.hf import unset_tied
from vera_fx.base.targets import weight_of
from vera_fx.errors import AdapterError, listing
from vera_fx.graphs.runtime import require_adapted
from vera_fx.passes import Target
from vera_fx.reference import vera_delta


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
    for name in todo:
        if keep_base:
            bank.kept_bases[name] = {
                id(w): w.detach().clone() for _, w in _changed(model, bank.adapter(name))
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
            for _, weight in _changed(model, adapter):
                weight.data.copy_(kept[id(weight)])
        _swap_copies(model, adapter)
    bank.merged = ()
    bank.bind()


def folded_weights(model: nn.Module, bank: AdapterBank, name: str) -> dict[str, Tensor]:
    """What each target's weight is with the adapter folded in, as a tensor of its own.

    Raises:
        AdapterError: values that are not finite.
    """
    adapter, folded = bank.adapter(name), dict[str, Tensor]()
    deltas = _deltas(model, bank, adapter)
    for path, (weight, delta) in zip(adapter.vectors.by_path, deltas, strict=True):
        if weight.is_meta:
            raise _on_meta(name, path)
        folded[path] = (weight.detach() + delta).to(weight.dtype)
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
            if not bank.targets[path].weights:
                raise _refused(name, path, "is computed (parametrised)")
            if weight.is_meta:
                raise _on_meta(name, path)
    if safe:
        _check_finite(model, bank, names)


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
        target = bank.targets[path]
        own = {f"{p}.weight" for p in target.paths}
        others = [weight for weight in target.weights if weight not in own]
        if others:
            yield path, "weight", others
    for path, tensor, _ in adapter.copied_tensors():
        others = [p for p in bank.base_paths[path, tensor] if not p.startswith(f"{path}.")]
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
    if path in bank.targets and tensor == "weight":
        target = bank.targets[path]
        own = tuple(f"{p}.weight" for p in target.paths)
        bank.targets[path] = dataclasses.replace(target, weights=own)
    if (path, tensor) in bank.base_paths:
        bank.base_paths[path, tensor] = (f"{path}.{tensor}",)


def _deltas(
    model: nn.Module, bank: AdapterBank, adapter: Adapter
) -> Iterator[tuple[Tensor, Tensor]]:
    """``(weight, what the adapter adds to it)``, the latter in the weight's layout."""
    pair = bank.projections_of(adapter)
    for path in adapter.vectors.by_path:
        target, vectors = bank.targets[path], adapter.vectors_at(path)
        if vectors is None:
            continue
        with torch.no_grad():
            delta = _delta(target, vectors.vera_lambda_d, vectors.vera_lambda_b, pair)
        yield weight_of(model, path), delta


def _delta(target: Target, d: Tensor, b: Tensor, pair: Any) -> Tensor:
    exact = torch.promote_types(d.dtype, torch.float32)
    A, B, d, b = (tensor.to(exact) for tensor in (pair.vera_A, pair.vera_B, d, b))
    delta = vera_delta(A, B, d, b, target.in_features)
    return delta.T if target.layout == "in_out" else delta


def _check_finite(model: nn.Module, bank: AdapterBank, names: Iterable[str]) -> None:
    totals: dict[int, Tensor] = {}
    for name in names:
        for weight, delta in _deltas(model, bank, bank.adapter(name)):
            total = totals.get(id(weight), weight.detach()) + delta
            totals[id(weight)] = total.to(weight.dtype)
            if not torch.isfinite(totals[id(weight)]).all():
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
    for weight, delta in _deltas(model, bank, adapter):
        weight.data.add_(delta.to(weight.device), alpha=sign)


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
