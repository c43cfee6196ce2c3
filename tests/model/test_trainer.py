"""Hugging Face's Trainer: the same losses as PEFT, compiled or not; checkpoints and resuming."""

from pathlib import Path

import peft
import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import vera_fx
from tests.models import BY_NAME


class Sentences(Dataset):
    """Random token sequences of one length, the same every time."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> dict:
        ids = torch.randint(3, 90, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def arguments(folder: Path, **changes) -> TrainingArguments:
    fields = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 5e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    return TrainingArguments(str(folder), **{**fields, **changes})


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return BY_NAME["llama"].build()


def losses(model: torch.nn.Module, folder: Path, **changes) -> list[float]:
    trainer = Trainer(
        model, arguments(folder, **changes), train_dataset=Sentences(), eval_dataset=Sentences()
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CONFIG = {"r": 6, "target_modules": "all-linear"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_losses_are_pefts(tmp_path: Path, changes: dict) -> None:
    eager = {k: v for k, v in changes.items() if not k.startswith("torch_compile")}
    expected = losses(
        peft.get_peft_model(base(), peft.VeraConfig(**CONFIG)), tmp_path / "theirs", **eager
    )
    actual = losses(
        vera_fx.adapt(base(), vera_fx.VeraConfig(**CONFIG)), tmp_path / "ours", **changes
    )

    assert len(actual) == 6
    assert actual == pytest.approx(expected, rel=5e-3 if "bf16" in changes else 1e-5)
    assert min(actual) < actual[0], "nothing was learned"


def test_evaluation_between_steps_does_not_disturb_training(tmp_path: Path) -> None:
    plain = losses(vera_fx.adapt(base(), vera_fx.VeraConfig(**CONFIG)), tmp_path / "plain")
    model = vera_fx.adapt(base(), vera_fx.VeraConfig(**CONFIG))

    assert losses(model, tmp_path / "eval", eval_strategy="steps", eval_steps=2) == plain
    assert {graph.mode for graph in vera_fx.explain(model).graphs} == {"train", "eval"}


def test_resume_from_checkpoint(tmp_path: Path) -> None:
    model = vera_fx.adapt(base(), vera_fx.VeraConfig(**CONFIG))
    whole = losses(model, tmp_path, save_strategy="steps", save_steps=3)
    fresh = vera_fx.adapt(base(), vera_fx.VeraConfig(**CONFIG))
    trainer = Trainer(fresh, arguments(tmp_path), train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert resumed == pytest.approx(whole, rel=1e-6)
