"""What a sequence of calls works on: the model, and the world of plain data beside it."""

import contextlib
import functools
import tempfile
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize
from torch import Tensor

import vera_fx
from tests.helpers import assert_close
from tests.sequences.packed import STAND_IN, weight_in
from tests.sequences.world import KINDS, WIDTHS, World, own
from vera_fx.products import backends

NAMES = ("a", "b", "c")
PLANS = ("auto", "factored", "merged", "scaled", "dense")
TARGETS = (["lin0"], ["lin1"], ["lin0", "lin1"], ["lin0", "lin1", "head"])

WHICH = st.integers(0, 9)
"""Says which adapter a rule is about: mostly one that there is."""


def rows(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def cache_folder() -> tempfile.TemporaryDirectory[str]:
    """One for all sequences of a process: later ones read what earlier ones captured."""
    return tempfile.TemporaryDirectory()


class State(RuleBasedStateMachine):
    """The model and its world side by side."""

    ends: contextlib.ExitStack | None = None

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        r=st.integers(1, 9),
        paths=st.sampled_from(TARGETS[:3]),
        plan=st.sampled_from(PLANS),
        head=st.booleans(),
    )
    def adapt(self, kind: str, r: int, paths: list[str], plan: str, head: bool) -> None:
        torch.manual_seed(7)
        self.ends = contextlib.ExitStack()
        known = (STAND_IN, *backends.BACKENDS)
        self.ends.enter_context(mock.patch.object(backends, "BACKENDS", known))
        self.model: Any = KINDS[kind]().eval()
        layers = ((path, self.model.get_submodule(path)) for path in WIDTHS)
        base = {path: (weight_in(m).clone(), m.bias.detach().clone()) for path, m in layers}
        self.world = World(kind, base)
        self.blocks: list[Any] = []
        self.seed = self.exports = 0
        self.cache: Any = None
        config = self.config(r, paths, plan, head=head)
        assert vera_fx.adapt(self.model, config, adapter_name="a") is self.model
        self.compile()
        self.register("a")
        self.world.activate(["a"])

    def config(self, r: int, targets: list[str], plan: str, *, head: bool) -> vera_fx.VeraConfig:
        if self.world.packed(targets):  # the plans that read weights are refused there
            plan = {"merged": "scaled", "dense": "factored"}.get(plan, plan)
        saved = ["head"] if head and "head" not in targets else None
        return vera_fx.VeraConfig(
            r=r, target_modules=targets, plan=plan, modules_to_save=saved, projection_prng_key=r % 2
        )

    def named(self, which: int) -> str:
        """An adapter's name; sometimes one that there may not be."""
        known = sorted(self.world.adapters)
        return NAMES[which % 3] if which == 9 or not known else known[which % len(known)]

    def compile(self) -> None:
        self.compiled = torch.compile(self.model, backend="eager")

    def register(self, name: str) -> None:
        """Note a new adapter, with vectors that are far from their first values."""
        self.world.adapters[name] = own(vera_fx.adapter_state_dict(self.model, name))
        self.write(name)

    def write(self, name: str) -> None:
        self.seed += 1
        one = self.world.adapters[name]
        new = {
            key: rows(tuple(t.shape), self.seed + i) / 2
            for i, (key, t) in enumerate(one.tensors().items())
        }
        vera_fx.load_adapter_state_dict(self.model, new, name)
        self.world.adapters[name] = own(
            {**new, "base_model.vera_A": one.A, "base_model.vera_B": one.B}
        )
        self.world.adapters[name].trainable = one.trainable
        self.world.adapters[name].learns = one.learns

    def assert_vectors(self, name: str) -> None:
        state = vera_fx.adapter_state_dict(self.model, name)
        for key, tensor in self.world.adapters[name].tensors().items():
            assert_close(state[key], tensor.detach(), factor=20, what=f"{name} {key}")

    def follow_base(self) -> None:
        """The base is what it was; to rounding, where weights were computed back."""
        for path, pair in self.world.base.items():
            layer = self.model.get_submodule(path)
            now = (weight_in(layer).clone(), layer.bias.detach().clone())
            for found, expected in zip(now, pair, strict=True):
                assert_close(found, expected, factor=50, what=path)
            self.world.base[path] = now

    def leave_cache(self) -> None:
        if self.cache is not None:
            self.cache.remove()
            self.cache = None

    def teardown(self) -> None:
        torch._dynamo.reset()
        if self.ends is not None:
            self.leave_cache()
            self.ends.close()
