"""A kept capture of anything else, and a file that was written by anybody else, are never used."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import vera_fx
from tests.helpers import fill_vectors
from vera_fx import VeraConfig
from vera_fx.caching import key
from vera_fx.disk.safetensors_file import SHA256, digest
from vera_fx.errors import CaptureCacheWarning

Exports = Callable[[], int]

SOURCE = """
import math
import torch
from torch import nn

SCALE = 2.0
TABLE = {"shift": [1.0, 3.0]}

class Options:
    def __init__(self):
        self.inner = type("Inner", (), {})()
        self.inner.power = 2

def closed_over(factor):
    def function(x):
        return x * factor
    return function

def helper(x):
    return torch.tanh(x)

class Model(nn.Module):
    bias = 0.5

    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(width, 8)
        self.second = nn.Linear(8, 3)
        self.options = Options()
        self.times = closed_over(1.5)

    def forward(self, x):
        y = helper(self.first(x)) * SCALE + TABLE["shift"][1]
        return self.times(self.second(y ** self.options.inner.power)) + self.bias
"""


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a source under one name, as another process would after an edit."""
    count = iter(range(100))

    def load(source: str) -> ModuleType:
        path = tmp_path / f"source_{next(count)}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("users_model", path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["users_model"] = module
        assert spec.loader is not None
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("users_model", None)


def run(
    module: ModuleType, change: Callable[[nn.Module], Any] = lambda _: None, **made: Any
) -> Any:
    torch.manual_seed(0)
    model = module.Model(**made)
    change(model)
    vera_fx.adapt(model, VeraConfig(r=4, target_modules=["first", "second"]))
    fill_vectors(model)
    width, dtype = model.first.in_features, model.first.weight.dtype
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    return model(x)


EDITS = {
    "a function that forward calls": ("torch.tanh(x)", "torch.sin(x)"),
    "forward": ("+ self.bias", "- self.bias"),
    "a global": ("SCALE = 2.0", "SCALE = 2.5"),
    "inside of a global": ("[1.0, 3.0]", "[1.0, 4.0]"),
    "an attribute of the class": ("bias = 0.5", "bias = 0.25"),
    "an attribute two levels deep": ("power = 2", "power = 3"),
    "a closure": ("closed_over(1.5)", "closed_over(2.5)"),
    "code in a closure": ("x * factor", "x - factor"),
    "a default": (
        "self, width=6):\n        super",
        "self, width=6):\n        self.bias = 9.0; super",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_of_the_code_is_captured_anew(
    tmp_path: Path, load: Callable[[str], ModuleType], exports: Exports, what: str
) -> None:
    edited = SOURCE.replace(*EDITS[what])
    assert edited != SOURCE
    expected = run(load(edited))
    exports()

    with vera_fx.capture_cache(tmp_path / "kept"):
        before = run(load(SOURCE))
        run(load(SOURCE))
        assert exports() == 1, "the same code was captured twice"
        after = run(load(edited))
        assert exports() == 1, "a stale graph"

    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "dtype": lambda m: m.double(),
    "a layer without bias": lambda m: setattr(m, "second", nn.Linear(8, 3, bias=False)),
    "mode": lambda m: m.eval(),
    "an attribute": lambda m: setattr(m, "bias", 7.0),
    "an attribute two levels deep": lambda m: setattr(m.options.inner, "power", 1),
    "a module more": lambda m: setattr(m, "third", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_model_is_captured_anew(
    tmp_path: Path, load: Callable[[str], ModuleType], exports: Exports, what: str
) -> None:
    module, change = load(SOURCE), CHANGES[what]
    expected = run(module, change)
    exports()
    with vera_fx.capture_cache(tmp_path / "kept"):
        run(module)
        assert exports() == 1
        assert torch.equal(run(module, change), expected)
        assert exports() == 1
        assert torch.equal(run(module, change), expected)
        assert exports() == 0


def test_tied_weights_are_not_those_of_two(tmp_path: Path, exports: Exports) -> None:
    """One graph reads one tensor by one of its names: which are one must count."""

    def output(*, tied: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5)
        )
        if tied:
            model[2].weight = model[0].weight
        vera_fx.adapt(model, VeraConfig(r=4, target_modules=["4"]))
        return model(torch.linspace(-1, 1, 12).reshape(2, 6))

    expected = [output(tied=True), output(tied=False)]
    exports()
    with vera_fx.capture_cache(tmp_path):
        assert torch.equal(output(tied=True), expected[0])
        assert torch.equal(output(tied=False), expected[1])
    assert exports() == 2


def test_other_versions_and_settings_are_captured_anew(
    tmp_path: Path,
    load: Callable[[str], ModuleType],
    exports: Exports,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = load(SOURCE)
    with vera_fx.capture_cache(tmp_path / "kept"):
        run(module)
        assert exports() == 1
        for target, value in (
            ("vera_fx.caching.key.torch.__version__", "2.99.0"),
            ("vera_fx.caching.key._own", lambda: "edited"),
            ("vera_fx.caching.key.sys.version", "4.0"),
            ("vera_fx.caching.key._version", lambda _: "99"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(target, value)
                run(module)
            assert exports() == 1, target
        with monkeypatch.context() as patch:
            patch.setenv("TORCH_SOMETHING", "1")
            run(module)
        assert exports() == 1
        with torch.autocast("cpu", torch.bfloat16):
            run(module)
        assert exports() == 1
        run(module, width=7)
        assert exports() == 1
        run(module)
        assert exports() == 0


def kept_file(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


def edited(folder: Path, edit: Callable[[dict[str, Any]], None], *, signed: bool = True) -> None:
    """Change what a kept file says, with a hash that is right for it."""
    path = kept_file(folder)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    text = json.loads(metadata["vera_fx.capture"])
    edit(text)
    metadata["vera_fx.capture"] = json.dumps(text)
    if signed:
        metadata[SHA256] = digest(tensors, metadata)
    save_file(tensors, path, metadata)


def node(text: dict[str, Any], op: str) -> dict[str, Any]:
    return next(n for n in text["graph"]["nodes"] if n["op"] == op)


def call(target: str) -> Callable[[dict[str, Any]], None]:
    return lambda text: node(text, "call_function").update(target=target)


FORGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a function of Python": call("os.system"),
    "an attribute of torch": call("torch.load"),
    "an operator that reads files": call("torch.ops.aten.from_file.default"),
    "an operator of another library": call("torch.ops.profiler._record_function_enter_new.default"),
    "a guard": lambda text: text.update(relations="__import__('os').system('true') == 0"),
    "a size": lambda text: node(text, "placeholder")["val"]["shape"].__setitem__(
        0, {"size": "__import__('os').getpid()"}
    ),
    "a symbol": lambda text: text["graph"]["symbols"].update({"os.x": [2, 2, None]}),
    "a module": lambda text: node(text, "placeholder").update(op="call_module"),
    "a name": lambda text: node(text, "placeholder").update(name="x); import os; (y"),
    "a type of results": lambda text: text.update(
        out_spec={"type": "subprocess.Popen", "context": ["true"], "children": []}
    ),
    "no nodes": lambda text: text["graph"].pop("nodes"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_file_is_not_used(
    tmp_path: Path, load: Callable[[str], ModuleType], exports: Exports, what: str
) -> None:
    module = load(SOURCE)
    with vera_fx.capture_cache(tmp_path / "kept"):
        expected = run(module)
        exports()
        edited(tmp_path / "kept", FORGED[what])
        with pytest.warns(CaptureCacheWarning, match="is not used"):
            found = run(module)
    assert exports() == 1
    assert torch.equal(found, expected)


@pytest.mark.parametrize("what", ["hash", "cut", "another key", "empty"])
def test_a_damaged_file_is_not_used(
    tmp_path: Path, load: Callable[[str], ModuleType], exports: Exports, what: str
) -> None:
    module, folder = load(SOURCE), tmp_path / "kept"
    with vera_fx.capture_cache(folder):
        expected = run(module)
        exports()
        path = kept_file(folder)
        if what == "hash":
            edited(folder, lambda text: text.update(opening="NONE"), signed=False)
        elif what == "cut":
            path.write_bytes(path.read_bytes()[:-9])
        elif what == "empty":
            path.write_bytes(b"")
        else:
            run(module, width=7)
            other = next(p for p in folder.glob("*.safetensors") if p != path)
            path.write_bytes(other.read_bytes())
            exports()
        with pytest.warns(CaptureCacheWarning, match="is not used"):
            found = run(module)
    assert exports() == 1
    assert torch.equal(found, expected)


def test_the_key_reads_the_code_of_the_library() -> None:
    assert len(key._own()) == 64
    assert any(folder.name == "passes" for folder in key._folders())
