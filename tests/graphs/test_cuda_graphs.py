"""A switch of adapters records no CUDA graph anew, and a static cache stops none from being recorded.

On the CPU, by `Replays`; ``tests/gpu/test_cuda_graphs.py`` has the same on a device that records them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.graphs.replays import Replays
from tests.helpers import assert_close, assert_far_apart, fill_adapters, vectors_of
from tests.models import llama, text_inputs
from vera_fx.bank import slots

ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {},
    "same": {},
    "other seed": {"projection_prng_key": 5},
    "other rank": {"r": 4},
}
RANKS = 2


def adapted(adapters: dict[str, dict[str, Any]], **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    base, options = llama(1), {"r": 6, "target_modules": "all-linear", **fields}
    for name, own in adapters.items():
        config = vera_fx.VeraConfig(**{**options, **own})
        if name == next(iter(adapters)):
            vera_fx.adapt(base, config, adapter_name=name)
        else:
            vera_fx.add_adapter(base, name, config)
    fill_adapters(base)
    return base.eval()


class Recorded:
    """A model compiled for CUDA graphs."""

    def __init__(self, model: nn.Module) -> None:
        torch._dynamo.reset()
        model.vera.rebind()
        self.model, self.replays = model, Replays()
        self.call = torch.compile(model, fullgraph=True, backend=self.replays)

    @contextlib.contextmanager
    def recording(self, number: int) -> Iterator[None]:
        """The block records so many graphs, compiles nothing and leaves nothing unrecorded."""
        before = self.replays.recorded
        with torch.compiler.set_stance("fail_on_recompile"):
            yield
        assert self.replays.recorded - before == number
        assert not self.replays.skipped


def served(recorded: Recorded, names: Any) -> None:
    """Serve each adapter; results are those of the same model without CUDA graphs."""
    results = []
    with torch.no_grad():
        for name in names:
            vera_fx.set_adapter(recorded.model, name)
            results.append(recorded.call(**text_inputs()).logits.clone())
            assert_close(results[-1], recorded.model(**text_inputs()).logits, factor=20)
    for result, before in zip(results[1:], results, strict=False):
        assert_far_apart(result, before)


def test_serving_any_adapter_replays_what_its_rank_recorded() -> None:
    recorded = Recorded(adapted(ADAPTERS))
    served(recorded, ["first", "other rank"])
    assert recorded.replays.recorded == RANKS
    with recorded.recording(0):
        served(recorded, ["same", "other seed", "other rank", "first", "same"])
    (function,) = recorded.replays.functions[-1:]
    assert len(function.static) >= len([*recorded.model.model.parameters()])


def trained(recorded: Recorded, names: Any) -> None:
    """A step of each adapter; gradients are those of the same model without CUDA graphs."""
    model = recorded.model
    for name in names:
        vera_fx.set_adapter(model, name)
        vectors = {n: p for n, p in vectors_of(model).items() if p.requires_grad}
        loss = recorded.call(**text_inputs()).loss
        found = torch.autograd.grad(loss, vectors.values())
        found = [gradient.clone() for gradient in found]
        expected = torch.autograd.grad(model(**text_inputs()).loss, vectors.values())
        for gradient, wanted, (key, vector) in zip(found, expected, vectors.items(), strict=True):
            assert_close(gradient, wanted, factor=50, what=f"{name}: {key}")
            with torch.no_grad():
                vector.sub_(
                    0.1 * gradient
                )  # in place, as optimisers do: the next replay must see it


@pytest.mark.parametrize("plan", ["factored", "scaled", "merged"])
def test_training_any_adapter_replays_what_its_rank_recorded(plan: str) -> None:
    recorded = Recorded(adapted(ADAPTERS, plan=plan))
    trained(recorded, ["first", "other rank"])
    with recorded.recording(0):
        trained(recorded, ["same", "first", "other seed", "other rank", "same"])
    assert any(function.backward for function in recorded.replays.functions)


def test_heads_and_biases_of_adapters() -> None:
    model = adapted(
        {"plain": {}, "head": {"modules_to_save": ["lm_head"]}, "norm": {"modules_to_save": ["norm"]}},
        target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    recorded = Recorded(model)
    served(recorded, ["plain"])
    with recorded.recording(0):
        served(recorded, ["head", "norm", "plain", "head"])


def decoded(recorded: Recorded, names: Any) -> list[Tensor]:
    """One token for each adapter, in one static cache that eager code has filled."""
    from transformers import StaticCache

    ids = text_inputs()["input_ids"]
    results = []
    with torch.no_grad():
        caches = [StaticCache(recorded.model.config, max_cache_len=16) for _ in range(2)]
        first = [recorded.model(input_ids=ids, past_key_values=c, use_cache=True) for c in caches]
        token = first[0].logits[:, -1:].argmax(-1)
        addresses = [layer.keys.data_ptr() for layer in caches[0].layers]
        for name in names:
            vera_fx.set_adapter(recorded.model, name)
            found, expected = (
                call(input_ids=token, past_key_values=cache, use_cache=True).logits
                for call, cache in zip((recorded.call, recorded.model), caches, strict=True)
            )
            results.append(found.clone())
            assert_close(found, expected, factor=20)
            token = expected.argmax(-1)
        assert [layer.keys.data_ptr() for layer in caches[0].layers] == addresses
    return results


def test_decoding_writes_to_a_static_cache_in_place() -> None:
    recorded = Recorded(adapted(ADAPTERS))
    decoded(recorded, ["first", "other rank"])
    assert not recorded.replays.skipped
    # Another cache has other addresses, and is recorded once for each rank; a switch never is.
    with recorded.recording(RANKS):
        results = decoded(recorded, ["first", "same", "other rank", "other seed", "same", "first"])
    assert_far_apart(results[0], results[1])
    assert not any(function.empty for function in recorded.replays.functions)


def test_what_is_marked_is_what_makes_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without marks every adapter is recorded: the tests above would see it."""
    monkeypatch.setattr(slots, "ordinary_input", lambda tensor: None)
    recorded = Recorded(adapted(ADAPTERS))
    served(recorded, ["first", "same", "other seed"])
    assert recorded.replays.recorded == 3


def test_large_tensors_are_recorded_for_each_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(
        {"one": {"modules_to_save": ["lm_head"]}, "two": {"modules_to_save": ["lm_head"]}}
    )
    monkeypatch.setattr(slots, "COPIED_BYTES", model.lm_head.weight.nbytes - 1)
    recorded = Recorded(model)
    served(recorded, ["one", "two"])
    assert recorded.replays.recorded == 2
    with recorded.recording(0):
        served(recorded, ["one", "two", "one"])


def test_one_set_of_projections_is_read_where_it_is() -> None:
    recorded = Recorded(adapted({"first": {}, "same": {}}))
    served(recorded, ["first", "same"])
    (function,) = recorded.replays.functions
    ((recording,),) = function.recordings.values()
    projections = [b.data_ptr() for n, b in recorded.model.named_buffers() if "vera_" in n]
    assert len(projections) == 2
    assert {*projections} <= {*recording.static}
    vectors = {p.data_ptr() for p in vectors_of(recorded.model).values()}
    assert not vectors & {*recording.static}
