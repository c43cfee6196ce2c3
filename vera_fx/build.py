"""Builds adapters: projections, vectors and the modules an adapter trains beside them.

Nothing here touches the model; `install` is the one step that does.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vera_fx.adapter import Adapter, TrainedBias, Vectors
from vera_fx.bank import AdapterBank
from vera_fx.config import VeraConfig
from vera_fx.errors import TargetError, listing, nearest
from vera_fx.hooks import EagerBranch, EagerCopy, EagerHook
from vera_fx.passes import Target
from vera_fx.projections import draw_projections
from vera_fx.targets import base_modules, tensor_paths, weight_of, with_default_targets

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Everything about a new adapter that the model and the configuration decide.

    Attributes:
        config: the configuration.
        targets: the targets by path.
        saved: paths of the modules trained in full.
        biases: paths of the modules whose bias trains.
        autocast: keep vectors and projections of half-precision bases in float32, as PEFT does.
    """

    config: VeraConfig
    targets: Mapping[str, Target]
    saved: tuple[str, ...]
    biases: tuple[str, ...]
    autocast: bool = True


def blueprint(
    model: nn.Module, config: VeraConfig, targets: Mapping[str, Target], *, autocast: bool = True
) -> Blueprint:
    """Find what the adapter trains beside its vectors.

    Raises:
        TargetError: ``modules_to_save`` names a module that does not exist, or the targets are
            spread over devices.
    """
    devices = {str(weight_of(model, path).device) for path in targets}
    if len(devices) > 1:
        raise TargetError(
            f"the targets lie on several devices ({listing(sorted(devices))}); "
            "vera_fx adapts models that are on one device"
        )
    config = with_default_targets(model, config)
    saved = _saved_modules(model, config)
    return Blueprint(config, targets, saved, _bias_modules(model, config, targets, saved), autocast)


def draw(model: nn.Module, plan: Blueprint) -> tuple[Tensor, Tensor]:
    """Fresh projections for the blueprint, in the values PEFT would hold."""
    sizes = [(t.in_features, t.out_features) for t in plan.targets.values()]
    max_in, max_out = (max(column) for column in zip(*sizes, strict=True))
    pair = draw_projections(plan.config.r, max_in, max_out, plan.config.projection_prng_key)
    weights = [weight_of(model, path) for path in plan.targets]
    vera_A, vera_B = (_through_base_dtypes(t, weights, autocast=plan.autocast) for t in pair)
    return vera_A, vera_B


def _through_base_dtypes(value: Tensor, weights: Iterable[Tensor], *, autocast: bool) -> Tensor:
    """Cast as PEFT does: to each base layer's dtype in turn, and back to float32 from a half.

    On a half-precision base A, B and the first vectors so hold rounded values in float32
    (``BaseTunerLayer._move_adapter_to_device_of_base_layer``, then ``cast_adapter_dtype``).
    """
    for weight in weights:
        value = value.to(device=weight.device, dtype=weight.dtype)
    return value.float() if autocast and value.dtype in _HALF else value


def build_adapter(model: nn.Module, plan: Blueprint, *, trainable: bool = True) -> Adapter:
    """A fresh adapter; `install` gives it its projections."""
    adapter = Adapter(plan.config, projections="", trainable=trainable)
    for path, target in plan.targets.items():
        weight = weight_of(model, path)
        d, b = (
            _through_base_dtypes(t, [weight], autocast=plan.autocast)
            for t in _first_vectors(plan.config, target)
        )
        adapter.vectors.put(path, Vectors(d, b))
    for path in plan.saved:
        adapter.copies.put(path, _copy_of(model.get_submodule(path)))
    for path in plan.biases:
        adapter.copies.put(path, TrainedBias(attribute_of(model.get_submodule(path), "bias")))
    return adapter


def _copy_of(module: nn.Module) -> nn.Module:
    """A copy without the hooks of earlier adapters, which would bring a copy of the bank along."""
    hooks = [h for m in module.modules() for kind in _HOOKS for h in m.__dict__[kind].values()]
    copied = copy.deepcopy(
        module, {id(hook): hook for hook in hooks if isinstance(hook, EagerHook)}
    )
    unhook(copied)
    return copied


def _first_vectors(config: VeraConfig, target: Target) -> tuple[Tensor, Tensor]:
    if config.init_weights:
        return torch.full((config.r,), float(config.d_initial)), torch.zeros(target.out_features)
    return torch.randn(config.r), torch.ones(target.out_features)


def _saved_modules(model: nn.Module, config: VeraConfig) -> tuple[str, ...]:
    """Paths of the modules to save: PEFT matches the end of the path, with or without a dot."""
    modules = base_modules(model)
    for name in config.named_modules_to_save:
        if not any(path.endswith(name) for path in modules):
            names = {path.rpartition(".")[2] for path in modules}
            raise TargetError(
                f"modules_to_save names {name!r}, which is no module{nearest(name, names)}"
            )
    found: list[str] = []
    for path in modules:
        inside = any(path.startswith(f"{parent}.") for parent in found)
        if not inside and any(path.endswith(name) for name in config.saved_modules):
            found.append(path)
    return tuple(found)


def _bias_modules(
    model: nn.Module, config: VeraConfig, targets: Mapping[str, Target], saved: tuple[str, ...]
) -> tuple[str, ...]:
    if config.bias == "none":
        return ()
    modules = base_modules(model)
    paths = list(targets) if config.bias == "vera_only" else list(modules)
    return tuple(
        path
        for path in paths
        if isinstance(modules[path]._parameters.get("bias"), Tensor)
        and not any(path == parent or path.startswith(f"{parent}.") for parent in saved)
    )


def install(
    model: nn.Module, bank: AdapterBank, name: str, adapter: Adapter, targets: Mapping[str, Target]
) -> None:
    """Put a built adapter into the bank, inactive, and hook the modules that it adapts."""
    tensors, bases = tensor_paths(model), {}
    for path, tensor_name, _ in adapter.copied_tensors():
        home = model.get_submodule(path)
        bases[path, tensor_name] = tuple(tensors[id(attribute_of(home, tensor_name))]), home
    hooks = ((EagerBranch, adapter.vectors.by_path), (EagerCopy, adapter.copies.by_path))
    for kind, paths in hooks:
        for path in paths:
            _hook(model.get_submodule(path), kind(bank, path))
    bank.insert(name, adapter, targets, bases)


def attribute_of(root: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path below ``root``."""
    *parents, name = path.split(".")
    return getattr(root.get_submodule(".".join(parents)), name)


def _hook(module: nn.Module, hook: EagerHook) -> None:
    hooks = module._forward_hooks.values()
    known = (h for h in hooks if isinstance(h, EagerHook))
    if not any(type(h) is type(hook) and h.path == hook.path for h in known):
        # A copy replaces the output that branches are added to.
        module.register_forward_hook(hook, prepend=isinstance(hook, EagerCopy), with_kwargs=True)


def unhook(model: nn.Module) -> None:
    """Take all hooks of the library off the model."""
    for module in model.modules():
        for kind in _HOOKS:
            hooks = module.__dict__[kind]
            for key in [key for key, hook in hooks.items() if isinstance(hook, EagerHook)]:
                del hooks[key]
                module.__dict__[f"{kind}_with_kwargs"].pop(key, None)
