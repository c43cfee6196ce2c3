"""transformers' Trainer with two processes: the steps of one on the whole batch, checkpoints of the adapter alone."""

from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.test_fsdp2_files import shared
from tests.distributed.test_fsdp2_llama import IDS, adapted, train
from tests.distributed.training import assert_trained, vectors
from tests.helpers import graphs_run
from tests.models import llama


def trainer(model: Any, folder: Path, steps: int) -> Any:
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers import Trainer, TrainingArguments

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        weight_decay=0.01,  # AdamW's own
        max_grad_norm=0.0,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    # Four rows of one length: every step has all of them, in whichever order.
    return Trainer(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in IDS])


@two_processes
def test_steps_checkpoints_and_resuming(tmp_path: Path) -> None:
    folder, base = shared(tmp_path), llama()
    alone = adapted(base)
    model = adapted(llama_like(base))
    with graphs_run() as count:
        trainer(model, folder, 2).train()
    assert count() == 2
    train(alone, IDS)
    assert_trained(model, vectors(alone), factor=10)

    saved = folder / "checkpoint-2"
    dist.barrier()
    assert (saved / "adapter_model.safetensors").is_file()
    assert sum(p.stat().st_size for p in saved.glob("*.safetensors")) < 60_000
    again = adapted(llama_like(base))
    trainer(again, folder, 3).train(resume_from_checkpoint=str(saved))
    through = adapted(llama_like(base))
    train(through, IDS, steps=3)
    assert_trained(again, vectors(through), factor=20)
    assert vera_fx.active_adapters(again) == ["default"]


def llama_like(base: torch.nn.Module) -> torch.nn.Module:
    """The base's weights in a model of its own, unadapted."""
    own = llama()
    own.load_state_dict({k: v for k, v in base.state_dict().items() if not k.startswith("vera.")})
    return own
