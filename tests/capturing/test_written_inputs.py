"""What a model writes to its inputs arrives in the caller's tensors, whatever their strides are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, fill_vectors
from vera_fx.base.modules import original_class


class Writes(nn.Module):
    """To a buffer that is passed in: whole, to a part of it, and through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 5)

    def forward(self, x: Tensor, *, out: Tensor, more: dict[str, Tensor]) -> Tensor:
        y = self.lin(x)
        out.add_(y)
        more["part"][:, 1:3] = y[:, :2]
        more["view"].t().mul_(2)
        return y * out.sum()


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.t().contiguous().t(),
    "every other": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "part": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("strides", STRIDES)
def test_writes_arrive(strides: str, compiled: bool, fresh_dynamo) -> None:
    torch.manual_seed(0)
    model = vera_fx.adapt(Writes().eval(), vera_fx.VeraConfig(r=3, target_modules=["lin"]))
    fill_vectors(model)
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    x = torch.randn(4, 6)

    def given() -> tuple[Tensor, dict[str, Tensor]]:
        tensors = torch.arange(20.0).view(4, 5).split(1)
        values = torch.cat(tensors)
        made = [STRIDES[strides](values + index) for index in range(3)]
        return made[0], {"part": made[1], "view": made[2]}

    with torch.no_grad():
        for _ in range(2):
            out, more = given()
            expected = original_class(model).forward(model, x, out=out, more=more)
            found_out, found_more = given()
            found = call(x, out=found_out, more=found_more)
            assert_close(found, expected, factor=5)
            assert_close(found_out, out, factor=5)
            for key, tensor in more.items():
                assert_close(found_more[key], tensor, factor=5, what=key)
    assert len(list(model.__dict__["_vera_runtime"].all_captures())) == 1
