"""What the tests share: non-trivial vectors, oracles, comparisons that refuse to be empty."""

import contextlib
import copy
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import peft
import torch
from torch import Tensor, nn

import vera_fx
from vera_fx.branches.vera.reference import vera_branch
from vera_fx.graphs.around import Prepared

TOLERANCE = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (3e-2, 3e-3),
    torch.float16: (4e-3, 4e-4),
}
"""(relative, absolute) per dtype, relative to the largest element of what is compared."""


def short_name(parameter: str) -> str:
    """The target's path and the vector's name, from our parameter name or PEFT's."""
    for prefix in ("vera.adapters.", "base_model.model."):
        parameter = parameter.removeprefix(prefix)
    return parameter.replace(".default", "").replace("default.", "").replace("vectors.", "")


def vectors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All VeRA vectors of an adapted model, ours or PEFT's, under the same names."""
    return {short_name(n): p for n, p in model.named_parameters() if "vera_lambda" in n}


def adapter_vectors(model: nn.Module) -> dict[tuple[str, str, str], nn.Parameter]:
    """All vectors of all adapters, ours or PEFT's, by (adapter, target, "d" or "b")."""
    found: dict[tuple[str, str, str], nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if theirs := re.fullmatch(r"base_model\.model\.(.+)\.vera_lambda_(.)\.([^.]+)", name):
            path, vector, adapter = theirs.groups()
        elif ours := re.fullmatch(r"vera\.adapters\.([^.]+)\.vectors\.(.+)\.vera_lambda_(.)", name):
            adapter, path, vector = ours.groups()
        else:
            continue
        found[adapter, path, vector] = parameter
    return found


def fill_adapters(model: nn.Module, scale: float = 0.5) -> None:
    """`fill_vectors` for several adapters: each has values of its own, the same in both libraries."""
    with torch.no_grad():
        for key, parameter in adapter_vectors(model).items():
            generator = torch.Generator().manual_seed(zlib.crc32(".".join(key).encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def fill_vectors(model: nn.Module, scale: float = 0.5) -> None:
    """Give every vector values that depend on its name only; never zero, never the identity."""
    with torch.no_grad():
        for name, parameter in vectors_of(model).items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(values)


def assert_close(actual: Tensor, expected: Tensor, *, factor: float = 1.0, what: str = "") -> None:
    """Every element agrees to the dtype's tolerance, and the reference is worth comparing with."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} != {expected.dtype}"
    assert torch.isfinite(expected).all(), f"{what}: the reference is not finite"
    if expected.numel() == 0:
        return
    relative, absolute = TOLERANCE[expected.dtype]
    bound = factor * (relative * expected.abs().max().item() + absolute)
    error = (actual - expected).abs().max().item()
    assert error <= bound, f"{what}: largest difference {error:.3e}, allowed {bound:.3e}"


def assert_far_apart(actual: Tensor, other: Tensor) -> None:
    """The branch really contributes: the difference is far above any tolerance."""
    if actual.numel():
        difference = (actual - other).abs().max().item()
        assert difference > 1e-3 * max(other.abs().max().item(), 1e-3), "the branch adds nothing"


def main_output(result: Any) -> Tensor:
    """The tensor of a result that a test compares first."""
    for name in ("logits", "last_hidden_state"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    return result[0] if isinstance(result, tuple | list) else result


def loss_of(result: Any) -> Tensor:
    """The model's own loss, or a fixed non-linear function of its output."""
    if getattr(result, "loss", None) is not None:
        return result.loss
    output = main_output(result)
    weights = torch.linspace(-1, 1, max(output.numel(), 1), dtype=output.dtype)[: output.numel()]
    return (output * weights.reshape(output.shape)).square().sum() + (output * 0.3).sin().sum()


def gradients(model: nn.Module, call: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Gradients of every vector for one call."""
    vectors = vectors_of(model)
    values = torch.autograd.grad(loss_of(call(model)), list(vectors.values()), allow_unused=True)
    zeros = (torch.zeros_like(p) for p in vectors.values())
    return {n: z if v is None else v for n, v, z in zip(vectors, values, zeros, strict=True)}


def input_gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Gradient of the input, which the branch's products take part in as well."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(loss_of(model(x)), x)[0]


def assert_same_gradients(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, factor: float = 10.0
) -> None:
    """Gradients of the same vectors agree, each to its own scale."""
    assert actual.keys() == expected.keys()
    assert actual
    for name, value in expected.items():
        assert_close(actual[name], value, factor=factor, what=name)


def hook_reference(base: nn.Module, adapted: nn.Module) -> nn.Module:
    """An oracle that shares no code with the passes: a copy of ``base`` with a hook per target.

    Its vectors are those of ``adapted``, so gradients can be compared by parameter.
    """
    oracle = copy.deepcopy(base).requires_grad_(requires_grad=False)
    bank = adapted.vera
    for name in bank.active:
        adapter = bank.adapter(name)
        pair = bank.projections_of(adapter)
        for path in adapter.vectors.by_path:
            vectors = adapter.vectors_at(path)

            def add(_module: nn.Module, args: Any, output: Tensor, v=vectors, p=pair) -> Tensor:
                branch = vera_branch(args[0], p.vera_A, p.vera_B, v.vera_lambda_d, v.vera_lambda_b)
                return (output + branch).to(output.dtype)

            oracle.get_submodule(path).register_forward_hook(add)
    return oracle


def peft_pair(
    base: nn.Module, r: int = 6, plan: str = "factored", **config: Any
) -> tuple["peft.PeftModel", nn.Module]:
    """The same base adapted by PEFT and by us, with the same non-trivial vectors."""
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=r, **config))
    ours = vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(r=r, plan=plan, **config))
    fill_vectors(theirs)
    fill_vectors(ours)
    assert vectors_of(theirs).keys() == vectors_of(ours).keys()
    return theirs, ours


def adapted_by_peft(base: nn.Module, name: str = "default", **fields: Any) -> "peft.PeftModel":
    """A copy of the base in PEFT's hands, in eval mode, without PEFT's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.VeraConfig(**fields)
        return peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name).eval()


def adapted_by_us(base: nn.Module, name: str = "default", **fields: Any) -> nn.Module:
    """A copy of the base with the plan that is bit-equal to PEFT."""
    config = vera_fx.VeraConfig(plan="factored", **fields)
    return vera_fx.adapt(copy.deepcopy(base), config, adapter_name=name)


def kept_tensors(loss: Callable[[], Tensor]) -> list[Tensor]:
    """What autograd keeps from the making of a loss to its backward, one tensor per storage."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[storage_of(tensor)] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss().backward()
    return list(kept.values())


def storage_of(tensor: Tensor) -> int:
    """The address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def graphs_run() -> Iterator[Callable[[], int]]:
    """Inside the block calls that run graphs are counted, those of parts each."""
    count, plain = 0, Prepared.__init__

    def counted(self: Prepared, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        plain(self, *args, **kwargs)

    with mock.patch.object(Prepared, "__init__", counted):
        yield lambda: count
