"""Merging into quantised weights: read, added to, quantised again, and given back as they were."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vera_fx.bank.adapter import Folded
from vera_fx.bank.bank import AdapterBank
from vera_fx.errors import AdapterError, RequantisedWarning
from vera_fx.folding.mergeable import Change, deltas
from vera_fx.products.kinds import describe, kind_of, rewriting_of, weight_of


def is_called(bank: AdapterBank, path: str) -> bool:
    """True for a target whose weight only its own module reads."""
    return bank.structure.targets[path].is_called


def check_coarse(model: nn.Module, bank: AdapterBank, names: Sequence[str], *, asked: bool) -> None:
    """Refuse to merge into weights that round coarsely, unless it is asked for.

    Raises:
        AdapterError: with the first such target.
    """
    for name in names if not asked else ():
        for path in filter(lambda path: is_called(bank, path), bank.adapter(name).vectors.by_path):
            _, module = kind_of(model, path)
            if rewriting_of(model, path).is_coarse(module):
                raise AdapterError(
                    f"adapter {name!r} was not merged: the weight of {path!r} ({describe(module)}) has 4 "
                    "bits or fewer, whose rounding may be larger than what the adapter adds; run unmerged, or "
                    "unload(merge=True) for plain modules, or merge(model, requantise=True) to do it anyway"
                )


def rewrite(model: nn.Module, changes: Mapping[str, Change], folded: Folded) -> None:
    """Write changed weights into their modules, and keep what these held; all of them or none."""
    try:
        _rewrite(model, changes, folded)
    except BaseException:
        put_back(model, folded)
        raise


def _rewrite(model: nn.Module, changes: Mapping[str, Change], folded: Folded) -> None:
    for path, (weight, delta) in changes.items():
        rewriting, module = rewriting_of(model, path), model.get_submodule(path)
        folded.stored[path] = rewriting.stored(module)
        rewriting.write(module, (weight.detach() + delta().to(weight.device)).to(weight.dtype))


def put_back(model: nn.Module, folded: Folded) -> None:
    """Give the modules back what they held."""
    for path, held in folded.stored.items():
        rewriting_of(model, path).restore(model.get_submodule(path), held)
    folded.stored.clear()


def tell_loss(model: nn.Module, bank: AdapterBank, name: str) -> None:
    """Warn how much of the change of the weights their rounding has lost."""
    paths = bank.folded[name].stored
    if not paths:
        return
    share, worst = max((_lost(model, bank, name, path), path) for path in paths)
    warnings.warn(
        f"adapter {name!r}: the weights of {len(paths)} targets were quantised again with its change in "
        f"them; rounding differs from the exact sum by up to {share:.0%} of that change ({worst})",
        RequantisedWarning,
        stacklevel=4,
    )


def _lost(model: nn.Module, bank: AdapterBank, name: str, path: str) -> float:
    """The rounding of the merged weight, as a share of the change (Frobenius norms)."""
    rewriting, module = rewriting_of(model, path), model.get_submodule(path)
    now, merged = weight_of(model, path), rewriting.stored(module)
    rewriting.restore(module, bank.folded[name].stored[path])
    weight, delta = deltas(model, bank, bank.adapter(name))[path]
    change = delta().to(weight.device)
    rewriting.restore(module, merged)
    error = torch.linalg.norm((now - weight - change).float())
    return float(
        error / torch.linalg.norm(change.float()).clamp(min=torch.finfo(torch.float32).tiny)
    )
