"""What DVoRA's branch computes outside of graphs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from vera_fx.branches.dvora.functions import dvora_scale
from vera_fx.branches.dvora.parameters import MAGNITUDE
from vera_fx.branches.protocol import EagerCall, LoraForm, Tensors
from vera_fx.branches.vera.maths import VeraMaths
from vera_fx.branches.vera.parameters import B_VECTOR, D_VECTOR, A, B
from vera_fx.branches.vera.reference import vera_branch, vera_delta


@dataclass(frozen=True, slots=True)
class DVoraMaths:
    """In the order of PEFT's ``DoraLinearLayer.forward``."""

    @property
    def lora_fields(self) -> Mapping[str, object]:
        """LoRA with DoRA's magnitude computes the same."""
        return {"use_dora": True}

    @property
    def adds_up(self) -> bool:
        """The change of the weight depends on the weight."""
        return False

    def add(self, call: EagerCall, tensors: Tensors) -> Tensor:
        """``output + (s - 1) * (W x) + s * branch`` with ``s = m / |V|``."""
        d, b = tensors[D_VECTOR], tensors[B_VECTOR]
        weight = call.weight()
        scale = _scale(weight, tensors)
        x = call.drop(call.x.to(d.dtype))
        if call.drops:
            base = F.linear(x.to(weight.dtype), weight)
        else:
            base = call.base if call.bias is None else call.base - call.bias
        return (
            call.output + (scale - 1) * base + scale * vera_branch(x, tensors[A], tensors[B], d, b)
        )

    def delta(self, tensors: Tensors, in_features: int, weight: Callable[[], Tensor]) -> Tensor:
        """``m * V / |V| - W``."""
        W = weight().to(tensors[D_VECTOR].dtype)
        vera = (tensors[A], tensors[B], tensors[D_VECTOR], tensors[B_VECTOR])
        V = W + vera_delta(*vera, in_features)
        return (tensors[MAGNITUDE] / V.norm(dim=1))[:, None] * V - W

    def lora(self, tensors: Tensors, in_features: int) -> LoraForm:
        """VeRA's matrices, and the magnitude."""
        form = VeraMaths().lora(tensors, in_features)
        return LoraForm(form.A, form.B, {"lora_magnitude_vector": tensors[MAGNITUDE].clone()})


def _scale(weight: Tensor, tensors: Tensors) -> Tensor:
    d, b = tensors[D_VECTOR], tensors[B_VECTOR]
    cut_A, cut_B = tensors[A][:, : weight.shape[1]], tensors[B][: len(b)]
    return dvora_scale(weight, cut_A, cut_B, d, b, tensors[MAGNITUDE])
