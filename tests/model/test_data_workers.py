"""An adapted model inside of a dataset, called in the worker processes of a DataLoader."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_vectors
from tests.models import MLP

X = torch.randn(6, 10, generator=torch.Generator().manual_seed(4))


class Embedded(Dataset[Tensor]):
    """Rows as the model gives them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        with torch.no_grad():
            return self.model(X[index][None])[0], len(vera_fx.explain(self.model).graphs)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_compute_what_the_process_does(start: str, warm: bool) -> None:
    """Forked ones with the graphs that there are, spawned ones capture their own."""
    torch.manual_seed(0)
    base = MLP().eval()
    plain = base(X).detach()
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=3, target_modules="all-linear"))
    fill_vectors(model)
    if warm:
        model(X[:1])
    loader = DataLoader(Embedded(model), batch_size=3, num_workers=2, multiprocessing_context=start)
    found = list(loader)
    rows = torch.cat([rows for rows, _ in found])
    assert all((graphs >= 1).all() for _, graphs in found)
    with torch.no_grad():
        assert_close(rows, model(X), factor=5)
    assert_far_apart(rows, plain)
