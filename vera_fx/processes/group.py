"""Processes that do one piece of work together: rows are dealt out, what was found is summed.

A process that fails must not leave the others waiting: whatever can fail is done inside of
`Processes.agree`, after which all of them know.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from vera_fx.errors import AdapterError, ConfigError, first_line, listing, shown
from vera_fx.processes.checksums import checksums

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
_TOLD = "_vera_fx_told"


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a group, and which of them this is.

    Attributes:
        group: torch's; None for its default group, or where this process is alone.
        rank: this process's number.
        size: how many there are.
    """

    group: Any = None
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True in the one process that writes files and shows progress."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items: all are dealt out in turn."""
        return items[self.rank :: self.size]

    def agree(self, what: str, work: Callable[[], T]) -> list[T]:
        """Do something in every process; all get what all of them found, by rank.

        Args:
            what: what all of them must be at.
            work: gives something that can be pickled.

        Raises:
            AdapterError: another process failed, or is at something else.
            Exception: what ``work`` raised here.
        """
        if self.size == 1:
            return [work()]
        own: Exception | None = None
        try:
            mine: tuple[str, Any, str | None] = (what, work(), None)
        except Exception as error:  # raised below, when the others know
            own, mine = error, (what, None, first_line(error))
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        if own is not None:
            raise _told(own)
        self._check(what, found)
        return [value for _, value, _ in found]

    def _check(self, what: str, found: Sequence[tuple[str, Any, str | None]]) -> None:
        for rank, (other, _, problem) in enumerate(found):
            if problem is not None:
                raise _told(
                    AdapterError(
                        f"process {rank} of {self.size} failed in {other}: {problem}; all of them stop"
                    )
                )
            if other != what:
                raise _told(
                    AdapterError(
                        f"process {self.rank} is at {shown(what)} and process {rank} at {shown(other)}; "
                        "all processes must add and stop the same jobs at the same steps"
                    )
                )

    def same(self, what: str, work: Callable[[], object]) -> None:
        """Do something in every process, and see that all find the same.

        Raises:
            ConfigError: they do not.
            Exception: as `agree`.
        """
        first, *others = self.agree(what, work)
        for rank, other in enumerate(others, 1):
            if other != first:
                raise _told(
                    ConfigError(
                        f"{what}: process 0 has {shown(first)} and process {rank} {shown(other)}; give all of "
                        "them the same, or each a group of its own to train apart from the others"
                    )
                )

    def same_tensors(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """See that tensors hold the same in all processes, by their checksums.

        Raises:
            ConfigError: they do not; it names some.
        """
        if self.size == 1:
            return
        first, *others = self.agree(what, lambda: checksums(tensors))
        names = {
            name
            for other in others
            for name in first.keys() | other.keys()
            if first.get(name) != other.get(name)
        }
        if names:
            raise _told(
                ConfigError(
                    f"{what} differ between processes, in {listing(sorted(names))}; load the same files, and "
                    "call torch.manual_seed with one number in all of them before anything is drawn at random"
                )
            )

    @contextlib.contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """Around code that calls `agree`: if this process fails in between, the others know at their next."""
        try:
            yield
        except Exception as error:
            if _TOLD not in error.__dict__:
                self.agree(what, functools.partial(_raise, error))
            raise

    def add_up_gradients(self, values: Sequence[Tensor]) -> None:
        """Replace gradients by their sums over the processes; None stays where no process has one.

        Args:
            values: whose gradients these are: the same shapes in all processes, on one device.
        """
        if self.size == 1 or not values:
            return
        wide = torch.promote_types(torch.float32, _widest(values))
        grads = [torch.zeros_like(v) if v.grad is None else v.grad for v in values]
        there = torch.tensor([v.grad is not None for v in values], device=values[0].device)
        flat = torch.cat([there.to(wide), *(grad.detach().flatten().to(wide) for grad in grads)])
        dist.all_reduce(flat, group=self.group)
        present, *sums = flat.split([len(grads), *(grad.numel() for grad in grads)])
        for value, grad, total, some in zip(values, grads, sums, present.tolist(), strict=True):
            value.grad = grad.copy_(total.view_as(grad)) if some else None


def _told(error: E) -> E:
    """Mark an error that all processes raise, each its own."""
    error.__dict__[_TOLD] = True
    return error


def _raise(error: Exception) -> None:
    raise error


def _widest(values: Sequence[Tensor]) -> torch.dtype:
    found = values[0].dtype
    for value in values:
        found = torch.promote_types(found, value.dtype)
    return found


def processes_of(group: Any = None) -> Processes:
    """The processes of a group of torch's.

    Args:
        group: None for the default group, or for this process alone where there is none.

    Raises:
        ConfigError: this process is not in the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        _warn_if_launched()
        return Processes()
    rank = dist.get_rank(group)
    if rank < 0:
        raise ConfigError(
            f"process {dist.get_rank()} is not in the group that was given; call this in the "
            "processes of the group alone"
        )
    return Processes(group, rank, dist.get_world_size(group))


def _warn_if_launched() -> None:
    """Tell those that a launcher started, and that nobody has connected."""
    size = os.environ.get("WORLD_SIZE", "1")
    if dist.is_available() and dist.is_torchelastic_launched() and size != "1":
        warnings.warn(
            f"a launcher started {size} processes, but no process group: every process does the whole "
            "work. Make an accelerate.Accelerator(), or call torch.distributed.init_process_group(), first",
            stacklevel=4,
        )
