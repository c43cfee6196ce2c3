"""A disk that is full or read-only: the library's error, the process lives, files stay as they were."""

import contextlib
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vera_fx
from tests.export.export_models import adapted, call_of

WRITERS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "p.pt2": lambda model, path: vera_fx.save_program(
        vera_fx.export_program(model, kwargs=call_of("mlp")), path
    ),
    "m.onnx": lambda model, path: vera_fx.export_onnx(model, path, kwargs=call_of("mlp")),
    "external.onnx": lambda model, path: vera_fx.export_onnx(
        model, path, kwargs=call_of("mlp"), external_data=True
    ),
    "adapter_model.safetensors": lambda model, path: vera_fx.to_lora(model, path.parent),
}
ERRORS = (vera_fx.ExportError, vera_fx.CheckpointError)


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to write further, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name: str, tmp_path: Path) -> None:
    _, model = adapted("mlp")
    target = tmp_path / name
    target.write_text("old")
    with files_up_to(700), pytest.raises(ERRORS, match="File too large"):
        WRITERS[name](model, target)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert target.read_text() == "old"
    WRITERS[name](model, target)
    assert target.stat().st_size > 700


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a compiler")
def test_a_full_disk_for_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import package

    _, model = adapted("mlp")
    write = package.package_aoti

    def limited(*args: Any) -> Any:  # the build itself needs room in its own folder
        with files_up_to(700):
            return write(*args)

    monkeypatch.setattr(package, "package_aoti", limited)
    (tmp_path / "p.pt2").write_text("old")
    with pytest.raises(vera_fx.ExportError, match="File too large"):
        vera_fx.export_aoti(model, tmp_path / "p.pt2", kwargs=call_of("mlp"))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("p.pt2", "old")]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_is_read_only(name: str) -> None:
    _, model = adapted("mlp")
    with pytest.raises(ERRORS, match="/proc"):
        WRITERS[name](model, Path("/proc") / name)


def test_a_large_program_is_whole(tmp_path: Path) -> None:
    """Torch's writer hands over memory of its own, which must be written before it is used again."""
    model = nn.Sequential(nn.Linear(700, 900), nn.Tanh(), nn.Linear(900, 300))
    config = vera_fx.VeraConfig(r=8, target_modules=["0", "2"])
    vera_fx.adapt(model, config).eval()
    program = vera_fx.export_program(model, (torch.randn(3, 700),), form="constant")
    loaded = torch.export.load(vera_fx.save_program(program, tmp_path / "p.pt2"))
    assert program.state_dict.keys() == loaded.state_dict.keys()
    assert all(torch.equal(v, loaded.state_dict[k]) for k, v in program.state_dict.items())
