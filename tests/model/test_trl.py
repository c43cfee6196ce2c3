"""TRL's trainers over adapted models: the graphs run, and losses are PEFT's. `make test-trl` brings TRL."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vera_fx
from tests.helpers import graphs_run, peft_pair
from tests.models import llama

trl = pytest.importorskip("trl", reason="TRL is an extra of its own: make test-trl")

STEPS = 3
LOOK = {"report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "bf16": False}
STEP = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 0.05}
WORDS = {"gradient_checkpointing": False, "disable_tqdm": True}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(90)} | {"<pad>": 90, "<eos>": 91, "<unk>": 92}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return peft_pair(llama(), r=5, target_modules=["q_proj", "down_proj"])


def losses(trainer: Any) -> list[float]:
    torch.manual_seed(1)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(model: Any, folder: Path) -> Any:
    from datasets import Dataset

    rows = Dataset.from_dict({"text": [f"w{i} w2 w{i + 1} w4 w5 w{i + 2}" for i in range(8)]})
    config = trl.SFTConfig(output_dir=str(folder), **LOOK, **STEP, **WORDS, max_length=16)
    return trl.SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer())


def dpo(model: Any, folder: Path) -> Any:
    from datasets import Dataset

    chosen, rejected = [f"w{i} w5" for i in range(8)], [f"w{i + 9} w7" for i in range(8)]
    rows = {"prompt": ["w1 w2 w3"] * 8, "chosen": chosen, "rejected": rejected}
    config = trl.DPOConfig(output_dir=str(folder), **LOOK, **STEP, **WORDS)
    torch.manual_seed(0)
    return trl.DPOTrainer(
        model,
        ref_model=llama(),
        args=config,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("make", [sft, dpo])
def test_losses_are_pefts_and_graphs_run(make: Callable[..., Any], tmp_path: Path) -> None:
    theirs, ours = pair()
    expected = losses(make(theirs, tmp_path / "theirs"))
    with graphs_run() as count:
        found = losses(make(ours, tmp_path / "ours"))
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=2e-3)
    assert len(set(found)) > 1
    assert count() >= STEPS
    assert 1 <= len(vera_fx.explain(ours).graphs) <= 2


def test_grpo_runs_graphs(tmp_path: Path) -> None:
    from datasets import Dataset

    _, model = pair()
    rows = Dataset.from_dict({"prompt": ["w1 w2 w3", "w4 w5 w6"] * 4})
    config = trl.GRPOConfig(
        output_dir=str(tmp_path),
        **LOOK,
        **STEP,
        **WORDS,
        num_generations=2,
        max_completion_length=4,
    )
    before = copy.deepcopy(vera_fx.adapter_state_dict(model))

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids) % 7) for ids in completion_ids]

    trainer = trl.GRPOTrainer(
        model, reward_funcs=reward, args=config, train_dataset=rows, processing_class=tokenizer()
    )
    with graphs_run() as count:
        trainer.train()
    assert count() > STEPS * 4  # a graph for every token, and for every step
    after = vera_fx.adapter_state_dict(model)
    assert any(not torch.equal(after[key], before[key]) for key in before if "lambda" in key)
