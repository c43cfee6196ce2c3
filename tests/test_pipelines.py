"""What a pass raises reaches users as an error of the library that names the pass and the site."""

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import vera_fx
from tests.models import MLP
from vera_fx import pipelines
from vera_fx.passes import PassReport
from vera_fx.passes.engine import emit

CONFIG = vera_fx.VeraConfig(r=3, target_modules=["lin0", "lin1"], plan="factored")


def adapted() -> nn.Module:
    return vera_fx.adapt(MLP(), CONFIG)


def test_a_failing_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: object, _gm: GraphModule, /) -> PassReport:
        raise KeyError("lost")

    monkeypatch.setattr("vera_fx.passes.ShareProjection.__call__", broken)
    model = adapted()

    with pytest.raises(
        vera_fx.PassError, match=r"(?s)ShareProjection failed.*lost.*report it"
    ) as caught:
        model(torch.randn(4, 10))
    assert isinstance(caught.value, vera_fx.VeraFxError)
    assert isinstance(caught.value.__cause__, pipelines.PassContractError)
    assert "try another plan" in str(caught.value)


def test_a_node_that_cannot_be_inserted_names_its_site(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_of = emit.tensor_of

    def wrong(node: torch.fx.Node) -> torch.Tensor:
        if "lin1" in str(node.meta.get("vera_fx", "")):
            raise RuntimeError("no such kernel")
        return tensor_of(node)

    model = adapted()
    monkeypatch.setattr(emit, "tensor_of", wrong)

    with pytest.raises(vera_fx.PassError, match=r"failed at 'lin1'.*no such kernel") as caught:
        model(torch.randn(4, 10))
    assert "exclude_modules=['lin1']" in str(caught.value)
    monkeypatch.undo()
    assert model(torch.randn(4, 10)).shape == (4, 7)  # nothing of the failure was kept
