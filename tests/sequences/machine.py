"""Any sequence of calls of the public API, held against a world of plain data."""

import contextlib
import copy
import io
import tempfile
import warnings
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close
from tests.sequences.world import BASE, KINDS, WIDTHS, World, own

NAMES = ("a", "b", "c")
PLANS = ("auto", "factored", "merged", "scaled", "dense")
TARGETS = (["lin0"], ["lin1"], ["lin0", "lin1"], ["lin0", "lin1", "head"])
SHAPES = ((5,), (3, 5), (1, 5), (0, 5), (2, 3, 5), (2, 0, 5), (2, 1, 2, 5))
MODES = ("grad", "no_grad", "inference_mode", "autocast")


def rows(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WHICH = st.integers(0, 9)
"""Says which adapter a rule is about: mostly one that there is."""


class Machine(RuleBasedStateMachine):
    """The model and its world side by side."""

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        r=st.integers(1, 9),
        paths=st.sampled_from(TARGETS[:3]),
        plan=st.sampled_from(PLANS),
        head=st.booleans(),
    )
    def adapt(self, kind: str, r: int, paths: list[str], plan: str, head: bool) -> None:
        torch.manual_seed(7)
        self.model: Any = KINDS[kind]().eval()
        layers = ((path, self.model.get_submodule(path)) for path in WIDTHS)
        base = {path: (m.weight.detach().clone(), m.bias.detach().clone()) for path, m in layers}
        self.world = World(kind, base)
        self.blocks: list[Any] = []
        self.seed = 0
        config = self.config(r, paths, plan, head=head)
        assert vera_fx.adapt(self.model, config, adapter_name="a") is self.model
        self.compile()
        self.register("a")
        self.world.activate(["a"])

    def config(self, r: int, targets: list[str], plan: str, *, head: bool) -> vera_fx.VeraConfig:
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

    # --- the rules ---------------------------------------------------------------------------------

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

    @rule(chosen=st.none() | st.lists(WHICH, min_size=1, max_size=2), keep=st.booleans())
    def merge(self, chosen: list[int] | None, keep: bool) -> None:
        world = self.world
        names = None if chosen is None else list(dict.fromkeys(map(self.named, chosen)))
        wanted = world.active if names is None else names
        todo = [name for name in wanted if name not in world.merged]
        unknown = any(name not in world.adapters for name in wanted)
        after = [*world.merged, *todo]
        if world.disabled or unknown or world.clash(after) or world.hidden(after):
            with pytest.raises(vera_fx.AdapterError):
                vera_fx.merge(self.model, names, keep_base=keep)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vera_fx.merge(self.model, names, keep_base=keep)
        world.merge(todo)

    @rule()
    def unmerge(self) -> None:
        vera_fx.unmerge(self.model)
        self.world.unmerge()

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

    @precondition(lambda self: len(self.world.adapters) < len(NAMES) and self.world.adapters)
    @rule(data=st.data(), trainable=st.booleans())
    def save_and_load(self, data: st.DataObject, trainable: bool) -> None:
        world = self.world
        source = data.draw(st.sampled_from(sorted(world.adapters)))
        name = data.draw(st.sampled_from([n for n in NAMES if n not in world.adapters]))
        with tempfile.TemporaryDirectory() as folder:
            vera_fx.save_adapter(self.model, folder, adapter_name=source)
            vera_fx.load_adapter(self.model, folder, adapter_name=name, trainable=trainable)
        world.adapters[name] = world.adapters[source].copied()
        world.adapters[name].trainable = world.adapters[name].learns = trainable
        if not world.active:
            world.activate([name])

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.model.train(training)

    @rule(scale=st.sampled_from([1.0, 0.5]))
    def attribute(self, scale: float) -> None:
        self.model.scale = self.world.scale = scale

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

    @rule(dtype=st.sampled_from([torch.float64, torch.float32]))
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype).to(torch.float32)

    @precondition(lambda self: not self.world.merged)
    @rule()
    def change_the_base(self) -> None:
        with torch.no_grad():
            self.model.lin0.weight.mul_(-1)
        weight, bias = self.world.base["lin0"]
        self.world.base["lin0"] = (-weight, bias)

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

    @rule(chosen=st.lists(WHICH, min_size=1, max_size=3))
    def train_together(self, chosen: list[int]) -> None:
        world, names = self.world, list(dict.fromkeys(map(self.named, chosen)))
        if not all(name in world.adapters and world.adapters[name].trainable for name in names):
            with pytest.raises(vera_fx.AdapterError):
                vera_fx.train_adapters(self.model, names)
            return
        vera_fx.train_adapters(self.model, names)
        world.activate(world.active, together=names)

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

    # --- what always holds ------------------------------------------------------------------------

    def assert_vectors(self, name: str) -> None:
        state = vera_fx.adapter_state_dict(self.model, name)
        for key, tensor in self.world.adapters[name].tensors().items():
            assert_close(state[key], tensor.detach(), factor=20, what=f"{name} {key}")

    def follow_base(self) -> None:
        """The base is what it was; to rounding, where weights were computed back."""
        for path, pair in self.world.base.items():
            layer: nn.Linear = self.model.get_submodule(path)
            now = (layer.weight.detach().clone(), layer.bias.detach().clone())
            for found, expected in zip(now, pair, strict=True):
                assert_close(found, expected, factor=50, what=path)
            self.world.base[path] = now

    @invariant()
    def base_is_what_it_was(self) -> None:
        if self.world.disabled or not self.world.merged:
            self.follow_base()

    @invariant()
    def says_what_is_on(self) -> None:
        world = self.world
        assert sorted(vera_fx.adapter_names(self.model)) == sorted(world.adapters)
        assert vera_fx.active_adapters(self.model) == ([] if world.disabled else world.active)
        assert list(self.model.vera.merged) == world.merged
        found = vera_fx.explain(self.model)
        assert list(found.active) == world.computing()
        assert list(found.merged) == ([] if world.disabled else world.merged)
        assert found.disabled == bool(world.disabled)
        training = {n for n, p in self.model.named_parameters() if p.requires_grad}
        assert {n.split(".")[2] for n in training} == set(world.trained())
        assert len(training) == sum(map(len, world.trained().values()))

    @invariant()
    def vectors_are_their_own(self) -> None:
        for name in self.world.adapters:
            self.assert_vectors(name)

    def teardown(self) -> None:
        torch._dynamo.reset()
