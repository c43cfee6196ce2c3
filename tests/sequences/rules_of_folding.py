"""Rules: merging and its end, copies, states, and models that are given back."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import vera_fx
from tests.helpers import assert_close
from tests.sequences.state import PLANS, WHICH, State, rows
from tests.sequences.world import KINDS


class OfFolding(State):
    """Merged, unmerged, copied, unloaded."""

    @rule(
        chosen=st.none() | st.lists(WHICH, min_size=1, max_size=2),
        keep=st.booleans(),
        asked=st.sampled_from([True, True, False]),
    )
    def merge(self, chosen: list[int] | None, keep: bool, asked: bool) -> None:
        world = self.world
        names = None if chosen is None else list(dict.fromkeys(map(self.named, chosen)))
        wanted = world.active if names is None else names
        todo = [name for name in wanted if name not in world.merged]
        unknown = any(name not in world.adapters for name in wanted)
        after = [*world.merged, *todo]
        refused = world.disabled or unknown or (world.coarse(todo) and not asked)
        if refused or world.clash(after) or world.hidden(after):
            with pytest.raises(vera_fx.AdapterError):
                vera_fx.merge(self.model, names, keep_base=keep, requantise=asked)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vera_fx.merge(self.model, names, keep_base=keep, requantise=asked)
        world.merge(todo)

    @rule()
    def unmerge(self) -> None:
        vera_fx.unmerge(self.model)
        self.world.unmerge()

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copied(self, how: str) -> None:
        """Go on with a copy, which is on even inside of blocks: these are the original's."""
        original = self.model
        if how == "deepcopy":
            self.model = copy.deepcopy(original)
        else:
            file = io.BytesIO()
            torch.save(original, file)
            file.seek(0)
            self.model = torch.load(file, weights_only=False)
        while self.blocks:
            assert vera_fx.active_adapters(original) == []
            self.blocks.pop().__exit__(None, None, None)
            self.world.enable()
        self.compile()

    @rule()
    def state_dict(self) -> None:
        """A state goes back where it is from, unless something is merged."""
        state = copy.deepcopy(self.model.state_dict())
        if self.world.merged and not self.world.disabled:
            with pytest.raises(vera_fx.CheckpointError):
                self.model.load_state_dict(state)
            return
        self.model.load_state_dict(state)

    @precondition(lambda self: self.world.adapters)
    @rule()
    def second(self) -> None:
        """A state goes into a second model of the same adapters, which then computes the same."""
        world, bank = self.world, self.model.vera
        other = KINDS[world.kind]().eval()
        for name in world.adapters:
            config = bank.adapter(name).config
            (vera_fx.add_adapter if hasattr(other, "vera") else _adapt)(other, name, config)
        state = copy.deepcopy(self.model.state_dict())
        if world.merged and not world.disabled:
            with pytest.raises(vera_fx.CheckpointError):
                other.load_state_dict(state)
            return
        other.load_state_dict(state)
        other.scale = world.scale
        vera_fx.set_adapter(other, world.active)
        x = rows((3, 5), 5)
        expected = world.output(x, [world.adapters[name] for name in world.active])
        assert_close(other(x).detach(), expected.detach(), factor=20)

    @precondition(lambda self: not self.blocks)
    @rule(r=st.integers(1, 9), plan=st.sampled_from(PLANS))
    def unload(self, r: int, plan: str) -> None:
        """Give the model back, and adapt it anew."""
        vera_fx.unload(self.model)
        world = self.world
        world.unmerge()
        world.adapters.clear()
        self.follow_base()
        assert type(self.model) is KINDS[world.kind]
        x = rows((3, 5), 1)
        assert_close(self.model(x).detach(), world.output(x, []), factor=20)
        vera_fx.adapt(
            self.model, self.config(r, ["lin0", "lin1"], plan, head=False), adapter_name="a"
        )
        self.compile()
        self.register("a")
        world.activate(["a"], together=[])


def _adapt(model: Any, name: str, config: Any) -> None:
    vera_fx.adapt(model, config, adapter_name=name)
