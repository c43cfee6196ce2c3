"""Rules: which adapters there are, which are on, and what is written to them and to the base."""

import contextlib
import warnings

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import vera_fx
from tests.sequences.packed import scale_weight
from tests.sequences.state import NAMES, PLANS, TARGETS, WHICH, State


class OfAdapters(State):
    """Added, switched, deleted, disabled, written to."""

    @rule(
        name=st.sampled_from(NAMES),
        r=st.integers(1, 9),
        paths=st.sampled_from(TARGETS),
        plan=st.sampled_from(PLANS),
        head=st.booleans(),
    )
    def add(self, name: str, r: int, paths: list[str], plan: str, head: bool) -> None:
        config = self.config(r, paths, plan, head=head)
        refused = name in self.world.adapters or (self.world.merged and config.modules_to_save)
        with pytest.raises(vera_fx.AdapterError) if refused else contextlib.nullcontext():
            vera_fx.add_adapter(self.model, name, config)
            self.register(name)

    @rule(chosen=st.lists(WHICH, min_size=0, max_size=2))
    def switch(self, chosen: list[int]) -> None:
        names = list(dict.fromkeys(map(self.named, chosen)))
        if any(name not in self.world.adapters for name in names) or self.world.clash(names):
            with pytest.raises(vera_fx.AdapterError):
                vera_fx.set_adapter(self.model, names)
            return
        with (
            pytest.warns(UserWarning, match="Unmerging")
            if self.world.merged
            else contextlib.nullcontext()
        ):
            vera_fx.set_adapter(self.model, names)
        self.world.unmerge()
        self.world.activate(names, together=[])

    @rule(which=WHICH)
    def delete(self, which: int) -> None:
        world, name = self.world, self.named(which)
        if name not in world.adapters or name in world.merged:
            with pytest.raises(vera_fx.AdapterError):
                vera_fx.delete_adapter(self.model, name)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vera_fx.delete_adapter(self.model, name)
        del world.adapters[name]
        world.activate([kept for kept in world.active if kept != name])

    @precondition(lambda self: len(self.blocks) < 2)
    @rule()
    def disable(self) -> None:
        block = vera_fx.disable_adapters(self.model)
        block.__enter__()
        self.blocks.append(block)
        self.world.disabled += 1

    @precondition(lambda self: self.blocks)
    @rule(every=st.sampled_from([True, True, False]))
    def enable(self, every: bool) -> None:
        for block in [self.blocks.pop() for _ in range(len(self.blocks) if every else 1)]:
            block.__exit__(None, None, None)
            self.world.enable()

    @rule(chosen=st.lists(WHICH, min_size=1, max_size=3))
    def train_together(self, chosen: list[int]) -> None:
        world, names = self.world, list(dict.fromkeys(map(self.named, chosen)))
        if not all(name in world.adapters and world.adapters[name].trainable for name in names):
            with pytest.raises(vera_fx.AdapterError):
                vera_fx.train_adapters(self.model, names)
            return
        vera_fx.train_adapters(self.model, names)
        world.activate(world.active, together=names)

    @rule(which=WHICH)
    def overwrite(self, which: int) -> None:
        name = self.named(which)
        if name not in self.world.adapters or name in self.world.merged:
            with pytest.raises(vera_fx.AdapterError):
                vera_fx.load_adapter_state_dict(self.model, {}, name)
            return
        self.write(name)

    @rule(which=WHICH, factor=st.sampled_from([-1.0, 0.5]))
    def scribble(self, which: int, factor: float) -> None:
        """Write to an adapter's tensors in place, as an optimiser does; a merge stays what it is."""
        name = self.world.merged[0] if self.world.merged else self.named(which)
        if name in self.world.adapters:
            with torch.no_grad():
                for parameter in self.model.vera.adapter(name).parameters():
                    parameter.mul_(factor)
                for tensor in self.world.adapters[name].tensors().values():
                    tensor.mul_(factor)

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.model.train(training)

    @rule(scale=st.sampled_from([1.0, 0.5]))
    def attribute(self, scale: float) -> None:
        self.model.scale = self.world.scale = scale

    @rule(dtype=st.sampled_from([torch.float64, torch.float32]))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype).to(torch.float32)

    @precondition(lambda self: not self.world.merged)
    @rule()
    def change_the_base(self) -> None:
        with torch.no_grad():
            scale_weight(self.model.lin0, -1)
        weight, bias = self.world.base["lin0"]
        self.world.base["lin0"] = (-weight, bias)

    @rule()
    def refresh(self) -> None:
        """The next call looks at everything again; nothing changes."""
        vera_fx.refresh(self.model)
