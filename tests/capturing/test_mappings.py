"""Mappings as arguments: ``BatchEncoding`` and everything else that reads like a dictionary."""

import copy
from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_vectors, hook_reference

CONFIG = vera_fx.VeraConfig(r=4, target_modules=["lin"])


class Own(Mapping[str, Any]):
    """A mapping that is nothing else."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Reader(nn.Module):
    def __init__(self, *, attributes: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 5)
        self.attributes = attributes

    def forward(self, batch: Any, scale: float = 1.0) -> dict[str, Tensor]:
        x = batch.x if self.attributes else batch["x"]
        if "mask" in batch:
            x = x * batch["mask"][:, None]
        return {"y": self.lin(x) * scale, **{k: v for k, v in batch.items() if k != "x"}}


def encoding(values: Mapping[str, Any]) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding(dict(values))


def batch_of(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {"x": torch.randn(rows, 6, generator=generator), "mask": torch.arange(rows) % 2}


@pytest.mark.parametrize("make", [dict, OrderedDict, UserDict, Own, encoding])
@pytest.mark.parametrize("by_name", [False, True])
def test_every_mapping_is_one_graph(make: Any, by_name: bool) -> None:
    torch.manual_seed(0)
    base = Reader()
    model = vera_fx.adapt(copy.deepcopy(base), CONFIG)
    fill_vectors(model)
    oracle = hook_reference(base, model)
    for rows in (3, 5):
        given = make(batch_of(rows))
        result = model(batch=given) if by_name else model(given)
        assert_close(result["y"], oracle(given)["y"])
        assert_far_apart(result["y"], base(given)["y"])
        assert torch.equal(result["mask"], batch_of(rows)["mask"])
        assert list(given) == ["x", "mask"]
    assert len(vera_fx.explain(model).graphs) == 1
    # Other keys are another signature.
    only = make({"x": batch_of(3)["x"]})
    assert_close(model(only)["y"], oracle(only)["y"])
    assert len(vera_fx.explain(model).graphs) == 2


def test_attributes_of_an_encoding_are_read() -> None:
    torch.manual_seed(0)
    base = Reader(attributes=True)
    model = vera_fx.adapt(copy.deepcopy(base), CONFIG)
    fill_vectors(model)
    given = encoding(batch_of(4))

    assert_close(model(given)["y"], hook_reference(base, model)(given)["y"])
    assert vera_fx.explain(model).graphs


def test_a_part_of_a_model_is_told_from_a_model() -> None:
    class Halting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Reader()

        def forward(self, batch: Any) -> Tensor:
            y = self.part(batch)["y"]
            return y if y.sum() * 0 < 1 else -y

    model = vera_fx.adapt(Halting(), CONFIG)
    with pytest.warns(vera_fx.PartialCaptureWarning):
        model(encoding(batch_of(3)))
    for function in (vera_fx.explain, vera_fx.merge, vera_fx.adapter_names, vera_fx.unload):
        with pytest.raises(vera_fx.AdapterError, match="this Reader is a part of an adapted model"):
            function(model.part)
