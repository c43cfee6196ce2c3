"""Rules: calls of every kind, and training steps."""

import contextlib

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import vera_fx
from tests.helpers import assert_close
from tests.sequences.state import State, rows
from tests.sequences.world import BASE

SHAPES = ((5,), (3, 5), (1, 5), (0, 5), (2, 3, 5), (2, 0, 5), (2, 1, 2, 5))
MODES = ("grad", "no_grad", "inference_mode", "autocast")


class OfCalls(State):
    """Called, trained, called and trained with an adapter for each row."""

    @rule(
        shape=st.sampled_from(SHAPES),
        mode=st.sampled_from(MODES),
        compiled=st.sampled_from([False, False, True]),
    )
    def call(self, shape: tuple[int, ...], mode: str, compiled: bool) -> None:
        x = rows(shape, 1)
        contexts = {
            "grad": contextlib.nullcontext,
            "no_grad": torch.no_grad,
            "inference_mode": torch.inference_mode,
            "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        }
        with contexts[mode]():
            found = (self.compiled if compiled else self.model)(x)
        expected = self.world.output(x).detach()
        if mode == "autocast":
            size = max([1.0, *expected.abs().flatten().tolist()])
            assert (found.float() - expected).abs().max().item() < 0.1 * size if x.numel() else True
        else:
            assert_close(found.detach(), expected, factor=20)

    @precondition(lambda self: self.world.learning())
    @rule(
        shape=st.sampled_from(SHAPES),
        written=st.booleans(),
        compiled=st.sampled_from([False, False, True]),
    )
    def train(self, shape: tuple[int, ...], written: bool, compiled: bool) -> None:
        """A step with weight decay, maybe after a write to the output."""
        x, world = rows(shape, 2), self.world
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(named.values(), lr=0.01, weight_decay=0.1)
        y = (self.compiled if compiled else self.model)(x)
        y = y.mul_(2) if written else y
        y.square().sum().backward()

        mine = {name: world.adapters[name] for name in world.learning()}
        leaves = [t.requires_grad_() for one in mine.values() for t in one.tensors().values()]
        expected = world.output(x) * (2 if written else 1)
        grads = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for leaf, grad in zip(leaves, grads, strict=True):
                if grad is not None:
                    leaf.sub_(0.01 * (grad + 0.1 * leaf))
                leaf.requires_grad_(False)
        for name in mine:
            self.assert_vectors(name)

    @rule(data=st.data(), count=st.integers(1, 3), tokens=st.sampled_from([None, 2]))
    def mix(self, data: st.DataObject, count: int, tokens: int | None) -> None:
        """Another adapter for each row."""
        world = self.world
        names = data.draw(
            st.lists(
                st.sampled_from([BASE, *sorted(world.adapters)]), min_size=count, max_size=count
            )
        )
        x = rows((count, 5) if tokens is None else (count, tokens, 5), 3)
        if world.merged:
            with pytest.raises(vera_fx.AdapterError):
                self.model(x, adapter_names=names)
            return
        with torch.no_grad():
            results = [self.model(x, adapter_names=names)]
        if {*names} <= {BASE, *(world.together or world.active)}:  # those train, if any does
            results.append(self.model(x, adapter_names=names).detach())
        for found in results:
            for row, name in enumerate(names):
                chosen = [] if name == BASE or world.disabled else [world.adapters[name]]
                assert_close(found[row], world.output(x[row], chosen), factor=20)

    @precondition(lambda self: self.world.together and not self.world.merged)
    @rule(data=st.data(), count=st.integers(1, 4), compiled=st.sampled_from([False, False, True]))
    def train_rows(self, data: st.DataObject, count: int, compiled: bool) -> None:
        """A step of several adapters, each on the rows that have its name."""
        world, x = self.world, rows((count, 5), 4)
        among = st.sampled_from([BASE, *world.together])
        names = data.draw(st.lists(among, min_size=count, max_size=count))
        y = (self.compiled if compiled else self.model)(x, adapter_names=names)
        off = bool(world.disabled)
        owns = [[] if off or name == BASE else [world.adapters[name]] for name in names]
        used = [] if off else sorted({*names} - {BASE})
        leaves = [
            t.requires_grad_() for name in used for t in world.adapters[name].tensors().values()
        ]
        expected = torch.stack([world.output(x[row], one) for row, one in enumerate(owns)])
        assert_close(y.detach(), expected.detach(), factor=20)
        if not used:
            return
        y.square().sum().backward()
        grads = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
        bank = self.model.vera
        with torch.no_grad():
            for name in world.adapters:
                for parameter in bank.adapter(name).parameters():
                    if name not in used:  # nothing of a row that is not its own
                        assert parameter.grad is None or not parameter.grad.any()
                    elif parameter.grad is not None:
                        parameter.sub_(0.01 * parameter.grad)
                    parameter.grad = None
            for leaf, grad in zip(leaves, grads, strict=True):
                if grad is not None:
                    leaf.sub_(0.01 * grad)
                leaf.requires_grad_(False)
