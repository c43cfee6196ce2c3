"""What may be merged, what an adapter changes of the base, and ties that are in the way."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank
from vera_fx.base.hf import unset_tied
from vera_fx.base.sharding import all_agree, cut, local_part, whole
from vera_fx.errors import AdapterError, listing
from vera_fx.graphs.runtime import require_adapted
from vera_fx.products.kinds import kind_of, weight_of

Change = tuple[Tensor, Callable[[], Tensor]]
"""A weight, and what is to be added to it."""


def check_mergeable(
    model: nn.Module, bank: AdapterBank, names: Sequence[str], *, safe: bool
) -> None:
    """Refuse adapters that cannot be merged, whatever their weights are tied to.

    Raises:
        AdapterError: a weight is computed or without values; or, if ``safe``, a merged weight would
            not be finite.
    """
    for name in names:
        for path in bank.adapter(name).vectors.by_path:
            kind, module = kind_of(model, path)
            if (reason := kind.merge_refusal(module)) is not None:
                raise _refused(name, path, reason)
            target = bank.structure.targets[path]
            if not (target.is_called or target.weights):
                raise _refused(name, path, "is computed (parametrised)")
            if any(tensor.is_meta for tensor in module._parameters.values() if tensor is not None):
                raise _on_meta(name, path)
    if safe:
        check_finite(model, bank, names)


def check_together(bank: AdapterBank, todo: Sequence[str]) -> None:
    """Refuse adapters beside one whose change depends on the weight.

    Raises:
        AdapterError: with that adapter.
    """
    names = [*bank.merged, *todo]
    kinds = {name: bank.adapter(name).kind for name in names}
    alone = next((name for name in names if not kinds[name].maths.adds_up), None)
    if alone is not None and len(names) > 1:
        raise AdapterError(
            f"adapter {alone!r} cannot be merged beside {listing(n for n in names if n != alone)}: the "
            f"change of a {kinds[alone].name} adapter depends on the weight that it is merged into; "
            "merge it alone, or run the adapters unmerged"
        )


def check_compatible(bank: AdapterBank, names: Sequence[str], what: str = "be active") -> None:
    """Refuse adapters that each bring their own copy of one module.

    Raises:
        AdapterError: with two such adapters.
    """
    owner: dict[str, str] = {}
    for name in names:
        for path in bank.adapter(name).copies.by_path:
            if path in owner and not _is_one_frozen(bank, path, owner[path], name):
                raise AdapterError(
                    f"adapters {owner[path]!r} and {name!r} cannot {what} together: each has its own "
                    f"trained copy of {path!r}"
                )
            owner[path] = name


def check_seen(bank: AdapterBank, names: Sequence[str]) -> None:
    """Refuse to merge into what a call would not read.

    Args:
        bank: the bank.
        names: all that will be merged.

    Raises:
        AdapterError: an active adapter, which is not merged, has a copy of what one of them targets.
    """
    for name in (name for name in bank.active if name not in names):
        copied = {
            f"{path}.{tensor}": path for path, tensor, _ in bank.adapter(name).copied_tensors()
        }
        for other in names:
            targets = bank.adapter(other).vectors.by_path
            hidden = next((path for path in targets if f"{path}.weight" in copied), None)
            if hidden is not None:
                raise AdapterError(
                    f"adapter {other!r} cannot be merged beside {name!r}, which is active with its own "
                    f"copy of {hidden!r}: calls would read that, without the update of {other!r}; merge "
                    "both, or make one of them inactive"
                )


def _is_one_frozen(bank: AdapterBank, path: str, first: str, second: str) -> bool:
    """Whether both adapters keep the same frozen values at ``path``."""
    adapters = [bank.adapter(name) for name in (first, second)]
    a, b = (adapter.copies.by_path[path].state_dict() for adapter in adapters)
    frozen = all(path in adapter.frozen for adapter in adapters)
    return frozen and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_ties(bank: AdapterBank, names: Iterable[str]) -> None:
    """Refuse adapters whose merge would change what a weight is tied to.

    Raises:
        AdapterError: with the weight and its ties.
    """
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


def folded_weights(model: nn.Module, bank: AdapterBank, name: str) -> dict[str, Tensor]:
    """What each target's weight is with the adapter folded in, ``(out, in)``, a tensor of its own.

    Raises:
        AdapterError: values that are not finite.
    """
    adapter, folded = bank.adapter(name), dict[str, Tensor]()
    for path, (weight, delta) in deltas(model, bank, adapter).items():
        if weight.is_meta:
            raise _on_meta(name, path)
        folded[path] = (weight.detach() + delta()).to(weight.dtype)
        if not torch.isfinite(folded[path]).all():
            raise _not_finite(name)
    return folded


def deltas(
    model: nn.Module,
    bank: AdapterBank,
    adapter: Adapter,
    vectors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Change]:
    """For each target its weight and what the adapter adds to it, both ``(out, in)``.

    Args:
        model: the model.
        bank: its bank.
        adapter: the adapter.
        vectors: its vectors by path, where not those that it has now.
    """
    shared = bank.projections_of(adapter).tensors
    found: dict[str, Change] = {}
    for path in adapter.vectors.by_path:
        module, weight = adapter.vectors_at(path), weight_of(model, path)
        if module is not None:
            own = module.tensors if vectors is None else vectors[path]
            devices = {name: whole(tensor).to(weight.device) for name, tensor in own.items()}
            found[path] = weight, functools.partial(_delta, adapter, weight, shared | devices)
    return found


def _delta(adapter: Adapter, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """In float32 at least: it is rounded once, when it is added."""
    with torch.no_grad():
        wide = {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in tensors.items()}
        return adapter.kind.maths.delta(wide, weight.shape[1], lambda: whole(weight))


def check_finite(model: nn.Module, bank: AdapterBank, names: Iterable[str]) -> None:
    """Refuse adapters with which a weight would not be finite.

    Raises:
        AdapterError: with the adapter.
    """
    totals: dict[int | str, Tensor] = {}
    for name in names:
        for path, (weight, delta) in deltas(model, bank, bank.adapter(name)).items():
            held = local_part(weight.detach())
            # Tied weights are one tensor; what is computed is another one at every turn.
            key = path if bank.structure.targets[path].is_called else held.data_ptr()
            total = totals.get(key, held) + cut(delta(), weight)
            totals[key] = total.to(weight.dtype)
            if not all_agree(bool(torch.isfinite(total.to(weight.dtype)).all()), weight):
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


def changed(model: nn.Module, bank: AdapterBank, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """The weights that merging changes in place, by target path."""
    for path in adapter.vectors.by_path:
        if not bank.structure.targets[path].is_called:
            yield path, weight_of(model, path)
