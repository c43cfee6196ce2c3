"""What devices can do, as data: what decides between plans and between forms of a graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_TILE = 128
"""Rows and columns of the output that one unit of an accelerator computes at a time."""


@dataclass(frozen=True, slots=True)
class Device:
    """The costs of one kind of device.

    Attributes:
        name: what people call it.
        single: floating-point operations a second in large float32 products.
        half: the same in bfloat16 and float16.
        bandwidth: bytes a second to and from memory.
        launch: seconds that one more operator costs, whatever it does.
        call: seconds of a step that calling one compiled function costs the host, both ways.
        units: how many parts compute tiles of a product at a time; 0 where any size fills it.
        tensor_single: `single` where TensorFloat-32 is allowed.
        graph_launch: seconds that an operator costs inside a CUDA graph; 0 where there are none.
        spares: the share of a site's whole work that ``plan="auto"`` pays for keeping half the memory
            or less. 0 where memory is the host's.
    """

    name: str
    single: float
    half: float
    bandwidth: float
    launch: float
    call: float = 2.5e-4
    units: int = 0
    tensor_single: float = 0.0
    graph_launch: float = 0.0
    spares: float = 0.0

    def rate(self, itemsize: int) -> float:
        """Floating-point operations a second in products of elements of so many bytes."""
        return self.half if itemsize < 4 else self.single  # noqa: PLR2004

    def product(self, rows: float, inner: float, columns: float, itemsize: int) -> float:
        """Seconds of a ``(rows, inner) @ (inner, columns)`` product.

        An accelerator whose units are more than the output has tiles leaves the others idle.
        """
        seconds = 2.0 * rows * inner * columns / self.rate(itemsize)
        if not self.units:
            return seconds
        tiles = max(1.0, rows / _TILE) * max(1.0, columns / _TILE)
        return seconds / min(1.0, tiles / self.units)

    def traffic(self, elements: float, itemsize: int) -> float:
        """Seconds to read or write so many elements."""
        return elements * itemsize / self.bandwidth


def _cpu(name: str, *, half: float, threads: int = 2) -> Device:
    """A processor by its threads: 100 GFLOP/s and 33 GB/s each, half precision times ``half``."""
    single = 1e11 * threads
    return Device(name, single, half * single, single / 3.0, launch=1e-6)


def _cuda(name: str, rates: tuple[float, float, float], bandwidth: float, units: int) -> Device:
    """A CUDA device by teraflops (half, TensorFloat-32, single) and terabytes a second."""
    half, tensor, single = (1e12 * rate for rate in rates)
    return Device(
        name,
        single,
        half,
        1e12 * bandwidth,
        launch=5e-6,
        units=units,
        tensor_single=tensor,
        graph_launch=1e-6,
        spares=0.05,
    )


def _gpu(name: str, single: float, half: float, bandwidth: float, launch: float) -> Device:
    """Another accelerator, by teraflops and terabytes a second."""
    rates = (1e12 * single, 1e12 * half, 1e12 * bandwidth)
    return Device(name, *rates, launch, spares=0.05)


DEVICES: Mapping[str, Device] = MappingProxyType({
    # H200: measured. Other accelerators: four fifths of what their makers publish for dense
    # products with float32 sums, which is what the measured one reaches.
    "cpu avx2": _cpu("CPU with AVX2", half=1.0),
    "cpu avx512": _cpu("CPU with AVX-512", half=2.0),
    "cpu amx": _cpu("CPU with AMX", half=8.0),
    "cpu arm": _cpu("ARM CPU", half=2.0),
    "a100": _cuda("A100", (250, 125, 16), 1.9, 108),
    "h100": _cuda("H100", (790, 395, 53), 3.2, 132),
    "h200": _cuda("H200", (803, 417, 53), 4.8, 132),
    "l40s": _cuda("L40S", (290, 146, 73), 0.86, 142),
    "rtx 4090": _cuda("RTX 4090", (132, 66, 66), 1.0, 128),
    "t4": _cuda("T4", (52, 6.5, 6.5), 0.3, 40),
    "mps": _gpu("Apple GPU", 10, 11, 0.3, 1e-5),
    "xpu": _gpu("Intel GPU", 40, 300, 2.0, 8e-6),
})  # fmt: skip
"""Every device that is known, by the words that torch's name for it contains."""

CPU = DEVICES["cpu avx512"]
"""What is assumed where nobody says."""
