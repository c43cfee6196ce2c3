"""A small model, its data, and steps of training: the same ones in one process and in two."""

import copy
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_vectors

WIDTH, HIDDEN, CLASSES, RANK = 6, 9, 4, 5


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    """Equal layers, a head, and a buffer of the base's own."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * self.scale.sum()
        return self.head(x)


class Checkpointed(Net):
    """Every layer's activations are computed again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) * self.scale.sum()
        return self.head(x)


def config(**fields: object) -> vera_fx.VeraConfig:
    values = {"r": RANK, "target_modules": ["up", "down", "head"], "plan": "factored"}
    return vera_fx.VeraConfig(**{**values, **fields})


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Net().to(dtype)


def adapted(**fields: object) -> nn.Module:
    model = vera_fx.adapt(base(), config(**fields))
    fill_vectors(model)
    return model


def batches(steps: int = 3, rows: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, WIDTH, generator=generator) for _ in range(steps)]


def mine(batch: Tensor) -> Tensor:
    """This process's rows."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def mean_loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.shape[-1])).square().mean() + y.sin().mean()


def train(
    model: nn.Module,
    data: Iterable[Tensor],
    loss: Callable[[Tensor], Tensor] = mean_loss,
    before: Callable[[], object] = lambda: None,
) -> None:
    """AdamW on whatever trains; ``before`` runs between backward and step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for batch in data:
        loss(model(batch)).backward()
        before()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def vectors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that trains, gathered, under the adapted model's own names."""
    found = {n: whole(p.detach()).clone() for n, p in model.named_parameters() if p.requires_grad}
    return {re.sub(r"^((_orig_mod|module)\.)+", "", n): v for n, v in found.items()}


def trained_alone(data: list[Tensor] | None = None, **fields: object) -> dict[str, Tensor]:
    """What one process makes of the whole batches."""
    model = adapted(**fields)
    before = vectors(model)
    train(model, batches() if data is None else data)
    after = vectors(model)
    for name, value in after.items():
        assert_far_apart(value, before[name])
    return copy.deepcopy(after)


def assert_trained(model: nn.Module, expected: dict[str, Tensor], factor: float = 1.0) -> None:
    """The vectors are what one process makes of them, and the same in every process."""
    found = vectors(model)
    assert found.keys() == expected.keys()
    assert len(found) > 3
    for name, value in found.items():
        assert_close(value, expected[name], factor=factor, what=name)
        others = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(others, value.contiguous())
        assert all(torch.equal(other, value) for other in others), f"{name} differs between ranks"
