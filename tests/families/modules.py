"""torch's own attention modules, which read weights without calling the modules that own them."""

import torch
from torch import Tensor, nn

from tests.families.member import Member


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True, dropout=0.1)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def attention() -> nn.Module:
    return nn.MultiheadAttention(12, 4, batch_first=True)


MODULES: tuple[Member, ...] = (
    Member(
        "TransformerEncoder",
        encoder,
        lambda: {"src": _noise(3, 5, 12)},
        {"target_modules": ["linear1", "linear2", "out_proj"]},
        oracle="folded",
    ),
    Member(
        "MultiheadAttention",
        attention,
        lambda: {"query": _noise(3, 5, 12), "key": _noise(3, 7, 12), "value": _noise(3, 7, 12)},
        {"target_modules": ["out_proj"]},
        oracle="folded",
        limits={"mixed": "cuts through the rows"},
    ),
)
