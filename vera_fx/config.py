"""What the configurations of all kinds of adapters have in common; one kind's own is in `branches`."""

import dataclasses
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from vera_fx.errors import ConfigError, listing, nearest, shown
from vera_fx.passes import OPEN, PLANS

TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
MAX_RANK = 2**40
MAX_LAYER = 2**31
SEEDS = range(-(2**63), 2**64)
"""What torch's generators take."""

_MAX_FLOAT = 3.4028234e38
"""What float32 holds: values become tensors of it."""

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class AdapterConfig:
    """Mixed into the frozen dataclass of each kind, which has these fields and its own.

    Attributes:
        r: rank of the branch, a positive integer.
        target_modules: which linear modules to adapt: paths or ends of paths, a regular expression,
            ``"all-linear"``, or None for the default of the model's architecture.
        exclude_modules: what to leave out of them, in the same notation.
        layers_to_transform: layer indices to adapt; None for all.
        layers_pattern: name of the module list that the indices count in.
        fan_in_fan_out: accepted for PEFT's sake; the layout is read off each module.
        bias: which biases train.
        modules_to_save: modules trained in full beside the branch, each adapter its own copy.
        init_weights: whether the first values are those of the kind's paper.
        plan: how branches are computed.
        task_type: PEFT's task type.
        inference_mode: whether an adapter made from it never trains.
        base_model_name_or_path: noted in files where the model itself does not say it.
        revision: likewise.
        auto_mapping: taken for PEFT's sake.
    """

    r: int
    target_modules: Sequence[str] | str | None
    exclude_modules: Sequence[str] | str | None
    layers_to_transform: Sequence[int] | int | None
    layers_pattern: Sequence[str] | str | None
    fan_in_fan_out: bool
    bias: str
    modules_to_save: Sequence[str] | None
    init_weights: bool
    plan: str
    task_type: str | None
    inference_mode: bool
    base_model_name_or_path: str | None
    revision: str | None
    auto_mapping: Mapping[str, str] | None

    peft_type: ClassVar[str]
    """What configurations on disk call the kind."""

    read_file: ClassVar[Callable[[Path], "AdapterConfig"]]
    write_file: ClassVar[Callable[["AdapterConfig", Path], None]]
    """Reads a folder's file; set by `vera_fx.checkpoint`, which knows the form."""

    biases: ClassVar[tuple[str, str, str]] = ("none", "all", "targets_only")
    """What ``bias`` may be: for none, for all of the model, and for those of targets."""

    plans: ClassVar[tuple[str, ...]] = PLANS
    """What ``plan`` may be, beside ``"auto"``, ``"timed"`` and ``"memory"``."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "modules_to_save", "layers_pattern", "exclude_modules"):
            self._set(name, _names(name, getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            self._set("modules_to_save", (self.modules_to_save,))
        self._set("r", check_int("r", self.r, range(1, MAX_RANK + 1), "a positive integer"))
        self._check_layers()
        check_choice("bias", self.bias, self.biases)
        check_choice("plan", self.plan, (*OPEN, *self.plans))
        if self.task_type is not None:
            self._set("task_type", str(getattr(self.task_type, "value", self.task_type)))
            check_choice("task_type", self.task_type, TASK_TYPES)
        for name in ("init_weights", "fan_in_fan_out", "inference_mode"):
            check_flag(name, getattr(self, name))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is not None:
            self._set("layers_to_transform", _layers(layers))
        if self.layers_pattern and layers is None:
            raise ConfigError(
                "layers_pattern was given without layers_to_transform; give both or none"
            )
        if isinstance(self.target_modules, str) and layers is not None and not self.is_all_linear:
            raise ConfigError(
                "layers_to_transform does not apply to a regular expression "
                f"(target_modules={shown(self.target_modules)}); put the layer numbers into the expression"
            )

    def replace(self, **changes: Any) -> Self:
        """The same configuration with other values for some fields.

        Raises:
            ConfigError: a value cannot be used.
        """
        return dataclasses.replace(cast("Any", self), **changes)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **changes: Any) -> Self:
        """Read the configuration in a folder that vera_fx or PEFT saved, ``adapter_config.json``.

        Whether it may train is for the caller to say: what PEFT notes is always that it may not.

        Args:
            directory: the folder.
            changes: other values for some fields.

        Raises:
            CheckpointError: the file is missing or damaged.
            ConfigError: it is for another kind of adapter, or a value cannot be used.
        """
        found = AdapterConfig.read_file(Path(directory))
        if not isinstance(found, cls):
            raise ConfigError(
                f"{directory} holds a {type(found).__name__}, not a {cls.__name__}; read it with "
                f"{type(found).__name__}.from_pretrained"
            )
        return found.replace(**changes)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``adapter_config.json``, as PEFT's method of this name: all but the plan, which it lacks.

        `vera_fx.save_adapter` writes the file of an adapter, with its weights.

        Args:
            save_directory: the folder; made if it is missing.

        Raises:
            CheckpointError: it cannot be written.
            ConfigError: it has ``exclude_modules``, which PEFT has no word for.
        """
        AdapterConfig.write_file(self, Path(save_directory))

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, and ``peft_type``, as PEFT's ``to_dict`` has them."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(cast("Any", self))}
        return {**values, "peft_type": self.peft_type}

    @property
    def dropout(self) -> float:
        """Probability of dropping an element of the branch's input in train mode."""
        return 0.0

    @property
    def saves_shared(self) -> bool:
        """Whether tensors that all targets share are written into checkpoints."""
        return True

    def saving_shared(self) -> Self:
        """The same configuration, with those tensors written."""
        return self

    @property
    def trains_biases(self) -> str:
        """``"none"``, ``"all"`` of the model or ``"targets"``: whose biases train."""
        return ("none", "all", "targets")[self.biases.index(self.bias)]

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


def _layers(layers: Any) -> tuple[int, ...] | int:
    """An index, or several as a tuple."""
    several = isinstance(layers, Sequence) and not isinstance(layers, str)
    found: list[Any] = list(cast("Any", layers)) if several else [layers]
    if not all(is_int(layer) and abs(layer) < MAX_LAYER for layer in found):
        raise ConfigError(f"layers_to_transform must be integers, got {shown(layers)}")
    indices = tuple(map(int, found))
    return indices if several else indices[0]


def _names(field: str, value: Any) -> Any:
    """Lists and sets of strings become tuples; strings and None stay."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Sequence | set | frozenset) or not all(
        isinstance(v, str) for v in value
    ):
        raise ConfigError(f"{field} must be a string or a list of strings, got {shown(value)}")
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ConfigError: with the nearest of them.
    """
    if not isinstance(value, str) or value not in choices:
        hint = nearest(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"{field} must be one of {listing(choices)}, got {shown(value)}{hint}")


def check_flag(field: str, value: object) -> None:
    """Refuse what is no boolean.

    Raises:
        ConfigError: with the value.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{field} must be True or False, got {shown(value)}")


def check_share(field: str, value: Any) -> None:
    """Refuse what is no probability below 1.

    Raises:
        ConfigError: with the value.
    """
    if not is_real(value) or not 0 <= value < 1:
        raise ConfigError(f"{field} must be at least 0 and below 1, got {shown(value)}")


def check_finite(field: str, value: Any) -> None:
    """Refuse what is no finite number, or none that float32 holds.

    Raises:
        ConfigError: with the value.
    """
    # Not math.isfinite: it fails for integers that no float holds.
    if not is_real(value) or not -_MAX_FLOAT <= value <= _MAX_FLOAT:
        raise ConfigError(f"{field} must be a finite number, got {shown(value)}")


def check_int(field: str, value: Any, within: range, what: str) -> int:
    """The value as Python's integer.

    Args:
        field: its name.
        value: the value; numpy's integers are taken, booleans are not.
        within: what it may be.
        what: the same in words.

    Raises:
        ConfigError: with the value.
    """
    if not is_int(value) or int(value) not in within:
        limit = ""
        if is_int(value) and value > within[-1]:
            limit = f" up to {within[-1]}"
        elif is_int(value) and value < within[0] < 0:
            limit = f" from {within[0]}"
        raise ConfigError(f"{field} must be {what}{limit}, got {shown(value)}")
    return int(value)


def is_int(value: object) -> bool:
    """True for whole numbers; booleans are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """True for real numbers; booleans are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
