"""An adapter's name is ``adapter_name`` in every public function; several are ``adapter_names``."""

import inspect
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vera_fx
from tests.helpers import fill_vectors
from vera_fx._renamed import renamed

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
CONFIG = vera_fx.VeraConfig(r=4, target_modules=["0", "2"])
FUNCTIONS = [f for name in vera_fx.__all__ if inspect.isfunction(f := getattr(vera_fx, name))]


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).eval()
    vera_fx.adapt(model, CONFIG)
    vera_fx.add_adapter(model, "other", CONFIG)
    fill_vectors(model)
    return model


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_one_word_for_an_adapters_name(function: Callable[..., Any]) -> None:
    given = inspect.signature(function).parameters

    assert not {"name", "names", "adapter", "adapters"} & given.keys()
    if "adapter_name" in given:
        assert given["adapter_name"].annotation in {str, str | None}
        assert "adapter_names" not in given
    documented = inspect.getdoc(function) or ""
    assert not re.search(r"^ +(name|names|adapter): ", documented, re.MULTILINE)


RENAMED: list[tuple[str, dict[str, Any], str, Any]] = [
    ("add_adapter", {"config": CONFIG}, "name", "third"),
    ("delete_adapter", {}, "name", "other"),
    ("adapter_state_dict", {}, "name", "other"),
    ("load_adapter_state_dict", {"state": None}, "name", "other"),
    ("set_adapter", {}, "names", "other"),
    ("set_trainable", {"trainable": False}, "names", ["other"]),
    ("merge", {}, "names", "other"),
    ("save_adapters", {"directory": None}, "names", ["other"]),
    ("to_lora", {"directory": None}, "adapter", "other"),
    ("lora_errors", {"rank": 2}, "adapter", "other"),
    ("program_vectors", {}, "name", "other"),
    ("export_program", {"args": (X,)}, "adapter", "other"),
]


@pytest.mark.parametrize(("function", "more", "old", "value"), RENAMED, ids=lambda v: str(v)[:20])
def test_old_names_still_work(
    function: str, more: dict[str, Any], old: str, value: Any, tmp_path: Path
) -> None:
    states: list[dict[str, Any]] = []
    for keyword in (old, _new(function, old)):
        model = adapted()
        given = dict(more)
        if "directory" in given:
            given["directory"] = tmp_path / keyword
        if "state" in given:
            state = vera_fx.adapter_state_dict(model, "other")
            given["state"] = {k: t * (1 + ("lambda" in k)) for k, t in state.items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DeprecationWarning)
            getattr(vera_fx, function)(model, **given, **{keyword: value})
        ours = [str(w.message) for w in caught if "is called adapter_name" in str(w.message)]
        assert len(ours) == (keyword == old)
        assert all(w.filename == __file__ for w in caught if str(w.message) in ours)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def _new(function: str, old: str) -> str:
    given = inspect.signature(getattr(vera_fx, function)).parameters
    assert old not in given
    (new,) = {"adapter_name", "adapter_names"} & given.keys()
    return new


def test_a_store_has_the_same_words() -> None:
    store = vera_fx.AdapterStore
    for name in ("load", "drop", "add", "delete"):
        assert "adapter_name" in inspect.signature(getattr(store, name)).parameters
    for name in ("take", "pinned"):
        assert "adapter_names" in inspect.signature(getattr(store, name)).parameters
    folder = object.__new__(store)
    folder._lock, folder._loaded = threading.Lock(), OrderedDict(other=1)
    with pytest.warns(DeprecationWarning, match=r"drop\(name=...\) is called adapter_name now"):
        folder.drop(name="other")
    assert not folder._loaded


def test_both_names_at_once_are_refused() -> None:
    @renamed(name="adapter_name")
    def function(adapter_name: str) -> str:
        return adapter_name

    assert function("a") == "a"
    with (
        pytest.warns(DeprecationWarning, match=r"function\(name=...\) is called adapter_name now"),
        pytest.raises(TypeError, match="'adapter_name' and its old name 'name' at once"),
    ):
        function(adapter_name="a", name="b")  # type: ignore[call-arg]
