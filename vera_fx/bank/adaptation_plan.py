"""What the adapting passes need to know of a bank's computing adapters."""

from collections.abc import Callable, Iterator

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.slots import slot_path
from vera_fx.errors import TargetError
from vera_fx.passes import AdaptationPlan, Branch, Target


def adaptation_plan(bank: AdapterBank, is_training: Callable[[str], bool]) -> AdaptationPlan:
    """The targets, their branches, and what is read in the place of the base's tensors.

    Args:
        bank: the bank.
        is_training: tells for a target's path whether its module is in train mode, in which its
            branches drop elements of their input.
    """
    adapters = [bank.adapter(name) for name in bank.slots.binding.names]
    targets = tuple(bank.structure.targets.values())
    branches = tuple(
        tuple(_branches(bank, adapters, target, train=is_training(target.path)))
        for target in targets
    )
    redirects = tuple(
        bank.structure.redirect(place, slot_path(0, bank.slots.names.of(*place)))
        for place in bank.structure.base_paths
    )
    return AdaptationPlan(targets, branches, redirects)


def _branches(
    bank: AdapterBank, adapters: list[Adapter], target: Target, *, train: bool
) -> Iterator[Branch]:
    for index, adapter in enumerate(adapters):
        kind = adapter.kind
        if not kind.idle_at_zero and target.path not in adapter.vectors.by_path:
            continue
        own = {name: bank.slots.names.of(target.path, name) for name in kind.parameters.own}
        attributes = dict.fromkeys(kind.parameters.shared) | own
        tensors = {name: slot_path(index, at or name) for name, at in attributes.items()}
        yield Branch(kind.graph, tensors, _dropout(adapter, target, train=train))


def _dropout(adapter: Adapter, target: Target, *, train: bool) -> float:
    """The probability of dropping an element of a branch's input.

    Raises:
        TargetError: processes that each have a part of the product would drop other elements.
    """
    if train and adapter.config.dropout and target.cut is not None:
        raise TargetError(
            f"{target.path!r} is under tensor parallelism, where processes drop other elements of the "
            "branch's input than each other; call model.eval(), or use an adapter without dropout"
        )
    return adapter.config.dropout * train
