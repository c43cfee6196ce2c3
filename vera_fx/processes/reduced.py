"""Training in several processes: every process has to end with the same adapter.

What trains under ``DistributedDataParallel`` was settled when the model was wrapped: a call in which
another adapter trains is refused. Under ``fully_shard`` the library reduces the gradients of vectors
itself that came after it, all at once at the end of each backward.
"""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from vera_fx._torch import (
    NO_BACKWARD,
    active_ddp,
    after_backward,
    backward_now,
    reduced_by,
    sharded_by,
)
from vera_fx.bank.bank import bank_of
from vera_fx.base.sharding import has_parallel, has_sharded
from vera_fx.errors import AdapterError, listing

if TYPE_CHECKING:
    from collections.abc import Iterator


class Reduced:
    """Who reduces the gradients of a model's vectors; asked for once."""

    def __init__(self) -> None:
        self._wrapper: weakref.ref[DistributedDataParallel] | None = None
        self._known: frozenset[int] = frozenset()
        self._seen: dict[int, weakref.ref[Tensor]] = {}
        self._own: list[weakref.ref[Tensor]] = []
        self._mesh: Any = None
        self._waiting = NO_BACKWARD

    def check(self, model: nn.Module) -> None:
        """Before a call: refuse it, or see to the gradients, if it trains what nobody would reduce.

        Raises:
            AdapterError: with the adapters that were added or switched to since the model was wrapped.
        """
        if not torch.is_grad_enabled() or not dist.is_available() or not dist.is_initialized():
            return
        wrapper = active_ddp()
        if wrapper is not None:
            self._check_wrapped(model, wrapper)
        else:
            self._check_sharded(model)

    def _check_wrapped(self, model: nn.Module, wrapper: DistributedDataParallel) -> None:
        if self._wrapper is None or self._wrapper() is not wrapper:
            _refuse_made_local(model, wrapper)
            self._known, self._wrapper = reduced_by(wrapper), weakref.ref(wrapper)
        unknown = dict.fromkeys(n for n, t in _trained(model) if id(t) not in self._known)
        if unknown:
            raise AdapterError(
                f"adapter {listing(unknown)} trains now, but not when this {type(model).__name__} was wrapped in "
                "DistributedDataParallel, which therefore would not reduce its gradients, and every process "
                "would train another adapter; wrap the model again after adapt, add_adapter and set_adapter: "
                "DistributedDataParallel(wrapper.module)"
            )

    def _check_sharded(self, model: nn.Module) -> None:
        new = [tensor for _, tensor in _trained(model) if not self._has_seen(tensor)]
        if not new or not has_sharded(model):
            return
        self._mesh, gathered = sharded_by(model)
        for tensor in new:
            self._seen[id(tensor)] = weakref.ref(tensor)
            if id(tensor) not in gathered:
                self._own.append(weakref.ref(tensor))
                tensor.register_post_accumulate_grad_hook(self._landed)

    def _has_seen(self, tensor: Tensor) -> bool:
        known = self._seen.get(id(tensor))
        return known is not None and known() is tensor

    def _landed(self, _tensor: Tensor) -> None:
        # Not a flag: a backward that fails never comes to its end.
        if self._waiting != backward_now():
            self._waiting = backward_now()
            after_backward(self._reduce)

    def _reduce(self) -> None:
        """Average all gradients over the processes: those of earlier backwards, too, are equal then."""
        self._waiting = NO_BACKWARD
        own = [tensor for reference in self._own if (tensor := reference()) is not None]
        grads = [t.grad if t.grad is not None else torch.zeros_like(t) for t in own]
        there = own[0].new_tensor([float(t.grad is not None) for t in own], dtype=torch.float32)
        flat = torch.cat([there, *(grad.detach().flatten().float() for grad in grads)])
        for dim in range(self._mesh.ndim):
            dist.all_reduce(flat, group=self._mesh.get_group(dim))
        flat /= self._mesh.size()
        sizes = [len(own), *(grad.numel() for grad in grads)]
        some, *means = flat.split(sizes)
        for tensor, grad, mean, present in zip(own, grads, means, some.tolist(), strict=True):
            if present:
                tensor.grad = grad.copy_(mean.view_as(grad))


def _refuse_made_local(model: nn.Module, wrapper: DistributedDataParallel) -> None:
    """Given a mesh, it makes plain parameters of a model's ``DTensor``s: ones that train."""
    if getattr(wrapper, "device_mesh", None) is not None and has_parallel(model):
        raise AdapterError(
            f"DistributedDataParallel was given a device_mesh, for which torch makes this "
            f"{type(model).__name__}'s frozen weights under tensor parallelism ones that train; wrap a fresh "
            'model with DistributedDataParallel(model, process_group=mesh["data"].get_group()) instead'
        )


def _trained(model: nn.Module) -> "Iterator[tuple[str, Tensor]]":
    """The tensors of computing adapters that train now, with the adapters' names."""
    binding = bank_of(model).slots.binding
    for name, slot in zip(binding.names, binding.slots, strict=True):
        yield from ((name, t) for t in slot.tensors().values() if t.requires_grad)
