"""A store whose folder others change: what is on disk now is what serves, whoever put it there."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import vera_fx
from tests.checkpoint.test_store import WEIGHTS, assert_rows, make
from tests.helpers import assert_close, assert_far_apart
from vera_fx.serving.shared_store import SharedStore


@pytest.fixture
def world(tmp_path: Path) -> tuple[Any, SharedStore, dict[str, Any]]:
    model, _, known = make(tmp_path / "adapters", 3, capacity=3)
    return model, SharedStore(model, tmp_path / "adapters", capacity=3), known


def replace(store: SharedStore, name: str, other: str) -> None:
    """Put another adapter's files in the place of one's, as ``save_adapter`` of another process does."""
    for path in (store.folder / other).iterdir():
        copy = shutil.copy(path, store.folder / f".{path.name}")
        Path(copy).rename(store.folder / name / path.name)


def test_replaced_and_deleted_by_others(world: Any) -> None:
    model, store, known = world
    assert_rows(model, ["s0", "s1"], known)
    assert_far_apart(known["s0"], known["s2"])

    replace(store, "s0", "s2")

    assert_rows(model, ["s0", "s1"], {**known, "s0": known["s2"]})
    shutil.rmtree(store.folder / "s1")
    assert "s1" in store.loaded()
    assert "s1" not in store
    with pytest.raises(vera_fx.AdapterError, match="no adapter called 's1'"):
        store.load("s1")
    assert_rows(model, ["s0", "s2"], {**known, "s0": known["s2"]})


def test_a_file_that_is_written_to_in_place(world: Any) -> None:
    model, store, known = world
    assert_rows(model, ["s0"], known)
    bytes_of = (store.folder / "s2" / WEIGHTS).read_bytes()
    assert len(bytes_of) == (store.folder / "s0" / WEIGHTS).stat().st_size

    (store.folder / "s0" / WEIGHTS).write_bytes(bytes_of)

    assert_rows(model, ["s0"], {**known, "s0": known["s2"]})


def test_what_did_not_change_is_read_once(world: Any) -> None:
    model, store, known = world
    for _ in range(4):
        assert_rows(model, ["s0", "s1", "s0"], known)
    assert (store.counts.loads, store.counts.failures) == (2, 0)


def test_a_save_while_the_old_one_is_read(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of the old save goes on; whoever asks afterwards waits for it and reads the new one."""
    model, store, known = world
    read, inside, go_on = store._packer.read, threading.Event(), threading.Event()

    def slow(path: Path) -> Any:
        packed = read(path)
        inside.set()
        assert go_on.wait(30)
        return packed

    monkeypatch.setattr(store._packer, "read", slow)
    first = threading.Thread(target=store.load, args=("s0",))
    first.start()
    assert inside.wait(30)
    replace(store, "s0", "s2")
    second = threading.Thread(target=store.load, args=("s0",))
    second.start()
    go_on.set()
    first.join(30)
    second.join(30)

    with torch.no_grad():
        found = model(known["x"], adapter_names=["s0"] * 6)
    assert_close(found, known["s2"])
    assert store.counts.loads == 2


def test_adding_serves_what_was_added(world: Any, tmp_path: Path) -> None:
    model, store, known = world
    shutil.copytree(store.folder / "s1", tmp_path / "new")
    store.add("s9", tmp_path / "new")
    assert_rows(model, ["s9", "s0"], {**known, "s9": known["s1"]})
    assert "s9" in store
    for name in (None, 3, "../home", "nobody", ""):
        assert name not in store
