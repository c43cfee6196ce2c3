"""A slice of what `make fuzz` does for hours: mutated files and requests, and writers that are killed."""

import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.kills import KINDS
from tests.fuzz.loop import hunt, mutations, stored
from tests.fuzz.targets import TARGETS, Fault, Files, Requests

FOUND = Path(__file__).parent / "found"
COUNTS = {"adapters": 150, "programs": 60, "requests": 200}


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory):
    made = {name: kind(tmp_path_factory.mktemp(name)) for name, kind in TARGETS.items()}
    yield made
    requests = made["requests"]
    requests.portal.run_until_complete(requests.lifespan.__aexit__(None, None, None))
    requests.portal.close()


@pytest.fixture(autouse=True)
def _no_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_mutated_is_refused_or_read_and_nothing_else_changes(name: str, targets) -> None:
    assert [fault.reason for fault in mutations(targets[name], 1, COUNTS[name])] == []


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found_once_stays_mended(name: str, targets) -> None:
    assert [targets[name].run(files) for files in stored(FOUND / name)] == [None] * len(
        stored(FOUND / name)
    )


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_not_mutated_is_read(name: str, targets) -> None:
    """Else a fuzzer that breaks every input would find nothing."""
    for files in targets[name].seeds[:4]:
        assert targets[name].run(files) is None


def test_whatever_the_corpus_holds_can_be_mutated(targets) -> None:
    """Mutations of mutations of mutations."""
    random = Random(5)
    for target in targets.values():
        for files in target.seeds:
            for _ in range(60):
                files = target.mutate(random, files, 2)  # noqa: PLW2901


class Planted:
    """A target with a fault."""

    name = "planted"
    seeds: tuple[Files, ...] = ({"text": b"0" * 8},)

    mutate = Requests.mutate

    def run(self, files: Files) -> Fault | None:
        return Fault(self.name, files, "short") if len(files["text"]) < 8 else None


def test_the_hunt_keeps_what_it_finds(tmp_path: Path) -> None:
    counts = hunt(Planted(), 0, 0.3, tmp_path)
    failures = stored(tmp_path / "failures" / "planted")
    assert counts["faults"] >= len(failures) > 0
    assert all(len(files["text"]) < 8 for files in failures)
    assert all(len(files["text"]) >= 8 for files in stored(tmp_path / "corpus" / "planted"))
    assert counts["mutations"] > counts["faults"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_writers_leave_what_was_saved(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.kills", "15", "0", tmp_path, *KINDS]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"(.+): 15 kills, (\d+) readings, (\d+) saves\n", done.stdout)
    assert [what for what, *_ in said] == [*KINDS]
    assert all(int(count) > 0 for _, *counts in said for count in counts)
