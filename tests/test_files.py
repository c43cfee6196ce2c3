"""Files that appear whole or not at all: locks, leftovers of killed writers, the order of flushes."""

import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import vera_fx
from tests.models import MLP
from vera_fx.disk import files, locks


def adapted(rank: int = 2) -> Any:
    return vera_fx.adapt(MLP(), vera_fx.VeraConfig(r=rank, target_modules=["lin0"]))


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", [0], [0]

    def work() -> None:
        for _ in range(30):
            with locks.locked(path):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1]
    assert not path.exists()


def test_patience_ends_with_the_name_of_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.locked(path):
        start = time.monotonic()
        with (
            pytest.raises(locks.HeldError, match=rf"held for 0.05 s by process {os.getpid()} on "),
            locks.locked(path, patience=0.05),
        ):
            pass
        assert time.monotonic() - start < 5
    with locks.locked(path, patience=0.05):
        assert path.exists()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path, ready = tmp_path / "lock", multiprocessing.get_context("fork").Event()

    def hold() -> None:
        with locks.locked(path):
            ready.set()
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    assert ready.wait(30)
    assert not locks.take_dead(path)
    with pytest.raises(locks.HeldError), locks.locked(path, patience=0.05):
        pass
    process.kill()
    process.join(30)
    assert path.exists()
    assert locks.take_dead(path)
    assert not path.exists()
    assert locks.take_dead(path)


def test_where_locks_are_unknown_writers_go_on_and_nobody_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks, "_claim", unknown)
    path = tmp_path / "lock"
    with locks.locked(path):
        assert not locks.take_dead(path)
    assert not path.exists()


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead = tmp_path / ".vera_fx-saving-0123456789abcdef"
    dead.mkdir()
    (dead / "adapter_model.safetensors").write_bytes(b"x")
    dead.with_name(f"{dead.name}.lock").write_text("process 1 on nowhere")
    lock = tmp_path / ".vera_fx-adding-0123456789abcdef.lock"  # its folder is gone already
    lock.write_text("process 1 on nowhere")
    others = (".hidden", ".vera_fx-saving-x", ".git", ".saving-abcdefgh")
    for name in others:
        (tmp_path / name).mkdir()
    with files.aside(tmp_path) as living:
        (living / "a").touch()
        files.sweep(tmp_path)
        assert (living / "a").exists()
        assert not dead.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("name", [".saving-abc_1234", ".adding-abc_1234", ".deleted-1-2-name"])
def test_leftovers_of_version_0_1_are_swept_after_a_day(name: str, tmp_path: Path) -> None:
    old, foreign = tmp_path / name, tmp_path / f"{name[:-1]}x"
    for folder, file in ((old, "adapter_config.json"), (foreign, "a letter.txt")):
        folder.mkdir()
        (folder / file).touch()
    files.sweep(tmp_path)
    assert old.exists()
    for folder in (old, foreign):
        os.utime(folder, (time.time() - 90_000,) * 2)
    files.sweep(tmp_path)
    assert not old.exists()
    assert foreign.exists()


def test_a_save_sweeps_and_leaves_three_files(tmp_path: Path) -> None:
    dead = tmp_path / ".vera_fx-saving-0123456789abcdef"
    dead.mkdir()
    (tmp_path / "mine.txt").write_text("stays")
    vera_fx.save_adapter(adapted(), tmp_path)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "mine.txt"}
    assert {path.name for path in tmp_path.iterdir()} == names
    modes = {(tmp_path / name).stat().st_mode for name in names}
    assert len(modes) == 1  # safetensors makes its own readable for the owner alone


def test_files_are_flushed_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a crash of the machine could leave a name without its content."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def flushing(file: int) -> None:
        done.append(("flush", Path(f"/proc/self/fd/{file}").readlink().name))
        fsync(file)

    def moving(self: Path, target: Any) -> Any:
        done.append(("move", self.name))
        return replace(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc")
    folder = tmp_path / "adapter"
    folder.mkdir()
    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(Path, "replace", moving)
    vera_fx.save_adapter(adapted(), folder)
    names = [name for step, name in done if step == "move"]
    assert names[0] == "adapter_model.safetensors"
    assert sorted(names) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for name in names:
        place = done.index(("move", name))
        assert ("flush", name) in done[:place]
        assert done[place + 1] == ("flush", "adapter")


def test_writers_wait_for_each_other(tmp_path: Path) -> None:
    model, done = adapted(), threading.Event()

    def save() -> None:
        vera_fx.save_adapter(model, tmp_path)
        done.set()

    with files.writing(tmp_path):
        thread = threading.Thread(target=save)
        thread.start()
        assert not done.wait(0.3)
        assert not (tmp_path / "adapter_config.json").exists()
    assert done.wait(30)
    thread.join(30)


def test_a_writer_that_does_not_end_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.locked.__wrapped__, "__kwdefaults__", {"patience": 0.05})
    with (
        files.writing(tmp_path),
        pytest.raises(vera_fx.CheckpointError, match="has been held for 0.05 s by process"),
    ):
        vera_fx.save_adapter(adapted(), tmp_path)


def test_archives_keep_the_first_error(tmp_path: Path) -> None:
    def write() -> None:
        with files.archive_at(Path("/dev/full")) as archive:
            assert archive.write(b"x" * 100_000) == 100_000
            archive.write(b"x" * 100_000)

    with pytest.raises(OSError, match="No space"):
        write()
    assert files.read_limited(Path("/dev/null"), 5) == b""
    (tmp_path / "a").write_bytes(b"123456")
    with pytest.raises(ValueError, match="more than 5 bytes"):
        files.read_limited(tmp_path / "a", 5)
