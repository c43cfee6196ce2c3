"""accelerate: its launcher with the example's configuration files, metrics over processes, the best adapter."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.test_example import ROOT, run
from tests.distributed.test_fsdp2_files import shared
from tests.distributed.training import (
    adapted,
    assert_trained,
    base,
    batches,
    mean_loss,
    mine,
    trained_alone,
)
from tests.helpers import assert_close, assert_far_apart

ROWS = 11
"""Not a multiple of what two processes take at once: the last batch is filled up."""


def accelerator(how: str) -> Accelerator:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if how == "ddp":
        return Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Layer"], reshard_after_forward=True,
    )  # fmt: skip
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def loader(rows: torch.Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(rows), batch_size=3, shuffle=False)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@two_processes
def test_metrics_over_processes_and_the_best_adapter(how: str, tmp_path: Path) -> None:
    """Rows that only fill up the last batch do not count; the best adapter can be loaded alone."""
    rows, folder = torch.cat(batches(2))[:ROWS], shared(tmp_path) / "best"
    tool, model = accelerator(how), adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model, optimizer, data = tool.prepare(model, optimizer, loader(rows))
    losses: list[float] = []
    for _ in range(3):
        outputs = evaluated(tool, model.eval(), data)
        losses.append(mean_loss(outputs).item())
        if losses[-1] == min(losses):
            vera_fx.save_adapter(model, folder)
            tool.wait_for_everyone()
            best = outputs
        for (batch,) in data:
            tool.backward(mean_loss(model.train()(batch)))
            optimizer.step()
            optimizer.zero_grad()
    assert losses[2] < losses[0]
    alone = vera_fx.load_adapter(base(), folder).eval()
    with torch.no_grad():
        assert_close(best, alone(rows), factor=5)
        assert_far_apart(best, adapted().eval()(rows))


def evaluated(tool: Accelerator, model: nn.Module, data: Any) -> torch.Tensor:
    with torch.no_grad():
        outputs = torch.cat([tool.gather_for_metrics(model(batch)) for (batch,) in data])
    assert outputs.shape == (ROWS, 4)
    return outputs


@pytest.mark.slow
def test_the_launcher_with_the_examples_files(tmp_path: Path) -> None:
    """The files are for GPUs: on the CPU one word of them differs."""
    found: list[tuple[float, float]] = []
    for name in ("ddp", "fsdp2"):
        text = (ROOT / f"examples/distributed/{name}.yaml").read_text(encoding="utf-8")
        config = tmp_path / f"{name}.yaml"
        config.write_text(re.sub("use_cpu: false", "use_cpu: true", text), encoding="utf-8")
        launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config))
        found.append(run(tmp_path / name, *launcher, "--main_process_port", "0"))
    assert all(last < first - 0.05 for first, last in found)
    assert found[0] == pytest.approx(found[1], abs=2e-3)
    states = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ddp", "fsdp2")]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert_close(states[1][key], value, factor=100, what=key)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@two_processes
def test_states_are_saved_and_resumed(how: str, tmp_path: Path) -> None:
    """By accelerate's own ``save_state``: another run goes on where the first would have."""
    data, folder = [mine(batch) for batch in batches(4)], shared(tmp_path) / "state"

    def started() -> tuple[Accelerator, nn.Module, Any]:
        tool, model = accelerator(how), adapted()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        return tool, *tool.prepare(model, optimizer)

    def steps(
        tool: Accelerator, model: nn.Module, optimizer: Any, rows: list[torch.Tensor]
    ) -> None:
        for batch in rows:
            tool.backward(mean_loss(model.train()(batch)))
            optimizer.step()
            optimizer.zero_grad()

    first = started()
    steps(*first, data[:2])
    first[0].save_state(str(folder))
    steps(*first, data[2:])
    expected = vera_fx.adapter_state_dict(first[1])
    again = started()
    again[0].load_state(str(folder))
    steps(*again, data[2:])
    for key, value in vera_fx.adapter_state_dict(again[1]).items():
        assert_close(value, expected[key], what=key)
    alone = trained_alone(batches(4))
    assert_trained(again[1], alone, factor=5)
