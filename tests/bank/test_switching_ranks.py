"""Switching among ranks, exhaustively: plan, dimensions of the input, gradients, compiler, order."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close
from vera_fx.passes import PLANS

RANKS = (2, 5, 9)
ORDERS = tuple(itertools.permutations(RANKS))
LEADING = {1: (), 2: (3,), 3: (2, 3), 4: (2, 1, 3)}
MODES = {"grad": torch.enable_grad, "no grad": torch.no_grad, "inference": torch.inference_mode}


def adapted(plan: str, first: int) -> nn.Module:
    """Two linear layers; an adapter of every rank, the one of rank ``first`` adapted first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).eval()
    configs = {r: vera_fx.VeraConfig(r=r, target_modules="all-linear", plan=plan) for r in RANKS}
    vera_fx.adapt(model, configs.pop(first), adapter_name=str(first))
    for rank, config in configs.items():
        vera_fx.add_adapter(model, str(rank), config)
    with torch.no_grad():
        for parameter in model.vera.parameters():
            parameter.normal_()
    return model


def by_modules(model: nn.Module, x: Tensor) -> Tensor:
    return model[2](model[1](model[0](x)))


def vector_gradients(model: nn.Module, rank: int, output: Tensor) -> dict[str, Tensor]:
    vectors = dict(model.vera.adapters[str(rank)].named_parameters())
    found = torch.autograd.grad(output.sin().sum(), list(vectors.values()))
    return dict(zip(vectors, found, strict=True))


def check(call: Callable[..., Any], model: nn.Module, rank: int, x: Tensor) -> None:
    """The output under one rank, and with gradients those of its vectors."""
    vera_fx.set_adapter(model, str(rank))
    actual, expected = call(x), by_modules(model, x)
    assert_close(actual, expected, factor=10, what=f"rank {rank}")
    if torch.is_grad_enabled():
        wanted = vector_gradients(model, rank, expected)
        for name, value in vector_gradients(model, rank, actual).items():
            assert_close(value, wanted[name], factor=50, what=f"rank {rank}: {name}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", LEADING)
@pytest.mark.parametrize("plan", ["auto", *PLANS])
def test_every_order_of_ranks(plan: str, dims: int, mode: str) -> None:
    """The first rank that a graph sees is written nowhere into it."""
    x = torch.randn(*LEADING[dims], 6)
    for first in RANKS:
        model = adapted(plan, first)
        with MODES[mode]():
            for order in (o for o in ORDERS if o[0] == first):
                for rank in order:
                    check(model, model, rank, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", LEADING)
@pytest.mark.parametrize("plan", ["auto", *PLANS])
def test_every_order_of_ranks_compiled(plan: str, dims: int, mode: str, fresh_dynamo: Any) -> None:
    """All orders one after the other through one compiled model."""
    x = torch.randn(*LEADING[dims], 6)
    model = adapted(plan, RANKS[dims % len(RANKS)])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with MODES[mode]():
        for rank in itertools.chain.from_iterable(ORDERS):
            check(compiled, model, rank, x)
    assert not fresh_dynamo["graph_break"]
