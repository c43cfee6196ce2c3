"""A run that is cut off goes on where it was, to the bit; and what people see of it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vera_fx
from tests.training.jobs import classifier, config, examples, trained
from tests.training.test_many import JOBS
from vera_fx import TrainSettings
from vera_fx.training.progress import ProgressRows
from vera_fx.training.state_file import STATE_FILE

STOPS = TrainSettings(steps=9, batch_size=4, lr=0.1, evaluate_every=2, patience=2)


class Cut(Exception):  # noqa: N818
    """Stands for a killed process."""


def jobs() -> dict[str, Any]:
    chosen = {name: JOBS[name] for name in ("plain", "short", "head", "rank")}
    return {**chosen, "stops": (config(), examples(9, 1), STOPS)}


def held_out() -> dict[str, Any]:
    return {"stops": [{**e, "labels": (e["labels"] + 1) % 3} for e in examples(9, 1)]}


def model_with_dropout() -> nn.Module:
    """Dropout draws from a generator, whose state belongs to the run."""
    model = classifier()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


def run(model: nn.Module, **options: Any) -> vera_fx.TrainResults:
    torch.manual_seed(5)
    return vera_fx.train_many(model, jobs(), held_out=held_out(), progress=False, **options)


@pytest.mark.parametrize(
    "at", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.slow)]
)
def test_a_run_that_was_cut_off_ends_the_same(tmp_path: Path, at: int) -> None:
    whole, second = model_with_dropout(), model_with_dropout()
    expected = run(whole)

    def cut(many: Any) -> None:
        if max(job.progress.step for job in many.jobs.values()) == at + 1:
            raise Cut

    with pytest.raises(Cut):
        run(model_with_dropout(), state=tmp_path, save_every=at, on_step=cut)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [
        STATE_FILE
    ]
    torch.manual_seed(99)
    steps: list[int] = []
    results = vera_fx.train_many(
        second,
        jobs(),
        held_out=held_out(),
        progress=False,
        state=tmp_path,
        on_step=lambda many: steps.append(1),
    )
    assert 0 < len(steps) < 9
    for name, found in results.items():
        for key, value in trained(whole, name).items():
            assert torch.equal(trained(second, name)[key], value), f"{name} {key}"
        want = expected[name]
        assert (found.status, found.step, found.loss, found.best) == (
            want.status,
            want.step,
            want.loss,
            want.best,
        )
    assert results.passes == expected.passes


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    first, second = model_with_dropout(), model_with_dropout()
    expected = run(first, state=tmp_path)
    steps: list[int] = []
    results = run(second, state=tmp_path, on_step=lambda many: steps.append(1))
    assert steps == []
    assert results.as_dict() == expected.as_dict()
    for name in jobs():
        for key, value in trained(first, name).items():
            assert torch.equal(trained(second, name)[key], value)


def test_a_state_of_other_jobs_is_refused(tmp_path: Path) -> None:
    run(model_with_dropout(), state=tmp_path)
    other = (config(), examples(20, 1), TrainSettings(steps=8, batch_size=3, lr=0.5))
    for changed, message in (
        ({**jobs(), "plain": other}, "'plain' of other configuration.*lr=0.01.*lr=0.5"),
        ({"plain": jobs()["plain"]}, "the state has the jobs 'short'"),
    ):
        with pytest.raises(vera_fx.CheckpointError, match=message):
            vera_fx.train_many(classifier(), changed, state=tmp_path, progress=False)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    run(model_with_dropout(), state=tmp_path)
    path = tmp_path / STATE_FILE
    whole = path.read_bytes()
    for broken in (whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1]), b"{}", b""):
        path.write_bytes(broken)
        with pytest.raises(vera_fx.CheckpointError, match=r"damaged|no state|too short|header"):
            run(model_with_dropout(), state=tmp_path)


def test_results_as_a_table_and_json(tmp_path: Path) -> None:
    results = run(model_with_dropout())
    lines = str(results).splitlines()
    assert lines[0].split()[:3] == ["job", "status", "step"]
    assert [line.split()[0] for line in lines[1:-1]] == list(jobs())
    assert "5 jobs in" in lines[-1]
    results.save(tmp_path / "deep" / "results.json")
    saved = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert saved == json.loads(json.dumps(results.as_dict()))
    assert saved["jobs"]["short"]["step"] == 3
    (tmp_path / "file").touch()
    with pytest.raises(vera_fx.CheckpointError, match="cannot be written"):
        results.save(tmp_path / "file" / "results.json")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_rows() -> None:
    shown = io.StringIO()
    vera_fx.train_many(classifier(), {"plain": JOBS["plain"]}, progress=shown)
    text = shown.getvalue()
    assert "8/8" in text
    assert "finished" in text
    assert "\x1b" not in text

    terminal, many = Terminal(), None

    def keep(found: Any) -> None:
        nonlocal many
        many = found

    vera_fx.train_many(classifier(), {"plain": JOBS["plain"]}, progress=False, on_step=keep)
    rows = ProgressRows(terminal)
    for now in (True, False, True):
        rows.show(many.jobs.values(), now=now)
    assert terminal.getvalue().count("plain") == 2
    assert "\x1b[2A" in terminal.getvalue()
