"""Hugging Face's Trainer: the same losses as PEFT, compiled or not; checkpoints and resuming."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import vera_fx
from tests.helpers import assert_close
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


def test_checkpoints_hold_the_adapter_alone(tmp_path: Path) -> None:
    """In PEFT's layout, which PEFT loads; with ``keep_base`` there is all of the model."""
    model = vera_fx.adapt(base(), vera_fx.VeraConfig(**CONFIG))
    losses(model, tmp_path, save_strategy="steps", save_steps=6)
    checkpoint = tmp_path / "checkpoint-6"
    held = safe_open(checkpoint / "model.safetensors", "pt").keys()
    assert held
    assert all(key.startswith("vera.") for key in held)

    ids = {"input_ids": Sentences()[0]["input_ids"][None]}
    expected = model.eval()(**ids).logits
    theirs = peft.PeftModel.from_pretrained(base(), checkpoint).eval()
    assert_close(theirs(**ids).logits, expected, factor=5)
    ours = vera_fx.load_adapter(base(), checkpoint).eval()
    assert_close(ours(**ids).logits, expected, factor=5)

    model.save_pretrained(tmp_path / "final")
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    model.save_pretrained(tmp_path / "whole", keep_base=True)
    held = safe_open(tmp_path / "whole" / "model.safetensors", "pt").keys()
    assert any(key.startswith("vera.") for key in held)
    assert any(not key.startswith("vera.") for key in held)
    with pytest.raises(vera_fx.CheckpointError, match="keep_base=True"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    assert not (tmp_path / "pushed").exists()


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """By Trainer itself, from the checkpoint's small file."""
    model = vera_fx.adapt(base(), vera_fx.VeraConfig(**CONFIG))
    fields = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # the worst: not the last
            **fields,
        ),
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    saved = vera_fx.adapter_state_dict(vera_fx.load_adapter(base(), best))
    now = vera_fx.adapter_state_dict(model)
    assert all(torch.equal(now[key], saved[key]) for key in saved)
