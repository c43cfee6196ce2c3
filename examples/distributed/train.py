"""Fine-tune a language model with a VeRA adapter in one process or several: one script for all of them.

python examples/distributed/train.py                                              # one process
torchrun --nproc-per-node 2 examples/distributed/train.py                         # DistributedDataParallel
torchrun --nproc-per-node 2 examples/distributed/train.py --shard                 # FSDP2: layers and root
accelerate launch --config_file examples/distributed/ddp.yaml examples/distributed/train.py
accelerate launch --config_file examples/distributed/fsdp2.yaml examples/distributed/train.py

Without --model a small Llama of random weights learns to count, which takes seconds on a CPU. With it,
a folder of transformers' is fine-tuned on the lines of --text.
"""

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

import vera_fx

COUNTED, LENGTH = 64, 16


def small_model() -> nn.Module:
    """Two layers, 64 words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=COUNTED, **sizes, **heads))


def counting() -> list[dict[str, Tensor]]:
    """Rows that count up from anywhere."""
    starts = torch.arange(COUNTED)[:, None]
    return [{"input_ids": row} for row in (starts + torch.arange(LENGTH)) % COUNTED]


def lines(model: str, text: Path) -> list[dict[str, Tensor]]:
    """The lines of a file, each as ``LENGTH`` tokens and more."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("\n".join(text.read_text().splitlines()), return_tensors="pt").input_ids[0]
    return [{"input_ids": row} for row in ids.split(8 * LENGTH) if len(row) == 8 * LENGTH]


def start(model: str, text: Path | None) -> tuple[Any, list[dict[str, Tensor]]]:
    """The base model, and what it learns."""
    if not model:
        return small_model(), counting()
    if text is None:
        raise typer.BadParameter("--model needs --text, the lines to train on")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model), lines(model, text)


def sharded(model: Any, accelerator: Accelerator) -> nn.Module:
    """FSDP2 without accelerate's plugin: each layer, then the whole."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(
    model: Annotated[str, typer.Option(help="A transformers folder; a small Llama without.")] = "",
    text: Annotated[Path | None, typer.Option(help="Lines to train on, for --model.")] = None,
    shard: Annotated[bool, typer.Option(help="fully_shard instead of DDP.")] = False,
    rank: int = 32,
    steps: int = 60,
    batch: Annotated[int, typer.Option(help="Rows of a step, of all processes together.")] = 16,
    rate: float = 5e-2,
    out: Path = Path("out/distributed"),
) -> None:
    """Adapt, prepare, train, save: the same lines whatever starts them."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    world = accelerator.num_processes
    base, rows = start(model, text)
    # Adapt first: what is wrapped reduces the gradients of what trains then.
    net = vera_fx.adapt(base, vera_fx.VeraConfig(r=rank, target_modules="all-linear"))
    if accelerator.is_main_process:
        print(vera_fx.parameter_summary(net))
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if shard:
        net = sharded(net.to(accelerator.device), accelerator)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    loader = DataLoader(rows, batch_size=batch // world, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    if shard:
        optimizer, loader = accelerator.prepare(optimizer, loader)
    else:
        net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    losses = train(net, optimizer, loader, accelerator, steps)
    if accelerator.is_main_process:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps, {world} process(es)")
    # By all processes: each gathers what is sharded. Writers of one folder wait for each other.
    folder = vera_fx.save_adapter(net, out)
    if accelerator.is_main_process:
        print(f"saved to {folder}")
    accelerator.end_training()
    if "RANK" in os.environ and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def train(
    net: nn.Module, optimizer: Any, loader: Any, accelerator: Accelerator, steps: int
) -> list[float]:
    """The mean loss of all processes at the first step and the last."""
    net.train()
    found: list[float] = []
    step = 0
    while step < steps:
        for rows in loader:
            ids = rows["input_ids"]
            loss = net(input_ids=ids, labels=ids, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step in {0, steps - 1}:
                found.append(accelerator.reduce(loss.detach(), reduction="mean").item())
            step += 1
            if step == steps:
                break
    return found


if __name__ == "__main__":
    typer.run(main)
