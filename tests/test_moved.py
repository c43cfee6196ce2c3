"""What version 0.1 wrote, before its modules moved into rooms, still loads and computes the same."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import vera_fx
from tests.helpers import assert_close

WRITTEN = Path(__file__).parent / "data" / "v0_1"
EXPECTED = load_file(WRITTEN / "expected.safetensors")
NAMES = ["default", "second", "__base__", "second", "default"]


def unpickled(way: str) -> Any:
    if way == "torch.load":
        return torch.load(WRITTEN / "model.pt", weights_only=False)
    return pickle.loads((WRITTEN / "model.pickle").read_bytes())


@pytest.mark.parametrize("way", ["torch.load", "pickle"])
def test_a_pickled_model_works_on(way: str, tmp_path: Path) -> None:
    model, x = unpickled(way), EXPECTED["x"]

    for name in ("second", "default"):
        vera_fx.set_adapter(model, name)
        assert_close(model(x).detach(), EXPECTED[name])
    assert_close(model(x, adapter_names=NAMES).detach(), EXPECTED["mixed"])
    vera_fx.merge(model)
    assert_close(model(x).detach(), EXPECTED["default"])
    vera_fx.unmerge(model)
    vera_fx.add_adapter(model, "third", vera_fx.VeraConfig(r=5, target_modules=["2"]))
    vera_fx.set_adapter(model, ["third", "second"])
    model.train()(x).sum().backward()
    assert model.vera.adapter("third").vectors_at("2").vera_lambda_b.grad.abs().sum() > 0
    vera_fx.delete_adapter(model, "third")
    vera_fx.save_adapter(copy.deepcopy(model), tmp_path, adapter_name="second")
    base = vera_fx.unload(model)
    assert type(base) is nn.Sequential
    assert_close(base.eval()(x), EXPECTED["mixed"][2:3].new_tensor(base(x).tolist()))


def test_a_saved_program_loads_and_takes_another_adapter() -> None:
    program = vera_fx.load_program(WRITTEN / "program.pt2")

    assert_close(program.module()(EXPECTED["x"]), EXPECTED["default"])
    assert vera_fx.program_sites(program) == ("0", "2")
    vera_fx.replace_adapter(program, WRITTEN / "adapter")
    assert_close(program.module()(EXPECTED["x"]), EXPECTED["default"])


def test_a_saved_adapter_loads() -> None:
    model = unpickled("pickle")
    base = vera_fx.unload(model)

    vera_fx.load_adapter(base, WRITTEN / "adapter")
    assert_close(base(EXPECTED["x"]).detach(), EXPECTED["default"])
