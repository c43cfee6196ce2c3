"""What a run does: the same steps for every method, and ablations that are what they are called."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import vera_fx
from benchmarks.quality import ablations, digits, methods, tasks, training
from benchmarks.quality.methods import Method
from benchmarks.quality.tasks import Task
from benchmarks.quality.training import Run

FAST, SLOW = 0.3, 3e-2
FIELDS: Any = {"r": 7, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def task() -> Task:
    """Digits on a ViT that was never trained: 12 steps of 5."""
    rows = digits.images(range(5, 10))
    return Task("digits", rows[:30], rows[30:60], rows[60:110], digits._fresh, 2, 5)


@pytest.fixture(autouse=True)
def small(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "task", lambda _: task)
    found = {
        "VeRA": Method("vera", FIELDS), "PEFT": Method("peft_vera", FIELDS), "head": Method("head"),
        "whole head": Method("vera", FIELDS, change=freeze_vectors), "full": Method("full"),
    }  # fmt: skip
    monkeypatch.setattr(training, "method", lambda _, name: found[name])


def freeze_vectors(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if "lambda" in name:
            p.requires_grad_(requires_grad=False)


@cache
def result(method: str, lr: float = FAST, seed: int = 1) -> dict[str, Any]:
    run = Run("x", "digits", method, lr, seed)
    found = training.perform(run)
    assert list(found) == [run.key]
    return found[run.key]


def test_steps_are_a_function_of_the_seed(task: Task) -> None:
    steps = task.batches(3)
    assert [len(rows) for rows in steps] == [5] * 12
    images = [row["pixel_values"].data_ptr() for rows in steps for row in rows]
    assert all(images.count(row["pixel_values"].data_ptr()) == 2 for row in task.train)
    again = [row["pixel_values"].data_ptr() for rows in task.batches(3) for row in rows]
    other = [row["pixel_values"].data_ptr() for rows in task.batches(4) for row in rows]
    assert images == again != other


def test_sentences_judge_or_train_and_never_both() -> None:
    found = tasks.sentiment("products")
    parts = [
        {tuple(row["input_ids"]) for row in part}
        for part in (found.train, found.validation, found.test)
    ]
    assert [len(part) for part in parts] == [512, 300, 400]
    assert len(set.union(*parts)) == 1212
    longest = [max(map(tasks.tokens, rows)) for rows in found.batches(0)]
    assert max(longest) == 24
    kept = sum(tasks.tokens(row) for rows in found.batches(0) for row in rows)
    assert 8 * sum(longest) < 1.15 * kept  # padding


def test_pefts_vera_is_the_same_run() -> None:
    ours, theirs = result("VeRA"), result("PEFT")
    assert ours["predictions"] == theirs["predictions"]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert ours["trained"] == theirs["trained"] == 8 * (7 + 64) + 325
    assert result("VeRA", SLOW)["loss"] != pytest.approx(ours["loss"], abs=1e-3)
    assert result("VeRA", SLOW)["predictions"] != ours["predictions"]


def test_one_batch_of_rates_is_the_same_runs() -> None:
    many = training.many(Run("x", "digits", "VeRA", 0.0, 1), (FAST, SLOW))
    for lr in (FAST, SLOW):
        alone = result("VeRA", lr)
        (together,) = [run for run in many.values() if run["lr"] == lr]
        assert together["predictions"] == alone["predictions"]
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-4)


def test_the_head_over_features_is_the_head_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "HEAD_RATE", SLOW)
    features, whole = result("head", SLOW), result("whole head", SLOW)
    assert features["predictions"] == whole["predictions"]
    assert features["loss"] == pytest.approx(whole["loss"], abs=1e-4)
    assert features["trained"] == 325


def test_full_trains_everything_and_says_what_it_holds(task: Task) -> None:
    found = result("full", 1e-3)
    assert found["trained"] == sum(p.numel() for p in task.base(0).parameters())
    assert found["moments_bytes"] == 8 * found["trained"]


def test_step_bytes_sees_what_a_step_keeps() -> None:
    layer = nn.Linear(4, 4)

    class Wide(nn.Module):
        def forward(self, **_: Any) -> Any:
            kept = layer(torch.ones(1 << 20, 4)).exp()  # exp keeps its result: 16 MiB
            return type("Output", (), {"loss": kept.mean()})

    optimizer = torch.optim.AdamW(layer.parameters())
    assert 30 << 20 < training.step_bytes(Wide(), optimizer, [{"labels": 0}]) < 100 << 20


def adapted(**fields: Any) -> nn.Module:
    return methods.KINDS["vera"](digits._fresh(0), {**FIELDS, **fields}, 5)


def picked(model: nn.Module, ending: str) -> list[torch.Tensor]:
    named = (*model.named_parameters(), *model.named_buffers())
    return [p for name, p in named if name.endswith(ending)]


def test_ablations_freeze_one_vector_and_start_at_the_base(task: Task) -> None:
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in task.test[:4]])}
    plain = digits._fresh(0).eval()(**batch).logits
    for change, frozen, trained in (
        (ablations.only_b, "lambda_d", "lambda_b"),
        (ablations.only_d, "lambda_b", "lambda_d"),
    ):
        model = adapted().eval()
        change(model)
        assert not any(p.requires_grad for p in picked(model, frozen))
        assert all(p.requires_grad for p in picked(model, trained))
        torch.testing.assert_close(model(**batch).logits, plain, rtol=0, atol=1e-6)
        out = model(**batch).logits
        out.square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in picked(model, trained))  # type: ignore[union-attr]


def test_projections_are_redrawn() -> None:
    (a,), (b,) = picked(adapted(), "vera_A"), picked(adapted(), "vera_B")
    for change in (ablations.normal, ablations.positive):
        model = adapted(r=512)
        change(model)
        (new_a,), (new_b,) = picked(model, "vera_A"), picked(model, "vera_B")
        assert not torch.equal(new_a[:7, :], a)
        assert not torch.equal(new_b[:, :7], b)
        if change is ablations.normal:
            assert new_a.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
            assert new_b.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
            assert new_a.abs().max() > 3.2 * new_a.std()  # no uniform goes so far
        else:
            assert new_a.min() >= 0
            assert 0.09 < new_a.max() <= 0.1


def test_own_projections_are_one_pair_for_each_site() -> None:
    model = methods.KINDS["own"](digits._fresh(0), FIELDS, 5)
    firsts = picked(model, "vera_A")
    assert len(firsts) == 8
    assert len({tuple(a[0, :3].tolist()) for a in firsts}) == 8
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 8 * (7 + 64) + 325
    assert len(vera_fx.active_adapters(model)) == 8


def test_names_mean_what_the_task_has() -> None:
    assert methods.method("digits", "LoRA r=8").fields["target_modules"] == ["q_proj", "v_proj"]
    assert methods.method("movies", "LoRA r=8").fields["target_modules"] == ["query", "value"]
    assert replace(methods.method("movies", "head"), rates=()) == Method("head")
