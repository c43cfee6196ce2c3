"""Which device the chooser thinks it is on, and measuring one."""

import pytest
import torch

import vera_fx
from tests.models import MLP
from vera_fx._context import _registered, registered
from vera_fx.graphs import calibrate as module
from vera_fx.graphs.machine import costs_of, known_as
from vera_fx.passes import DEVICES

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "name", "row"),
    [
        ("cuda", "NVIDIA A100-SXM4-80GB", "a100"),
        ("cuda", "NVIDIA H100 80GB HBM3", "h100"),
        ("cuda", "NVIDIA H200", "h200"),
        ("cuda", "NVIDIA L40S", "l40s"),
        ("cuda", "NVIDIA GeForce RTX 4090", "rtx 4090"),
        ("cuda", "Tesla T4", "t4"),
        ("cuda", "NVIDIA of next year", "a100"),
        ("mps", "mps", "mps"),
        ("xpu", "xpu", "xpu"),
        ("privateuseone", "privateuseone", "xpu"),
    ],
)
def test_names_of_torch_are_found_in_the_table(kind: str, name: str, row: str) -> None:
    assert known_as(kind, name) == row
    assert row in DEVICES


def test_a_processor_is_as_fast_as_its_threads() -> None:
    torch.set_num_threads(1)
    one = costs_of(CPU)
    torch.set_num_threads(2)
    two = costs_of(CPU)
    torch.set_num_threads(1)
    assert (two.single, two.half, two.bandwidth) == (
        2 * one.single, 2 * one.half, 2 * one.bandwidth,
    )  # fmt: skip
    assert two.launch == one.launch


def test_what_was_measured_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.02)
    before = costs_of(CPU)
    try:
        found = vera_fx.calibrate("cpu")
        assert costs_of(CPU) is found
        assert found.name == f"{before.name}, measured"
        for value in (found.single, found.half, found.bandwidth):
            assert 1e8 < value < 1e14
        assert 1e-8 < found.launch < 1e-2
    finally:
        _registered["measured devices"].clear()
    assert not registered("measured devices")
    assert costs_of(CPU) == before


def test_a_device_that_is_not_here() -> None:
    with pytest.raises(vera_fx.ConfigError, match="calibrate was asked to measure 'xpu:7'"):
        vera_fx.calibrate("xpu:7")


def test_the_plan_that_keeps_least() -> None:
    config = vera_fx.VeraConfig(r=3, target_modules="all-linear", plan="memory")
    model = vera_fx.adapt(MLP().eval(), config)
    x = torch.randn(200, 10)
    model(x).sum().backward()
    (graph,) = vera_fx.explain(model).graphs
    assert {plan for _, plan, _ in graph.plans} == {"scaled"}
    assert all("keeps least for backward" in str(why) for _, _, why in graph.plans)
