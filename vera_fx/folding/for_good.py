"""Adapters folded in for good: ties give way, and quantised modules become plain ones."""

from torch import nn

from vera_fx.bank.bank import bank_of
from vera_fx.folding import mergeable, merging
from vera_fx.folding.dense import make_dense


def merge_for_good(model: nn.Module, *, safe: bool) -> None:
    """Fold the active adapters in, for a model that is about to be unloaded.

    Raises:
        AdapterError: an adapter that cannot be merged; quantised modules are what they were then.
    """
    bank = bank_of(model)
    merging.check_enabled(bank)
    todo = [name for name in bank.active if name not in bank.merged]
    if any(target.is_called for target in bank.structure.targets.values()):
        # Nothing is rounded a second time.
        todo = [*bank.merged, *todo]
        mergeable.check_together(bank, todo)
        mergeable.check_compatible(bank, todo, "be merged")
        if safe:
            mergeable.check_finite(model, bank, todo)
        merging.unmerge(model)
        make_dense(model, bank)
    mergeable.check_mergeable(model, bank, todo, safe=safe)
    mergeable.check_compatible(bank, [*bank.merged, *todo], "be merged")
    mergeable.untie(model, todo)
    if todo:
        merging.merge(model, todo, safe=False)
