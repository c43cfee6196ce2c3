"""What the adapting passes need to know of a bank's computing adapters."""

from collections.abc import Callable

from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.slots import slot_path
from vera_fx.passes import AdaptationPlan, Branch


def adaptation_plan(bank: AdapterBank, is_training: Callable[[str], bool]) -> AdaptationPlan:
    """The targets, their branches, and what is read in the place of the base's tensors.

    Args:
        bank: the bank.
        is_training: tells for a target's path whether its module is in train mode, in which its
            branches drop elements of their input.
    """
    adapters = [bank.adapter(name) for name in bank.computing()]
    targets = tuple(bank.targets.values())
    branches = tuple(
        tuple(
            _branch(bank, index, target.path, dropout=adapter.config.vera_dropout * train)
            for index, adapter in enumerate(adapters)
        )
        for target in targets
        for train in [is_training(target.path)]
    )
    redirects = tuple(
        bank.redirect(place, slot_path(0, bank.names.of(*place))) for place in bank.base_paths
    )
    return AdaptationPlan(targets, branches, redirects)


def _branch(bank: AdapterBank, index: int, path: str, *, dropout: float) -> Branch:
    return Branch(
        vera_A=slot_path(index, "vera_A"),
        vera_B=slot_path(index, "vera_B"),
        lambda_d=slot_path(index, bank.names.of(path, "lambda_d")),
        lambda_b=slot_path(index, bank.names.of(path, "lambda_b")),
        dropout=dropout,
    )
