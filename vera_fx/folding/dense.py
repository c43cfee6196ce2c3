"""Plain linear modules in the place of those that graphs call, with the weights that these multiply by."""

import torch
from torch import nn

from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.build import follow
from vera_fx.base.hf import forget_quantisation
from vera_fx.base.modules import HOOKS, in_bank, module_paths, set_child
from vera_fx.products.opaque import dense_weight, features_of, is_opaque, tensors_of


def make_dense(model: nn.Module, bank: AdapterBank) -> None:
    """Replace every quantised linear module of the model by an ``nn.Linear``; memory grows to the dense model's.

    Raises:
        Exception: whatever a module raises that cannot say its weight; the model is as it was then.
    """
    paths = module_paths(model)
    opaque = {p: m for p, m in model.named_modules() if p and not in_bank(p) and is_opaque(m)}
    dtype = _dtype(model, list(opaque.values()))
    dense = {path: _linear(module, dtype) for path, module in opaque.items()}
    for path, module in opaque.items():
        for alias in paths[id(module)]:
            parent, _, name = alias.rpartition(".")
            set_child(model.get_submodule(parent), name, dense[path])
    if dense:
        forget_quantisation(model)
        follow(model, bank)


def _dtype(model: nn.Module, opaque: list[nn.Module]) -> torch.dtype:
    """The dtype of what is not quantised: that of most elements."""
    own = {id(t) for module in opaque for t in tensors_of(module)}
    sizes: dict[torch.dtype, int] = {}
    for path, tensor in model.named_parameters():
        if id(tensor) not in own and not in_bank(path) and tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def _linear(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    inside, outside = features_of(module) or (0, 0)
    bias = getattr(module, "bias", None)
    made = nn.Linear(inside, outside, bias=bias is not None, device="meta")
    weight = dense_weight(module, dtype).to(dtype)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype).clone(), requires_grad=False)
    made.training = module.training
    for name in HOOKS:
        made.__dict__[name] = module.__dict__[name]
    return made
