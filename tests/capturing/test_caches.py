"""Key-value caches: windows that fill up, static ones, ones that the user holds."""

import threading
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import vera_fx
from tests.helpers import peft_pair
from tests.models import mistral
from vera_fx.base.hf_tracing import traceable
from vera_fx.capturing.open_integers import integers_as_sizes, sizes_as_integers

WINDOW = 5


def windowed() -> nn.Module:
    return mistral(1, WINDOW).eval()


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    return peft_pair(windowed(), plan="factored", target_modules=["q_proj", "v_proj", "down_proj"])


def prompt(length: int, *, padded: bool = False) -> dict[str, Any]:
    ids = torch.randint(3, 90, (3, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0 if padded else 1
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return {"input_ids": ids, "attention_mask": mask, **options}


def graphs(model: nn.Module) -> int:
    return len(vera_fx.explain(model).graphs)


class TestWindows:
    def test_one_graph_until_the_window_is_full_and_one_after(self, pair) -> None:
        theirs, ours = pair
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no advice about captures
            for length, new, captures in ((2, 3, 2), (2, 4, 3), (2, 12, 3), (3, 20, 3), (9, 9, 4)):
                call = {**prompt(length), "max_new_tokens": new}
                assert torch.equal(ours.generate(**call), theirs.generate(**call)), length
                # Prompt, open window, full window; and prompts longer than the window.
                assert graphs(ours) == captures, (length, new)
        call = {**prompt(3), "max_new_tokens": 9, "num_beams": 3}
        assert torch.equal(ours.generate(**call), theirs.generate(**call))
        assert graphs(ours) == 4

    def test_padded_prompts(self, pair) -> None:
        theirs, ours = pair
        for length in (2, 4, 6, 3):
            call = {**prompt(length, padded=True), "max_new_tokens": 9}
            assert torch.equal(ours.generate(**call), theirs.generate(**call)), length
        assert graphs(ours) <= 5  # the mask is cut from the first token beyond the window on

    def test_the_users_cache_counts_on(self, pair) -> None:
        chunks = [prompt(length)["input_ids"] for length in (2, 1, 1, 3, 1, 6, 1, 1)]
        results = []
        for model in pair:
            cache = DynamicCache(config=windowed().config)
            outputs = []
            for ids in chunks:
                with torch.no_grad():
                    result = model(input_ids=ids, past_key_values=cache)
                assert result.past_key_values is cache
                assert type(cache.layers[0]) is DynamicSlidingWindowLayer
                assert type(cache.layers[0].cumulative_length) is int
                outputs.append((result.logits, cache.layers[0].keys, cache.get_seq_length()))
            results.append(outputs)
        for number, ((logits, keys, length), expected) in enumerate(zip(*results, strict=True)):
            assert torch.equal(logits, expected[0]), number
            assert torch.equal(keys, expected[1]), number
            assert length == expected[2] == sum(ids.shape[1] for ids in chunks[: number + 1])

    def test_a_cropped_cache(self, pair) -> None:
        results = []
        for model in pair:
            cache = DynamicCache(config=windowed().config)
            with torch.no_grad():
                model(
                    **{k: v for k, v in prompt(4).items() if k.endswith("ids")},
                    past_key_values=cache,
                )
                cache.crop(-2)
                results.append(model(prompt(1)["input_ids"], past_key_values=cache).logits)
        assert torch.equal(*results)

    def test_prompt_lookup_keeps_what_falls_out_of_the_window(self, pair) -> None:
        theirs, ours = pair
        call = {k: v[:1] if isinstance(v, Tensor) else v for k, v in prompt(4).items()}
        call |= {"max_new_tokens": 9, "prompt_lookup_num_tokens": 3}
        assert torch.equal(ours.generate(**call), theirs.generate(**call))

    def test_compiled_without_recompiles(self, pair, fresh_dynamo) -> None:
        theirs, ours = pair
        counter = CompileCounterWithBackend("aot_eager")
        ours.compile(fullgraph=True, backend=counter)

        def run(length: int, new: int) -> None:
            call = {**prompt(length), "max_new_tokens": new}
            assert torch.equal(ours.generate(**call), theirs.generate(**call)), (length, new)

        for length, new in ((2, 5), (3, 9), (7, 4), (9, 4)):
            run(length, new)
        with torch.compiler.set_stance("fail_on_recompile"):
            for length, new in ((4, 20), (8, 9), (2, 3)):
                run(length, new)
        assert not fresh_dynamo["graph_break"]
        assert counter.frame_count <= 2 * graphs(ours)

    def test_rows_with_adapters_of_their_own(self, pair) -> None:
        _, ours = pair
        vera_fx.add_adapter(ours, "other")
        with torch.no_grad():
            for p in ours.vera.adapters["other"].parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        # The window's size is the number of rows at one of the steps: no size is taken for rows.
        call = {**prompt(2), "max_new_tokens": 6}
        mixed = ours.generate(**call, adapter_names=["other", "default", "__base__"])
        default = ours.generate(**call)
        vera_fx.set_adapter(ours, "other")
        other = ours.generate(**call)
        assert torch.equal(mixed[0], other[0])
        assert torch.equal(mixed[1], default[1])
        assert not torch.equal(default[1], other[1])


@given(
    window=st.integers(2, 8),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    record=st.booleans(),
)
def test_the_traceable_methods_are_exact(window: int, chunks: list[int], record: bool) -> None:
    theirs, ours = DynamicSlidingWindowLayer(window), DynamicSlidingWindowLayer(window)
    theirs.record_past = ours.record_past = record
    for number, length in enumerate(chunks):
        new = torch.arange(length, dtype=torch.float32).view(1, 1, length, 1) + 10 * number
        expected = (theirs.get_mask_sizes(length), *theirs.update(new, -new), theirs.keys)
        with traceable(), traceable():
            actual = (ours.get_mask_sizes(length), *ours.update(new, -new), ours.keys)
        assert actual[0] == expected[0]
        assert all(torch.equal(a, e) for a, e in zip(actual[1:], expected[1:], strict=True))
        assert torch.equal(ours.values, theirs.values)
        assert ours.cumulative_length == theirs.cumulative_length


def test_transformers_is_left_as_it_was() -> None:
    before = dict(vars(DynamicSlidingWindowLayer))
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with traceable():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    with traceable():
        assert vars(DynamicSlidingWindowLayer)["update"] is not before["update"]
    leave.set()
    thread.join()
    assert dict(vars(DynamicSlidingWindowLayer)) == before


def test_open_integers_travel_as_sizes() -> None:
    layers = [SimpleNamespace(cumulative_length=4, kept=3, flag=True) for _ in range(2)]
    cache = SimpleNamespace(layers=layers, other=[1, 2])
    sizes = integers_as_sizes(cache)
    assert cache.layers[0].cumulative_length == 4
    assert sizes.other is cache.other
    assert [layer.cumulative_length.shape for layer in sizes.layers] == [(0, 4)] * 2
    sizes_as_integers(sizes)
    assert sizes == cache
    plain = SimpleNamespace(layers=[], cumulative_length=torch.tensor(3))
    assert integers_as_sizes(plain) is plain
    sizes_as_integers(plain)
    assert torch.equal(plain.cumulative_length, torch.tensor(3))


class TestStatic:
    def test_one_graph_for_every_length(self, pair) -> None:
        theirs, ours = pair
        for length, new in ((3, 9), (2, 14), (4, 3)):
            call = {**prompt(length), "max_new_tokens": new, "cache_implementation": "static"}
            assert torch.equal(ours.generate(**call), theirs.generate(**call)), (length, new)
        assert graphs(ours) <= 4

    def test_the_users_cache_is_written_in_place(self, pair) -> None:
        ids, results = prompt(3)["input_ids"], []
        for model in pair:
            cache = StaticCache(config=windowed().config, max_cache_len=16)
            with torch.no_grad():
                model(ids, past_key_values=cache)
                keys = cache.layers[0].keys
                logits = [model(ids[:, :1], past_key_values=cache).logits for _ in range(4)]
            assert cache.layers[0].keys is keys or torch.equal(cache.layers[0].keys, keys)
            results.append([*logits, cache.layers[0].keys, cache.layers[0].values])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_part_of_a_larger_tensor_is_an_input_like_any_other() -> None:
    """Contiguous but for strides that do not matter, as a cropped cache of batch size 1 is."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x.view(-1, 4).flatten().view(x.shape)).transpose(1, 2)

    model = vera_fx.adapt(Flat(), vera_fx.VeraConfig(r=2, target_modules=["lin"]))
    part = torch.randn(1, 9, 4)[:, :6]
    same = part.flatten().view(part.shape)
    assert part.is_contiguous()
    assert part.stride() != same.stride()
    assert torch.equal(model(part), model(same))
    assert graphs(model) == 1
