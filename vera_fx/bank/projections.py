"""The shared frozen projections A and B, drawn exactly as PEFT 0.21 draws them."""

import math

import torch
from torch import Tensor, nn


def draw_projections(r: int, max_in: int, max_out: int, key: int) -> tuple[Tensor, Tensor]:
    """Draw ``vera_A (r, max_in)`` and ``vera_B (max_out, r)`` in float32 on the CPU.

    Kaiming uniform with gain sqrt(2) (paper, section 3.3), one generator seeded with ``key``,
    A first and then B: the order and bounds of PEFT's ``VeraModel._init_vera_A_vera_B``.
    """
    generator = torch.Generator(device="cpu").manual_seed(key)
    return _kaiming(r, max_in, generator), _kaiming(max_out, r, generator)


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


class Projections(nn.Module):
    """One pair of projections, shared by every adapter that was trained with them.

    Attributes:
        vera_A: ``(r, max_in)``, frozen.
        vera_B: ``(max_out, r)``, frozen.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, vera_A: Tensor, vera_B: Tensor, *, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("vera_A", vera_A, persistent=persistent)
        self.register_buffer("vera_B", vera_B, persistent=persistent)

    def keep(self, *, persistent: bool) -> None:
        """Let ``state_dict`` have them if this or any earlier owner asked for it."""
        if persistent:
            for name, value in (("vera_A", self.vera_A), ("vera_B", self.vera_B)):
                self.register_buffer(name, value)

    @property
    def r(self) -> int:
        """The rank."""
        return self.vera_A.shape[0]

    def equals(self, vera_A: Tensor, vera_B: Tensor) -> bool:
        """True if these are bit for bit the given projections, and of the same dtype.

        A graph multiplies A with what has the dtype of the vectors.
        """
        pairs = ((self.vera_A, vera_A), (self.vera_B, vera_B))
        return all(
            a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a)) for a, b in pairs
        )

    def padded(self, max_in: int, max_out: int) -> tuple[Tensor, Tensor]:
        """The projections with zeros up to the given sizes; themselves if large enough.

        Other adapters of a bank may have larger targets. There this adapter's vectors are zero.
        """
        A, B = self.vera_A, self.vera_B
        if A.shape[1] < max_in:
            A = nn.functional.pad(A, (0, max_in - A.shape[1]))
        if B.shape[0] < max_out:
            B = nn.functional.pad(B, (0, 0, 0, max_out - B.shape[0]))
        return A, B

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        return f"r={self.r}, max_in={self.vera_A.shape[1]}, max_out={self.vera_B.shape[0]}"
