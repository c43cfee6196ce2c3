"""Dropout is each job's own: rows that drop differently go through the base apart."""

from typing import Any

import torch

import vera_fx
from tests.training.jobs import (
    assert_trained_alike,
    classifier,
    config,
    examples,
    train_alone,
    trained,
)
from vera_fx import TrainSettings

SETTINGS = TrainSettings(steps=5, batch_size=3, lr=0.03)


def job(rate: float, seed: int = 1) -> tuple[Any, Any, TrainSettings]:
    return config(vera_dropout=rate), examples(20, seed), SETTINGS


def run(**jobs: Any) -> tuple[dict[str, dict[str, torch.Tensor]], vera_fx.TrainResults]:
    model = classifier()
    held_out = {name: examples(8, 3) for name in jobs}
    torch.manual_seed(5)
    results = vera_fx.train_many(model, jobs, held_out=held_out, progress=False)
    return {name: trained(model, name) for name in jobs}, results


def far(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all((found[name] - value).abs().max() > 2e-3 for name, value in other.items())


def test_jobs_of_other_rates_end_where_they_end_alone() -> None:
    """A dry job draws nothing, so that the masks of the wet one are those that it draws alone."""
    (mixed, results), (alone, _) = run(dry=job(0.0), wet=job(0.4)), run(wet=job(0.4))
    assert all(results[name].status == "finished" for name in ("dry", "wet"))
    assert results.passes == 2 * SETTINGS.steps + 1  # and one to evaluate: nothing drops there
    assert_trained_alike(mixed["dry"], train_alone(classifier(), *job(0.0)))
    assert_trained_alike(mixed["wet"], alone["wet"])
    assert far(mixed["wet"], mixed["dry"])


def test_every_job_drops_at_its_own_rate() -> None:
    found, results = run(some=job(0.1), most=job(0.9), same=job(0.1))
    assert results.passes == 2 * SETTINGS.steps + 1
    assert far(found["some"], found["most"])
    assert far(found["some"], found["same"])  # a mask of its own for each row
