"""Jobs that train in one batch end where each would have ended alone."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import vera_fx
from tests.training.jobs import (
    assert_trained_alike,
    causal,
    classifier,
    config,
    examples,
    train_alone,
    trained,
)
from vera_fx import TrainSettings

JOBS: dict[str, tuple[Any, Any, TrainSettings]] = {
    "plain": (config(), examples(20, 1), TrainSettings(steps=8, batch_size=3)),
    "fast": (config(), examples(20, 1), TrainSettings(steps=8, batch_size=3, lr=0.05, seed=3)),
    "short": (config(), examples(7, 2), TrainSettings(steps=3, batch_size=5, schedule="cosine")),
    "warm": (config(), examples(20, 3), TrainSettings(steps=8, batch_size=2, warmup=3, seed=1)),
    "decayed": (
        config(),
        examples(9, 4),
        TrainSettings(steps=6, batch_size=4, weight_decay=0.5, schedule="constant", betas=(0.8, 0.9)),
    ),
    "clipped": (config(), examples(20, 5), TrainSettings(steps=8, batch_size=3, max_norm=0.01)),
    "rank": (config(r=7), examples(20, 6), TrainSettings(steps=8, batch_size=3, shuffle=False)),
    "head": (
        config(modules_to_save=["classifier"], bias="vera_only"),
        examples(20, 7),
        TrainSettings(steps=8, batch_size=3, copies_lr=1e-3, lr=2e-2),
    ),
}  # fmt: skip


def test_eight_jobs_end_where_each_ends_alone() -> None:
    base = classifier()
    expected = {name: train_alone(base, *job) for name, job in JOBS.items()}
    results = vera_fx.train_many(base, JOBS, progress=False)
    assert list(results) == list(JOBS)
    for name, job in JOBS.items():
        assert results[name].status == "finished"
        assert results[name].step == job[2].steps
        assert_trained_alike(trained(base, name), expected[name])
        start = trained(vera_fx.adapt(classifier(), job[0]), "default")
        moved = max((expected[name][n] - value).abs().max().item() for n, value in start.items())
        assert moved > 2e-3, name
    assert 0 < results.padding < 1
    assert base.training  # as it was


def test_a_language_model_in_passes_of_bounded_size() -> None:
    targets = {"target_modules": ["q_proj", "v_proj"]}
    jobs = {
        name: (
            config(**targets),
            examples(11, seed, tokens=True),
            TrainSettings(steps=4, batch_size=4),
        )
        for seed, name in enumerate(("a", "b", "c"))
    }
    base = causal()
    expected = {name: train_alone(base, *job) for name, job in jobs.items()}
    results = vera_fx.train_many(base, jobs, progress=False, tokens_per_pass=24)
    assert results.passes > 8
    for name in jobs:
        assert_trained_alike(trained(base, name), expected[name])


def test_compiled() -> None:
    torch._dynamo.reset()
    chosen = {name: JOBS[name] for name in ("plain", "short", "rank")}
    eager, base = classifier(), classifier()
    vera_fx.train_many(eager, chosen, progress=False)
    compiled = torch.compile(base, backend="aot_eager", dynamic=True)
    vera_fx.train_many(compiled, chosen, progress=False)
    for name in chosen:
        assert_trained_alike(trained(base, name), trained(eager, name))


def test_a_job_that_diverges_hurts_no_other() -> None:
    wild = (
        config(),
        examples(20, 8),
        TrainSettings(steps=8, batch_size=3, lr=1e30, schedule="constant"),
    )
    calm = {name: JOBS[name] for name in ("plain", "head")}
    base, other = classifier(), classifier()
    vera_fx.train_many(other, calm, progress=False)
    results = vera_fx.train_many(base, {"wild": wild, **calm}, progress=False)
    assert results["wild"].status == "diverged"
    assert 0 < results["wild"].step < 8
    assert math.isfinite(results["wild"].loss or math.nan)
    assert all(value.isfinite().all() for value in trained(base, "wild").values())
    for name in calm:
        assert results[name].status == "finished"
        assert_trained_alike(trained(base, name), trained(other, name))


def test_jobs_join_and_are_stopped() -> None:
    base, other = classifier(), classifier()
    expected = train_alone(classifier(), *JOBS["fast"])

    def on_step(many: Any) -> None:
        plain = many.jobs["plain"].progress.step
        if plain == 2:
            many.add("fast", *JOBS["fast"])
            many.add("wide", config(target_modules=["query", "value", "key"]), *JOBS["warm"][1:])
        if plain == 4:
            many.stop("short")

    shorter = (*JOBS["short"][:2], TrainSettings(steps=30, batch_size=5))
    jobs = {"plain": JOBS["plain"], "short": shorter}
    results = vera_fx.train_many(base, jobs, progress=False, on_step=on_step)
    assert {name: (found.status, found.step) for name, found in results.items()} == {
        "plain": ("finished", 8),
        "short": ("stopped early", 4),
        "fast": ("finished", 8),
        "wide": ("finished", 8),
    }
    assert_trained_alike(trained(base, "fast"), expected)
    vera_fx.train_many(other, {"plain": JOBS["plain"]}, progress=False)
    assert_trained_alike(trained(base, "plain"), trained(other, "plain"))


def test_an_adapter_is_trained_further_and_others_stay() -> None:
    base = vera_fx.adapt(classifier(), config())
    vera_fx.add_adapter(base, "other")
    before = trained(base, "other")
    base.eval()
    base.classifier.train()
    results = vera_fx.train_many(base, {"default": (None, *JOBS["fast"][1:])}, progress=False)
    assert results["default"].step == 8
    assert_trained_alike(trained(base, "default"), train_alone(classifier(), *JOBS["fast"]))
    assert all(torch.equal(value, before[name]) for name, value in trained(base, "other").items())
    assert not base.training
    assert base.classifier.training
    assert vera_fx.active_adapters(base) == ["default"]
    assert all(p.requires_grad for p in base.vera.adapter("default").parameters())


def test_evaluation_and_early_stopping() -> None:
    """Held-out labels are wrong on purpose: the loss there only rises, and the first vectors are best."""
    data, base = examples(12, 1), classifier()
    wrong = [{**example, "labels": (example["labels"] + 1) % 3} for example in data]
    settings = TrainSettings(
        steps=40, batch_size=12, lr=0.2, evaluate_every=2, patience=3, schedule="constant"
    )
    jobs = {"stops": (config(), data, settings), "plain": JOBS["plain"]}
    held_out = {"stops": wrong, "plain": examples(50, 9)}
    results = vera_fx.train_many(base, jobs, held_out=held_out, progress=False)
    found = results["stops"]
    assert found.status == "stopped early"
    assert found.step < 40
    assert found.best is not None
    assert found.held_out is not None
    assert found.best < found.held_out
    with torch.no_grad():
        for name, value in (("stops", found.best), ("plain", results["plain"].held_out)):
            vera_fx.set_adapter(base.eval(), name)
            own = held_out[name]
            losses = [
                base(input_ids=e["input_ids"][None], labels=torch.tensor([e["labels"]])).loss
                for e in own
            ]
            assert abs(torch.stack(losses).mean().item() - value) < 1e-4, name
            right = [
                base(input_ids=e["input_ids"][None]).logits.argmax().item() == e["labels"]
                for e in own
            ]
            if name == "plain":
                assert results[name].accuracy == pytest.approx(sum(right) / len(own))


def test_held_out_rows_of_like_length_go_together() -> None:
    """Long and short ones in turn, more of each than a pass takes: nothing is padding."""
    data = [examples(9, 1)[at] for at in (0, 4)]
    lengths = [len(example["input_ids"]) for example in data]
    assert lengths[0] != lengths[1]
    job = (config(), data, TrainSettings(steps=2, batch_size=1))
    results = vera_fx.train_many(
        classifier(), {"a": job}, held_out={"a": data * 32}, progress=False
    )
    assert results["a"].accuracy is not None
    assert results.passes == 2 + 2
    assert results.padding == 0


@pytest.mark.parametrize(
    ("jobs", "options", "message"),
    [
        ({}, {}, "needs jobs"),
        ({"a": JOBS["plain"]}, {"held_out": {"b": examples(2, 1)}}, r"examples for \['b'\]"),
        ({"a": JOBS["plain"][:2]}, {}, "must be .config, dataset, TrainSettings."),
        ({"a": (config(), [], TrainSettings(steps=1))}, {}, "0 examples"),
        ({"a": (None, *JOBS["plain"][1:])}, {}, "no adapter 'a'; give its configuration"),
        ({"a": (config(), [{"input_ids": [1, 2]}], TrainSettings(steps=1))}, {}, "need 'labels'"),
        ({"a": JOBS["plain"]}, {"kind": "wrong"}, "kind must be one of"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained(jobs: Any, options: Any, message: str) -> None:
    with pytest.raises(vera_fx.ConfigError, match=message):
        vera_fx.train_many(classifier(), jobs, progress=False, **options)


def test_a_configuration_may_leave_the_targets_to_the_model() -> None:
    model, job = classifier(), (vera_fx.VeraConfig(r=4), examples(8, 1), TrainSettings(steps=2))
    vera_fx.train_many(model, {"a": job}, progress=False)
    assert vera_fx.train_many(model, {"a": job}, progress=False)["a"].step == 2
    assert model.vera.adapter("a").config.target_modules == ("query", "value")


def test_adapters_that_cannot_be_trained_beside_others() -> None:
    model: nn.Module = vera_fx.adapt(classifier(), config())
    with pytest.raises(vera_fx.ConfigError, match="exists with.*which is not"):
        vera_fx.train_many(model, {"default": (config(r=9), *JOBS["plain"][1:])}, progress=False)
    vera_fx.set_trainable(model, "default", trainable=False)
    with pytest.raises(vera_fx.AdapterError, match="made for inference"):
        vera_fx.train_many(model, {"default": (None, *JOBS["plain"][1:])}, progress=False)
    with vera_fx.disable_adapters(model), pytest.raises(vera_fx.AdapterError, match="disabled"):
        vera_fx.train_many(model, {"a": JOBS["plain"]}, progress=False)
    vera_fx.add_adapter(model, "dvora", vera_fx.DVoraConfig(r=4, target_modules=["query"]))
    with pytest.raises(vera_fx.AdapterError, match="'dvora' cannot train beside others"):
        vera_fx.train_many(model, {"dvora": (None, *JOBS["plain"][1:])}, progress=False)
    for wrong in (
        {"steps": 0},
        {"lr": -1.0},
        {"schedule": "line"},
        {"patience": 1},
        {"max_norm": 0},
    ):
        with pytest.raises(vera_fx.ConfigError, match=next(iter(wrong))):
            TrainSettings(**{"steps": 3, **wrong})
