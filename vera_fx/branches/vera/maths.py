"""What VeRA's branch computes outside of graphs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from vera_fx.branches.protocol import EagerCall, LoraForm, Tensors
from vera_fx.branches.vera.cuts import cut_branch
from vera_fx.branches.vera.parameters import B_VECTOR, D_VECTOR, A, B
from vera_fx.branches.vera.reference import vera_branch, vera_delta


@dataclass(frozen=True, slots=True)
class VeraMaths:
    """By the ten lines of the reference."""

    @property
    def lora_fields(self) -> Mapping[str, object]:
        """Nothing: it is plain LoRA."""
        return {}

    @property
    def adds_up(self) -> bool:
        """Changes of the weight do not depend on the weight."""
        return True

    def add(self, call: EagerCall, tensors: Tensors) -> Tensor:
        """``output + b * ((d * (x @ A.T)) @ B.T)``, in the vectors' dtype."""
        d, b = tensors[D_VECTOR], tensors[B_VECTOR]
        x = call.drop(call.x.to(d.dtype))
        if call.cut is not None:
            return call.output + cut_branch(x, tensors[A], tensors[B], d, b, call.cut)
        return call.output + vera_branch(x, tensors[A], tensors[B], d, b)

    def delta(self, tensors: Tensors, in_features: int, weight: Callable[[], Tensor]) -> Tensor:
        """``diag(b) B diag(d) A``."""
        del weight
        return vera_delta(tensors[A], tensors[B], tensors[D_VECTOR], tensors[B_VECTOR], in_features)

    def lora(self, tensors: Tensors, in_features: int) -> LoraForm:
        """``diag(d) A`` and ``diag(b) B``."""
        d, b = tensors[D_VECTOR], tensors[B_VECTOR]
        vera_A, vera_B = tensors[A][:, :in_features], tensors[B][: len(b)]
        return LoraForm(d[:, None] * vera_A, b[:, None] * vera_B)
