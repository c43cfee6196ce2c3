"""Two processes: bytes and time of a training step under DDP and FSDP2, against PEFT; 8 and 64 GPUs on paper.

python -m benchmarks.distributed               # two gloo processes on this machine's CPU
python -m benchmarks.distributed --paper       # the model on paper alone

Times are ratios of medians of interleaved steps: two processes share one machine here, so that they say
what the host and the collectives cost, and nothing of GPUs.
"""

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vera_fx
from benchmarks.paper import rows
from benchmarks.traffic import Traffic

WORLD, RANK, ROUNDS = 2, 256, 25
console = Console(width=150)


def base() -> nn.Module:
    """Four layers of hidden size 256."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes, **heads))


def ours() -> nn.Module:
    """vera_fx."""
    return vera_fx.adapt(base(), vera_fx.VeraConfig(r=RANK, target_modules="all-linear"))


def pefts() -> nn.Module:
    """PEFT's VeRA."""
    return peft.get_peft_model(base(), peft.VeraConfig(r=RANK, target_modules="all-linear"))


def lora() -> nn.Module:
    """PEFT's LoRA at rank 8."""
    return peft.get_peft_model(base(), peft.LoraConfig(r=8, target_modules="all-linear"))


METHODS: dict[str, Callable[[], nn.Module]] = {
    "vera_fx": ours,
    "PEFT VeRA": pefts,
    "PEFT LoRA r=8": lora,
}


def wrapped(model: nn.Module, how: str) -> nn.Module:
    """The model under DDP or FSDP2, layers and root."""
    if how == "DDP":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    inner: Any = model if hasattr(model, "vera") else model.get_base_model()  # type: ignore[operator]
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Runner:
    """One method under one wrapper: makes steps of training."""

    def __init__(self, method: str, how: str) -> None:
        self.model = wrapped(METHODS[method](), how)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.ids = torch.randint(0, 512, (4, 64), generator=generator)

    def step(self) -> float:
        """Seconds of a step, from one meeting of the processes to the next."""
        dist.barrier()
        start = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.barrier()
        return time.perf_counter() - start

    def held(self) -> int:
        """Bytes of parameters, buffers and optimiser state that this process holds at rest."""
        for module in self.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]
        states = [t for s in self.optimizer.state.values() for t in s.values() if t is not None]
        tensors = [*self.model.parameters(), *self.model.buffers(), *states]
        return sum(_local(t).nbytes for t in {id(t): t for t in tensors}.values())


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def measured(how: str) -> dict[str, dict[str, float]]:
    """For each method: numbers in collectives of one step, seconds, bytes held."""
    runners: dict[str, Runner] = {}
    for name in METHODS:
        runners[name] = Runner(name, how)
        for _ in range(3):
            runners[name].step()
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, runner in runners.items():
            times[name].append(runner.step())
    found: dict[str, dict[str, float]] = {}
    for name, runner in runners.items():
        with Traffic() as traffic:
            runner.step()
        numbers = dict(traffic.numbers)
        found[name] = {**numbers, "seconds": statistics.median(times[name]), "held": runner.held()}
    return found


def _work(rank: int, port: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for how in ("DDP", "FSDP2"):
        found = measured(how)
        if rank == 0:
            results.put((how, found))
    dist.destroy_process_group()


def show(how: str, found: dict[str, dict[str, float]]) -> None:
    """One table: kilobytes of each collective as input, time against PEFT's VeRA, memory."""
    kinds = sorted({k for row in found.values() for k in row} - {"seconds", "held", "barrier"})
    table = Table(title=f"{how}, 2 processes: kB into collectives per step and process")
    for name in ("method", *kinds, "step / PEFT VeRA's", "MB held"):
        table.add_column(name)
    for method, row in found.items():
        traffic = [f"{4 * row.get(kind, 0) / 1e3:,.1f}" for kind in kinds]
        ratio = row["seconds"] / found["PEFT VeRA"]["seconds"]
        table.add_row(method, *traffic, f"{ratio:.2f}", f"{row['held'] / 1e6:.1f}")
    console.print(table)


def show_paper() -> None:
    """The model on paper."""
    table = Table(
        title="On paper: H100s, 4,096 tokens each, bf16 base, all linear layers, fp32 gradients"
    )
    for name in (
        "model",
        "GPUs",
        "how",
        "method",
        "reduced MB",
        "gathered GB",
        "link ms",
        "products ms",
    ):
        table.add_column(name)
    for row in rows():
        table.add_row(*row)
    console.print(table)


def main() -> None:
    """Measure, and print the tables."""
    if "--paper" not in sys.argv:
        context = multiprocessing.get_context("spawn")
        results, port = context.Queue(), 29500 + os.getpid() % 1000
        processes = [context.Process(target=_work, args=(r, port, results)) for r in range(WORLD)]
        for process in processes:
            process.start()
        for _ in range(2):
            show(*results.get(timeout=900))
        for process in processes:
            process.join()
    show_paper()


if __name__ == "__main__":
    main()
