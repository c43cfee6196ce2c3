"""`train_many` in two processes: every job ends where it ends in one process on the whole batches."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

import vera_fx
from tests.distributed.pair import WORLD, two_processes
from tests.distributed.test_fsdp2_files import shared
from tests.training.jobs import assert_trained_alike, causal, classifier, config, examples, trained
from tests.training.test_many import JOBS
from vera_fx import TrainSettings

HELD_OUT = {"plain": examples(50, 9), "warm": examples(3, 11), "lonely": examples(1, 4)}
LONELY = (
    config(),
    examples(20, 13),
    TrainSettings(steps=6, batch_size=1, lr=0.03, evaluate_every=2),
)
"""One row a step, which only one of the processes has."""


def own_group() -> Any:
    """A group of this process alone, in which it does the whole work."""
    return [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]


def jobs() -> dict[str, Any]:
    return {**JOBS, "lonely": LONELY}


def run(model: nn.Module, chosen: Any = None, **options: Any) -> vera_fx.TrainResults:
    options = {"progress": False, "held_out": HELD_OUT, **options}
    return vera_fx.train_many(model, jobs() if chosen is None else chosen, **options)


def assert_equal_everywhere(model: nn.Module, names: Any) -> None:
    """To the bit: what one process sees, all see."""
    for name in names:
        for key, value in trained(model, name).items():
            others = [torch.empty_like(value) for _ in range(WORLD)]
            dist.all_gather(others, value.contiguous())
            assert all(torch.equal(other, value) for other in others), f"{name} {key}"


@two_processes
def test_jobs_end_where_they_end_in_one_process() -> None:
    """Jobs of other sizes, some of which end early; in the last steps one job's rows are few."""
    one, two = classifier(), classifier()
    expected = run(one, group=own_group())
    found = run(two)
    assert_equal_everywhere(two, jobs())
    for name in jobs():
        assert_trained_alike(trained(two, name), trained(one, name))
        this, that = found[name], expected[name]
        assert (this.status, this.step, this.tokens) == (that.status, that.step, that.tokens)
        assert this.loss == pytest.approx(that.loss, rel=1e-3)
        assert (this.held_out is None) == (name not in HELD_OUT)
        if name in HELD_OUT:
            assert this.held_out == pytest.approx(that.held_out, rel=1e-3)
            assert this.accuracy == that.accuracy
    assert expected.passes < found.passes <= WORLD * expected.passes
    assert expected.writes
    assert found.writes == (dist.get_rank() == 0)


@two_processes
def test_more_processes_than_rows() -> None:
    """The other process has no row in any step, and none of the held-out ones."""
    one, two = classifier(), classifier()
    held_out = {"lonely": HELD_OUT["lonely"]}
    expected = run(one, {"lonely": LONELY}, held_out=held_out, group=own_group())
    found = run(two, {"lonely": LONELY}, held_out=held_out)
    assert_equal_everywhere(two, ["lonely"])
    assert_trained_alike(trained(two, "lonely"), trained(one, "lonely"), bound=1e-6)
    assert found["lonely"].accuracy == expected["lonely"].accuracy is not None
    assert found.passes == expected.passes


@two_processes
def test_a_job_that_diverges_ends_in_all() -> None:
    """Its last row is in one process alone; the others' sums stay finite."""
    fast = TrainSettings(steps=8, batch_size=1, lr=1e30, schedule="constant")
    calm = {name: JOBS[name] for name in ("plain", "head")}
    one, two = classifier(), classifier()
    run(one, calm, held_out={}, group=own_group())
    found = run(two, {"wild": (config(), examples(20, 8), fast), **calm}, held_out={})
    assert found["wild"].status == "diverged"
    assert 0 < found["wild"].step < 8
    assert math.isfinite(found["wild"].loss or math.nan)
    assert all(value.isfinite().all() for value in trained(two, "wild").values())
    assert_equal_everywhere(two, ["wild", *calm])
    for name in calm:
        assert found[name].status == "finished"
        assert_trained_alike(trained(two, name), trained(one, name))


@two_processes
def test_all_stop_early_at_the_same_step() -> None:
    data = examples(12, 1)
    wrong = [{**example, "labels": (example["labels"] + 1) % 3} for example in data]
    settings = TrainSettings(
        steps=40, batch_size=12, lr=0.2, evaluate_every=2, patience=3, schedule="constant"
    )
    chosen = {"stops": (config(), data, settings), "plain": JOBS["plain"]}
    one, two = classifier(), classifier()
    expected = run(one, chosen, held_out={"stops": wrong}, group=own_group())["stops"]
    found = run(two, chosen, held_out={"stops": wrong})["stops"]
    assert found.status == expected.status == "stopped early"
    assert found.step == expected.step < 40
    assert found.best == pytest.approx(expected.best, rel=1e-3)
    assert_equal_everywhere(two, chosen)
    assert_trained_alike(trained(two, "stops"), trained(one, "stops"))


@two_processes
def test_a_language_model_counts_tokens_of_all_processes() -> None:
    """Rows with few and many labels: a mean of the processes' means would be another loss."""
    targets = {"target_modules": ["q_proj", "v_proj"]}
    settings = TrainSettings(steps=4, batch_size=3, lr=0.03)
    chosen = {
        name: (config(**targets), examples(11, seed, tokens=True), settings)
        for seed, name in enumerate(("a", "b"))
    }
    one, two = causal(), causal()
    expected = run(one, chosen, held_out={}, group=own_group(), tokens_per_pass=24)
    found = run(two, chosen, held_out={}, tokens_per_pass=24)
    for name in chosen:
        assert_trained_alike(trained(two, name), trained(one, name))
        assert found[name].loss == pytest.approx(expected[name].loss, rel=1e-4)


class Cut(Exception):  # noqa: N818
    """Stands for killed processes."""


def with_dropout() -> nn.Module:
    model = classifier()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return model


@two_processes
def test_resumed_to_the_bit_by_as_many_processes(tmp_path: Path) -> None:
    """Every process goes on with its own generator; the first alone writes and reads the file."""
    chosen = {name: JOBS[name] for name in ("plain", "short", "head", "rank")}
    whole, first, second = with_dropout(), with_dropout(), with_dropout()
    folder = shared(tmp_path)
    torch.manual_seed(5 + dist.get_rank())
    expected = run(whole, chosen, held_out={})

    def cut(many: Any) -> None:
        if many.jobs["plain"].progress.step == 6:
            raise Cut

    torch.manual_seed(5 + dist.get_rank())
    mine = folder if dist.get_rank() == 0 else folder / "nobody writes here"
    options: dict[str, Any] = {"held_out": {}, "state": mine, "save_every": 4}
    with pytest.raises(Cut):
        run(first, chosen, on_step=cut, **options)
    torch.manual_seed(99)
    steps: list[int] = []
    found = run(second, chosen, on_step=lambda _: steps.append(1), **options)
    assert len(steps) == 4
    assert not (folder / "nobody writes here").exists()
    assert_equal_everywhere(second, chosen)
    for name in chosen:
        for key, value in trained(whole, name).items():
            assert torch.equal(trained(second, name)[key], value), f"{name} {key}"
        assert (found[name].loss, found[name].step) == (expected[name].loss, expected[name].step)
    assert found.passes == expected.passes


@two_processes
def test_the_first_alone_shows_and_writes(tmp_path: Path) -> None:
    shown, folder = io.StringIO(), tmp_path / str(dist.get_rank())
    results = run(classifier(), {"plain": JOBS["plain"]}, held_out={}, progress=shown)
    results.save(folder / "results.json")
    assert ("8/8" in shown.getvalue()) == (dist.get_rank() == 0)
    assert (folder / "results.json").exists() == (dist.get_rank() == 0)


@two_processes
def test_jobs_join_and_a_wrapper_is_left_aside() -> None:
    expected, model = classifier(), vera_fx.adapt(classifier(), config(), adapter_name="plain")
    run(expected, {name: JOBS[name] for name in ("plain", "fast")}, held_out={})

    def join(many: Any) -> None:
        if many.jobs["plain"].progress.step == 2:
            many.add("fast", *JOBS["fast"])

    wrapped = nn.parallel.DistributedDataParallel(model)
    run(wrapped, {"plain": JOBS["plain"]}, held_out={}, on_step=join)
    assert_equal_everywhere(model, ["plain", "fast"])
    for name in ("plain", "fast"):
        assert_trained_alike(trained(model, name), trained(expected, name))
