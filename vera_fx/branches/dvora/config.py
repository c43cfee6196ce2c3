"""The configuration of a DVoRA adapter: VeRA's, with the plans that DVoRA has."""

from dataclasses import dataclass
from typing import ClassVar

from vera_fx.branches.vera.config import VeraConfig


@dataclass(frozen=True)
class DVoraConfig(VeraConfig):
    """As `VeraConfig`; ``plan`` may be any but ``"scaled"`` and ``"merged"``.

    Every target has one more trained vector, the magnitude of its rows ``(out,)``, which starts at
    the norms of the base weight's rows: the adapted model starts at the base.
    """

    peft_type: ClassVar[str] = "DVORA"
    plans: ClassVar[tuple[str, ...]] = ("factored", "dense")
