"""Hypothesis strategies: small random models that use linear layers in every way we know of.

Widths, ranks and output sizes are drawn so that in, out and r differ; layers are stacked, fanned
out (several sites on one input), called twice, tied, run on reshaped inputs, and mixed with
Conv1D. Inputs have one to four dimensions with sizes down to 1 and 0.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import vera_fx
from vera_fx.passes import PLANS

WIDTHS = (3, 4, 6, 7)


@dataclass(frozen=True)
class Step:
    """One step of a random model: a kind, the width it leads to, and whether a bias is used."""

    kind: str
    width: int
    bias: bool


class RandomModel(nn.Module):
    """Runs its steps in order; widths are tracked, so any list of steps is a valid model."""

    def __init__(self, start: int, steps: list[Step]) -> None:
        super().__init__()
        self.steps = tuple(steps)
        self.layers = nn.ModuleDict()
        width = start
        for number, step in enumerate(steps):
            width = self._add(f"s{number}", step, width)

    def _add(self, name: str, step: Step, width: int) -> int:
        layers = self.layers
        if step.kind in {"linear", "flat", "matmul"}:
            layers[name] = nn.Linear(width, step.width, bias=step.bias and step.kind != "matmul")
        elif step.kind == "conv1d":
            layers[name] = Conv1D(step.width, width)
            nn.init.normal_(layers[name].weight)
        elif step.kind == "fan":
            for part in "abc":
                layers[f"{name}{part}"] = nn.Linear(width, step.width, bias=step.bias)
        elif step.kind == "twice":
            layers[name] = nn.Linear(width, width, bias=step.bias)
            return width
        elif step.kind == "tied":
            layers[f"{name}a"] = nn.Linear(width, width, bias=step.bias)
            layers[f"{name}b"] = nn.Linear(width, width, bias=step.bias)
            layers[f"{name}b"].weight = layers[f"{name}a"].weight
            return width
        elif step.kind == "norm":
            layers[name] = nn.LayerNorm(width)
            return width
        return step.width

    def forward(self, x: Tensor) -> Tensor:
        for number, step in enumerate(self.steps):
            x = self._run(f"s{number}", step, x)
        return x

    def _run(self, name: str, step: Step, x: Tensor) -> Tensor:
        layers = self.layers
        if step.kind == "fan":
            a, b, c = (layers[f"{name}{part}"](x) for part in "abc")
            return torch.tanh(a) * b + c
        if step.kind == "twice":
            return layers[name](torch.tanh(layers[name](x))) + x
        if step.kind == "tied":
            return layers[f"{name}b"](torch.tanh(layers[f"{name}a"](x)))
        if step.kind == "flat":
            return layers[name](x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], step.width)
        if step.kind == "matmul":
            return torch.tanh(layers[name](x))
        return torch.tanh(layers[name](x)) if step.kind != "norm" else layers[name](x)


KINDS = ("linear", "conv1d", "fan", "twice", "tied", "flat", "norm")


@dataclass(frozen=True)
class Case:
    """A random model, an adapter configuration and an input."""

    model: RandomModel
    config: vera_fx.VeraConfig
    x: Tensor


def steps() -> st.SearchStrategy[list[Step]]:
    step = st.builds(Step, st.sampled_from(KINDS), st.sampled_from(WIDTHS), st.booleans())
    adapted = st.lists(step, min_size=1, max_size=4)
    return adapted.filter(lambda found: any(s.kind != "norm" for s in found))


def linear_paths(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]


@st.composite
def cases(
    draw: st.DrawFn,
    dtype: torch.dtype = torch.float64,
    min_size: int = 0,
    plans: tuple[str, ...] = ("auto", *PLANS),
) -> Case:
    """Models with a random, non-empty subset of their linear layers as targets."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    start = draw(st.sampled_from(WIDTHS))
    model = RandomModel(start, draw(steps())).to(dtype)
    targets = draw(st.lists(st.sampled_from(linear_paths(model)), min_size=1, unique=True))
    config = vera_fx.VeraConfig(
        r=draw(st.sampled_from((1, 2, 5, 8))),
        target_modules=targets,
        projection_prng_key=draw(st.integers(0, 3)),
        plan=draw(st.sampled_from(plans)),
    )
    lead = draw(
        st.lists(st.sampled_from([s for s in (0, 1, 2, 3, 5) if s >= min_size]), max_size=3)
    )
    return Case(model, config, torch.randn(*lead, start, dtype=dtype))
