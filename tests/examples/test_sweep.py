"""The sweep's jobs and picture; `tests/training` holds what runs them."""

from pathlib import Path
from typing import Any

import pytest

import vera_fx
from vera_fx.bank.names import check_name
from vera_fx.training.job import Progress

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import sweep

    return sweep


def test_jobs_and_picture(sweep: Any) -> None:
    jobs = sweep.jobs_for([{"labels": 0}], 50, 4)
    assert len(jobs) == 16
    assert len({(config.r, settings.lr) for config, _, settings in jobs.values()}) == 16
    for name in jobs:
        check_name(name, taken=())  # it becomes a folder
    shares = {name: 0.4 + 0.04 * at for at, name in enumerate(jobs)}
    found = {name: Progress(accuracy=share) for name, share in shares.items()}
    lines = sweep.picture(vera_fx.TrainResults(found, 1.0, 1, 0.0), jobs).splitlines()
    assert [line.count("#") for line in lines[:16]] == [
        round(40 * 0.04 * at / 0.6) for at in range(16)
    ]
    assert lines[0].startswith("r=64")
    assert lines[15].startswith("r=256")
