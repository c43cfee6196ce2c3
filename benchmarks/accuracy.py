"""Errors of half-precision bases against float64: every plan beside PEFT's own arithmetic.

python -m benchmarks.accuracy
"""

import copy
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import peft
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vera_fx
from vera_fx.branches.vera.reference import vera_delta
from vera_fx.graphs import planning

console = Console(width=120)
FAMILIES = ("roberta", "llama")
HALVES = (torch.bfloat16, torch.float16)
PLANS = ("auto", "scaled", "merged", "dense")
SIZES = (1e-3, 1e-2, 0.2, 1.0)
"""Standard deviations of lambda_b: updates far below, and above, what bfloat16 rounds away."""


def model_and_call(
    name: str, width: int, seed: int, device: str
) -> tuple[nn.Module, dict[str, Any]]:
    """A whole model with its own loss, and the call that is measured."""
    from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500
    }  # fmt: skip
    ids = torch.randint(3, 500, (8, 24)).to(device)
    if name == "llama":
        config = LlamaConfig(**shape, intermediate_size=2 * width, use_cache=False)
        return LlamaForCausalLM(config).to(device), {"input_ids": ids, "labels": ids}
    config = RobertaConfig(
        **shape,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=64,
    )
    return RobertaForMaskedLM(config).to(device), {"input_ids": ids, "labels": ids}


def gradients(model: Any, call: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of every vector by its target and name, in float64."""
    result = model(**call)
    found = {n: p for n, p in model.named_parameters() if "vera_lambda" in n and p.requires_grad}
    values = torch.autograd.grad(result.loss, list(found.values()))
    names = [name.replace(".default", "").replace("default.", "") for name in found]
    names = [
        n.replace("vera.adapters.vectors.", "").replace("base_model.model.", "") for n in names
    ]
    return result.logits.double(), {n: g.double() for n, g in zip(names, values, strict=True)}


def fill(model: nn.Module, size: float) -> nn.Module:
    """The same non-trivial vectors whatever the method: as after some training."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            torch.nn.init.normal_(parameter, std=size if "lambda_b" in name else 0.2)
    return model


def errors(
    name: str, dtype: torch.dtype, size: float, device: str, *, width: int, r: int, seed: int
) -> dict[str, tuple[float, float]]:
    """For each method, the relative errors of logits and of all vectors' gradients together."""
    base, call = model_and_call(name, width, seed, device)
    base = base.to(dtype)
    adapted: dict[str, Any] = {
        "peft": peft.get_peft_model(
            copy.deepcopy(base), peft.VeraConfig(r=r, target_modules="all-linear")
        )
    }
    for plan in PLANS:
        config = vera_fx.VeraConfig(r=r, target_modules="all-linear", plan=plan)
        adapted[plan] = vera_fx.adapt(copy.deepcopy(base), config)
    oracle = copy.deepcopy(fill(adapted["auto"], size)).double()
    exact, exact_gradients = gradients(oracle, call)
    found: dict[str, tuple[float, float]] = {}
    for method, model in adapted.items():
        fill(model, size)
        if method == "peft":  # other parameters' order: by name
            _copy_vectors(adapted["auto"], model)
        logits, values = gradients(model, call)
        wrong = torch.cat([(values[n] - g).flatten() for n, g in exact_gradients.items()])
        whole = torch.cat([g.flatten() for g in exact_gradients.values()])
        found[method] = (_share(logits - exact, exact), _share(wrong, whole))
    return found


def update_share(name: str, size: float, device: str, *, width: int, r: int) -> tuple[float, float]:
    """The smallest and the largest update of a target, as a share of its weight's norm."""
    model, _ = model_and_call(name, width, 0, device)
    config = vera_fx.VeraConfig(r=r, target_modules="all-linear")
    bank: Any = fill(vera_fx.adapt(model, config), size).vera
    (pair,) = bank.projections.values()
    shares = []
    for path, own in bank.adapter("default").vectors.by_path.items():
        weight = model.get_submodule(path).weight
        d, b = own.vera_lambda_d, own.vera_lambda_b
        shares.append(_share(vera_delta(pair.vera_A, pair.vera_B, d, b, weight.shape[1]), weight))
    return min(shares), max(shares)


def _copy_vectors(source: nn.Module, target: nn.Module) -> None:
    bank: Any = source.vera
    values = bank.adapter("default").vectors.by_path
    for name, parameter in target.named_parameters():
        if "vera_lambda" in name:
            path, kind = (
                name.removeprefix("base_model.model.").removesuffix(".default").rsplit(".", 1)
            )
            parameter.data.copy_(getattr(values[path], kind))


def _mean(errors: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Root mean square over the seeds."""
    squares = torch.tensor(errors, dtype=torch.float64).square().mean(0).sqrt()
    return float(squares[0]), float(squares[1])


def _share(error: Tensor, of: Tensor) -> float:
    return float(error.detach().norm() / of.detach().norm())


def main(
    width: Annotated[int, typer.Option(min=16)] = 128,
    r: Annotated[int, typer.Option(min=1)] = 64,
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    device: Annotated[str, typer.Option(help="where models are")] = "cpu",
    output: Annotated[Path, typer.Option()] = Path("out/bench_accuracy.json"),
) -> None:
    """Compare with a float64 copy of the same rounded model."""
    columns = ("model", "dtype", "lambda_b", "update / weight", "method")
    table = Table(*columns, "logits / peft's", "gradients / peft's")
    results: dict[str, Any] = {}
    # On a processor without half-precision instructions "auto" would be PEFT's arithmetic.
    with mock.patch.object(planning, "multiplies_well", return_value=True):
        for name, dtype, size in itertools.product(FAMILIES, HALVES, SIZES):
            runs = [
                errors(name, dtype, size, device, width=width, r=r, seed=s) for s in range(seeds)
            ]
            found = {method: _mean([run[method] for run in runs]) for method in runs[0]}
            kind = str(dtype).removeprefix("torch.")
            results[f"{name} {kind} {size}"] = found
            logits, values = found["peft"]
            least, most = update_share(name, size, device, width=width, r=r)
            for method in PLANS:
                a, b = found[method]
                ratios = f"{a / logits:.2f}", f"{b / values:.2f}"
                table.add_row(name, kind, f"{size}", f"{least:.4f}-{most:.4f}", method, *ratios)
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"written to {output}")


if __name__ == "__main__":
    typer.run(main)
