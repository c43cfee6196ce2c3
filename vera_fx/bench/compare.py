"""The comparison as a report: times with their spread, ratios to the base and to PEFT, memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Measurement

from vera_fx.bench.methods import BASE, PEFT, Adapters, Method, methods
from vera_fx.bench.timing import interleaved, peak, seconds
from vera_fx.errors import ConfigError, first_line


def inputs_for(model: Any, batch: int, tokens: int) -> dict[str, Tensor]:
    """Random inputs: embeddings with a mask for models of texts, pictures for those of pictures.

    Raises:
        ConfigError: the model takes something else, or fewer tokens.
    """
    parameter = next(model.parameters())
    chance = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        most = getattr(model.config, "max_position_embeddings", None)
        if most is not None and tokens > most:
            raise ConfigError(f"tokens is {tokens}, and {type(model).__name__} takes {most}")
        width = model.get_input_embeddings().embedding_dim
        states = torch.randn(batch, tokens, width, generator=chance)
        mask = torch.ones(batch, tokens, dtype=torch.long, device=parameter.device)
        return {"inputs_embeds": states.to(parameter), "attention_mask": mask}
    if model.main_input_name == "pixel_values":
        side, channels = model.config.image_size, getattr(model.config, "num_channels", 3)
        pictures = torch.randn(batch, channels, side, side, generator=chance)
        return {"pixel_values": pictures.to(parameter)}
    raise ConfigError(
        f"{type(model).__name__} takes {model.main_input_name}; bench measures models of texts and pictures"
    )


def compare(
    model: nn.Module, inputs: dict[str, Tensor], adapters: Adapters, *, compiled: bool, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Measure all methods: a table of training steps and one of calls, with a row for each method.

    Args:
        model: the base; its weights are shared by all methods, and frozen.
        inputs: of a call.
        adapters: what is adapted, and how.
        compiled: whether models are compiled.
        rounds: how often each step is timed.

    Raises:
        ConfigError: the model cannot be trained on such inputs.
        VeraFxError: it cannot be adapted.
    """
    device = next(model.parameters()).device
    found = methods(model, inputs, adapters, compiled=compiled)
    first = {method.name: _first(method) for method in found}
    train = interleaved({method.name: method.step for method in found}, rounds)
    memory = {method.name: peak(method.step, device) for method in found}
    calls = interleaved({method.name: method.call for method in found}, rounds)
    steps = [
        {
            **_row(train, method.name),
            "MiB": _rounded(memory[method.name]),
            "first s": round(first[method.name], 2),
            "trainable": sum(p.numel() for p in method.trained),
        }
        for method in found
    ]
    return {
        "training step": steps,
        "call without gradients": [_row(calls, method.name) for method in found],
    }


def _first(method: Method) -> float:
    """Seconds of the first step: capture and compilation included."""
    try:
        return seconds(method.step)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{method.name}: a step cannot be made with {', '.join(method.inputs)}: {first_line(error)}"
        ) from error


def _row(times: dict[str, Measurement], name: str) -> dict[str, Any]:
    """Milliseconds, their spread between quartiles, and the ratios."""
    one, peft = times[name], times.get(PEFT)
    return {
        "method": name,
        "ms": round(1e3 * one.median, 3),
        "spread": round(1e3 * one.iqr, 3),
        "/ base": round(one.median / times[BASE].median, 3),
        "/ PEFT": None if peft is None else round(one.median / peft.median, 3),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
