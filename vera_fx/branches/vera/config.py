"""The configuration of a VeRA adapter: PEFT's field names, meanings and defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

from vera_fx.config import SEEDS, AdapterConfig, check_finite, check_flag, check_int, check_share


@dataclass(frozen=True)
class VeraConfig(AdapterConfig):
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
            ``"factored"``, ``"scaled"``, ``"merged"`` and ``"dense"`` ask for one plan,
            ``"timed"`` lets it choose by timing the plans on this machine (a few seconds for every
            shape of layer), and ``"memory"`` lets training keep as little as it can.
        task_type: PEFT's task type; classification types add their head to ``modules_to_save``.
        inference_mode: whether an adapter made from it never trains.
        base_model_name_or_path: noted in files where the model itself does not say it.
        revision: likewise.
        auto_mapping: taken for PEFT's sake; files say what fits the model.

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
    inference_mode: bool = False
    base_model_name_or_path: str | None = field(default=None, compare=False)
    revision: str | None = field(default=None, compare=False)
    auto_mapping: Mapping[str, str] | None = field(default=None, compare=False)

    peft_type: ClassVar[str] = "VERA"
    biases: ClassVar[tuple[str, str, str]] = ("none", "all", "vera_only")

    def __post_init__(self) -> None:
        super().__post_init__()
        seed = check_int("projection_prng_key", self.projection_prng_key, SEEDS, "an integer")
        self._set("projection_prng_key", seed)
        check_share("vera_dropout", self.vera_dropout)
        check_finite("d_initial", self.d_initial)
        check_flag("save_projection", self.save_projection)

    @property
    def dropout(self) -> float:
        """``vera_dropout``."""
        return self.vera_dropout

    @property
    def saves_shared(self) -> bool:
        """``save_projection``."""
        return self.save_projection

    def saving_shared(self) -> Self:
        """With ``save_projection``."""
        return self.replace(save_projection=True)
