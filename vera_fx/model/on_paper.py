"""What an adapted model takes in memory, counted from its sizes alone."""

import math
from dataclasses import dataclass

from torch import nn

from vera_fx.base.modules import base_modules
from vera_fx.base.targets import resolve_targets
from vera_fx.branches.kinds import kind_of
from vera_fx.config import AdapterConfig
from vera_fx.errors import ConfigError

_BLOCK = 64
"""Elements that share a scale, as in bitsandbytes' 4-bit types."""


@dataclass(frozen=True, slots=True)
class PaperMemory:
    """Bytes of what a training step holds beside its activations; ``str()`` is in MiB.

    Attributes:
        base: the frozen base, its linear layers in the bits asked for.
        base_16_bit: the same with every weight in 16 bits.
        projections: the shared projections in float32.
        vectors: the adapter's own tensors in float32.
        training: their gradients and AdamW's two moments.
    """

    base: int
    base_16_bit: int
    projections: int
    vectors: int
    training: int

    def __str__(self) -> str:
        base, whole, shared, own, steps = (
            f"{value / 2**20:.1f}"
            for value in (
                self.base,
                self.base_16_bit,
                self.projections,
                self.vectors,
                self.training,
            )
        )
        return (
            f"base {base} (16 bit: {whole}), projections {shared}, vectors {own}, "
            f"gradients and AdamW {steps}"
        )


def memory_on_paper(model: nn.Module, config: AdapterConfig, *, bits: int = 16) -> PaperMemory:
    """Count what an adapted model would hold, from a model that may be on the meta device.

    Args:
        model: the plain model; nothing of it is changed or read but sizes.
        config: of the adapter.
        bits: per weight of the linear layers below the head: 16, 8, or 4 with a scale for every 64.

    Raises:
        ConfigError: another number of bits.
        TargetError: the targets do not fit the model.
    """
    if bits not in {4, 8, 16}:
        raise ConfigError(f"memory_on_paper counts weights of 4, 8 or 16 bits, not {bits!r}")
    targets = resolve_targets(model, config).values()
    parameters = {id(p): p.numel() for p in model.parameters()}
    quantised = {
        id(module.weight): module.weight.numel()
        for module in base_modules(model).values()
        if bits < 16 and isinstance(module, nn.Linear) and not _is_head(model, module)  # noqa: PLR2004
    }
    small = sum(quantised.values())
    scales = small * 4 // _BLOCK if bits == 4 else 0  # noqa: PLR2004
    kind, whole = kind_of(config), sum(parameters.values())
    largest = max(t.in_features for t in targets), max(t.out_features for t in targets)
    shared = kind.shared_sizes(config.r, *largest).values()
    own = 4 * sum(math.prod(s) for t in targets for s in kind.own_sizes(config.r, t).values())
    return PaperMemory(
        base=small * bits // 8 + scales + 2 * (whole - small),
        base_16_bit=2 * whole,
        projections=4 * sum(map(math.prod, shared)),
        vectors=own,
        training=3 * own,
    )


def _is_head(model: nn.Module, module: nn.Module) -> bool:
    getter = getattr(model, "get_output_embeddings", None)
    return getter is not None and getter() is module
