"""The configuration of one adapter: PEFT's field names, meanings and defaults."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vera_fx.errors import ConfigError, listing, nearest
from vera_fx.passes import PLANS

BIASES = ("none", "all", "vera_only")
TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class VeraConfig:
    """What to adapt and how; the fields of PEFT's ``VeraConfig``, plus ``exclude_modules``, ``plan``.

    Attributes:
        r: rank of the shared projections, a positive integer.
        target_modules: which linear modules to adapt. A list matches full paths or their ends
            (``"q_proj"`` matches ``model.layers.0.self_attn.q_proj``), a string is a regular
            expression for the full path, ``"all-linear"`` is every linear module but the output
            head, and None takes the default of the model's architecture.
        projection_prng_key: seed from which the projections are drawn.
        save_projection: write ``vera_A`` and ``vera_B`` into the checkpoint.
        vera_dropout: probability of dropping an element of the branch's input in train mode.
        d_initial: first value of ``lambda_d`` (paper, section 3.2: 0.1).
        fan_in_fan_out: accepted for PEFT's sake; the layout is read off each module.
        bias: which biases train: ``"none"``, ``"all"`` of the model or those of targets
            (``"vera_only"``).
        modules_to_save: modules trained in full beside the vectors, each adapter its own copy.
        init_weights: False starts from ``lambda_b = 1`` and a random ``lambda_d`` (tests).
        layers_to_transform: layer indices to adapt; None for all.
        layers_pattern: name of the module list that the indices count in.
        exclude_modules: what to leave out of ``target_modules``, in the same notation.
        plan: how branches are computed: ``"auto"`` lets the library choose for every site,
            ``"factored"``, ``"scaled"``, ``"merged"`` and ``"dense"`` ask for one plan, and
            ``"timed"`` lets it choose by timing the plans on this machine (a few seconds for every
            shape of layer).
        task_type: PEFT's task type; classification types add their head to ``modules_to_save``.

    Raises:
        ConfigError: a value cannot be used.
    """

    r: int = 256
    target_modules: Sequence[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    init_weights: bool = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    plan: str = "auto"
    task_type: str | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "modules_to_save", "layers_pattern", "exclude_modules"):
            self._set(name, _names(name, getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            self._set("modules_to_save", (self.modules_to_save,))
        self._check_numbers()
        self._check_layers()
        _check_choice("bias", self.bias, BIASES)
        _check_choice("plan", self.plan, ("auto", "timed", *PLANS))
        if self.task_type is not None:
            self._set("task_type", str(getattr(self.task_type, "value", self.task_type)))
            _check_choice("task_type", self.task_type, TASK_TYPES)
        for name in ("save_projection", "init_weights", "fan_in_fan_out"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        if not _is_int(self.r) or self.r <= 0:
            raise ConfigError(f"r must be a positive integer, got {self.r!r}")
        if not _is_int(self.projection_prng_key):
            raise ConfigError(
                f"projection_prng_key must be an integer, got {self.projection_prng_key!r}"
            )
        if not _is_real(self.vera_dropout) or not 0 <= self.vera_dropout < 1:
            raise ConfigError(
                f"vera_dropout must be at least 0 and below 1, got {self.vera_dropout!r}"
            )
        if not _is_real(self.d_initial) or not math.isfinite(self.d_initial):
            raise ConfigError(f"d_initial must be a finite number, got {self.d_initial!r}")

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if isinstance(layers, Sequence) and not isinstance(layers, str):
            self._set("layers_to_transform", tuple(layers))
        checked = layers if isinstance(layers, Sequence) else () if layers is None else (layers,)
        if isinstance(layers, str) or not all(_is_int(layer) for layer in checked):
            raise ConfigError(f"layers_to_transform must be integers, got {layers!r}")
        if self.layers_pattern and layers is None:
            raise ConfigError(
                "layers_pattern was given without layers_to_transform; give both or none"
            )
        if isinstance(self.target_modules, str) and layers is not None and not self.is_all_linear:
            raise ConfigError(
                "layers_to_transform does not apply to a regular expression "
                f"(target_modules={self.target_modules!r}); put the layer numbers into the expression"
            )

    @property
    def is_all_linear(self) -> bool:
        """True if ``target_modules`` is the shorthand ``"all-linear"``."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    @property
    def named_modules_to_save(self) -> tuple[str, ...]:
        """The entries of ``modules_to_save`` that are the user's own, which must exist."""
        heads = {name for names in _HEADS.values() for name in names}
        return tuple(name for name in self.modules_to_save or () if name not in heads)

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """``modules_to_save`` with the heads that the task type adds, as PEFT adds them."""
        return tuple(
            dict.fromkeys((*(self.modules_to_save or ()), *_HEADS.get(self.task_type or "", ())))
        )


def _names(field: str, value: Any) -> Any:
    """Lists and sets of strings become tuples; strings and None stay."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Sequence | set | frozenset) or not all(
        isinstance(v, str) for v in value
    ):
        raise ConfigError(f"{field} must be a string or a list of strings, got {value!r}")
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"{field} must be one of {listing(choices)}, got {value!r}{nearest(str(value), choices)}"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
