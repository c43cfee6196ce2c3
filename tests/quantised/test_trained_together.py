"""Adapters that train in one batch over every library's weights: each as if it trained alone."""

from typing import Any

import pytest
import torch

import vera_fx
from tests.helpers import assert_close, fill_adapters
from tests.quantised.backends import IDS, TARGETS, WITH_GRADIENTS, quantised
from tests.training.jobs import assert_trained_alike, trained
from vera_fx import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore:.*passes no gradient on to its input")
ROWS, NAMES = IDS[[0, 1, 2, 0, 1]], ["default", "small", "__base__", "small", "default"]


def config(r: int = 5) -> vera_fx.VeraConfig:
    return vera_fx.VeraConfig(r=r, target_modules=TARGETS, d_initial=0.4)


def adapted(name: str) -> Any:
    model = vera_fx.adapt(quantised(name), config())
    vera_fx.add_adapter(model, "small", config(r=3))
    fill_adapters(model)
    return model.train()


def losses_of(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """A sum for each row, not a mean, so that rows do not weigh by their number."""
    logits = model(input_ids=ids, **options).logits
    return vera_fx.row_losses(model, logits, ids).sums


def gradients(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.vera.adapter(name).named_parameters()}


@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed"])
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_losses_and_gradients_as_if_alone(name: str, how: str) -> None:
    torch._dynamo.reset()
    model = adapted(name)
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    call = compiled if how == "compiled" else model
    vera_fx.train_adapters(model, ["default", "small"])
    mixed = losses_of(call, ROWS, adapter_names=NAMES)
    mixed.sum().backward()
    found = {who: gradients(model, who) for who in ("default", "small")}
    # int8 products of bitsandbytes round the whole batch's outlier columns alike.
    factor = 500 if name.startswith("int8") else 20
    for who in found:
        rows = [row for row, other in enumerate(NAMES) if other == who]
        vera_fx.set_adapter(model, who)
        model.zero_grad()
        alone = losses_of(model, ROWS[rows])
        alone.sum().backward()
        assert_close(mixed[rows], alone, factor=factor, what=who)
        expected = gradients(model, who)
        assert len(expected) == 12
        for key, value in expected.items():
            assert value.any(), key
            assert_close(found[who][key], value, factor=factor * 5, what=f"{who} {key}")


@pytest.mark.parametrize("name", ["nf4", "int8", "ao-int8", "hqq-4", "quanto-8"])
def test_jobs_end_where_each_ends_alone(name: str) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    jobs = {
        "slow": (config(), rows, TrainSettings(steps=4, batch_size=2, lr=3e-3)),
        "fast": (config(), rows, TrainSettings(steps=3, batch_size=3, lr=3e-2, seed=1)),
        "rank": (config(r=3), rows, TrainSettings(steps=4, batch_size=1, lr=1e-2)),
    }
    together = quantised(name)
    results = vera_fx.train_many(together, jobs, progress=False)
    for who, job in jobs.items():
        alone = quantised(name)
        expected = vera_fx.train_many(alone, {who: job}, progress=False)
        bound = 2e-2 if name == "int8" else 2e-3
        assert results[who].loss == pytest.approx(expected[who].loss, rel=bound)
        assert_trained_alike(trained(together, who), trained(alone, who), bound=bound)
