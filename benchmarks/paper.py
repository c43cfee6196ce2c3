"""What travels between many GPUs per training step, and how long links and products take, by arithmetic.

A ring sends each byte that is reduced ``2 (N - 1) / N`` times through every GPU's link, and each gathered
byte ``(N - 1) / N`` times. FSDP2 gathers the bf16 base twice, for forward and for backward; gradients are of
what trains alone. A frozen base costs ``4 P`` operations a token: forward and the gradient of the input.
"""

from collections.abc import Iterator
from dataclasses import dataclass

TOKENS, RATE = 4096, 400e12
"""Tokens a GPU and step; operations a second that an H100 reaches in bf16 of its 989e12."""

LINKS = {8: 450e9, 64: 50e9}
"""Bytes a second and direction: NVLink inside of one machine, 400 Gbit/s a GPU between machines."""


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes.

    Attributes:
        name: how tables call it.
        layers: how many.
        hidden: the width.
        inner: of the MLP.
        keys: width of keys and values.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    keys: int

    def products(self) -> list[tuple[int, int]]:
        """``(in, out)`` of a layer's seven linears."""
        h, i, k = self.hidden, self.inner, self.keys
        return [(h, h), (h, k), (h, k), (h, h), (h, i), (h, i), (i, h)]

    def weights(self) -> int:
        """Numbers in all linears."""
        return self.layers * sum(a * b for a, b in self.products())

    def vera(self, r: int) -> int:
        """Numbers that VeRA trains."""
        return self.layers * sum(r + out for _, out in self.products())

    def shared(self, r: int) -> int:
        """Numbers of A and B."""
        return r * (max(a for a, _ in self.products()) + max(b for _, b in self.products()))

    def lora(self, r: int) -> int:
        """Numbers that LoRA trains."""
        return self.layers * sum(r * (a + b) for a, b in self.products())


SHAPES = (Shape("7B", 32, 4096, 11008, 4096), Shape("70B", 80, 8192, 28672, 1024))


def rows() -> Iterator[tuple[str, ...]]:
    """The table's rows, as text."""
    for shape in SHAPES:
        for gpus, link in LINKS.items():
            methods = {"VeRA r=256": shape.vera(256), "LoRA r=8": shape.lora(8)}
            for how in ("DDP", "FSDP2"):
                for method, trained in methods.items():
                    yield _row(shape, gpus, link, how, method, trained)


def _row(
    shape: Shape, gpus: int, link: float, how: str, method: str, trained: int
) -> tuple[str, ...]:
    share = (gpus - 1) / gpus
    reduced = 4 * trained
    gathered = 2 * 2 * shape.weights() if how == "FSDP2" else 0
    seconds = (2 * share * reduced + share * gathered) / link
    products = 4 * shape.weights() * TOKENS / RATE
    size = f"{gathered / 1e9:.1f}" if gathered else "-"
    times = f"{1e3 * seconds:.2f}", f"{1e3 * products:.0f}"
    return shape.name, str(gpus), how, method, f"{reduced / 1e6:.1f}", size, *times
