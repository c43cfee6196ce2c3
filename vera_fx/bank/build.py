"""Builds adapters: projections, vectors and the modules an adapter trains beside them.

Nothing here touches the model; `install` is the one step that does.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter, TrainedBias, Vectors, everywhere
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.hooks import EagerBranch, EagerCopy, EagerHook
from vera_fx.bank.projections import draw_projections
from vera_fx.base.targets import base_modules, tensor_paths, weight_of, with_default_targets
from vera_fx.config import VeraConfig
from vera_fx.errors import TargetError, listing, nearest
from vera_fx.passes import Target

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
    config = with_default_targets(model, config)
    saved = _saved_modules(model, config)
    trained = [t for path in saved for t in model.get_submodule(path).parameters()]
    weights = [*(weight_of(model, path) for path in targets), *trained]
    devices = {str(weight.device) for weight in weights if not weight.is_meta}
    if len(devices) > 1:
        raise TargetError(
            f"the targets and saved modules lie on several devices ({listing(sorted(devices))}); "
            "vera_fx adapts models that are on one device"
        )
    return Blueprint(config, targets, saved, _bias_modules(model, config, targets, saved), autocast)


def projection_sizes(plan: Blueprint) -> tuple[int, int]:
    """``(max_in, max_out)`` over the targets."""
    targets = plan.targets.values()
    return max(t.in_features for t in targets), max(t.out_features for t in targets)


def draw(model: nn.Module, plan: Blueprint) -> tuple[Tensor, Tensor]:
    """Fresh projections for the blueprint, in the values PEFT would hold."""
    pair = draw_projections(plan.config.r, *projection_sizes(plan), plan.config.projection_prng_key)
    vera_A, vera_B = (_through_base_dtypes(t, _weights(model, plan), plan) for t in pair)
    return vera_A, vera_B


def settle(model: nn.Module, plan: Blueprint, value: Tensor) -> Tensor:
    """A projection read from a file as the bank keeps it: own memory, unrounded as in PEFT."""
    *_, last = _weights(model, plan)
    return value.to(device=_home(last), dtype=_kept_dtype(last.dtype, plan), copy=True)


def _weights(model: nn.Module, plan: Blueprint) -> list[Tensor]:
    return [weight_of(model, path) for path in plan.targets]


def home_of(model: nn.Module, plan: Blueprint) -> torch.device:
    """Where the adapter's tensors go: the device of the targets."""
    return _home(_weights(model, plan)[0])


def _home(weight: Tensor) -> torch.device:
    """Beside the weight, or on the CPU while the weight has no values."""
    return torch.device("cpu") if weight.is_meta else weight.device


def _kept_dtype(dtype: torch.dtype, plan: Blueprint) -> torch.dtype:
    return torch.float32 if plan.autocast and dtype in _HALF else dtype


def _through_base_dtypes(value: Tensor, weights: Iterable[Tensor], plan: Blueprint) -> Tensor:
    """Cast as PEFT does: to each base layer's dtype in turn, and back to float32 from a half.

    On a half-precision base A, B and the first vectors so hold rounded values in float32
    (``BaseTunerLayer._move_adapter_to_device_of_base_layer``, then ``cast_adapter_dtype``).
    """
    for weight in weights:
        value = value.to(device=_home(weight), dtype=weight.dtype)
    return value.to(_kept_dtype(value.dtype, plan))


def build_adapter(
    model: nn.Module, plan: Blueprint, *, trainable: bool = True, empty: bool = False
) -> Adapter:
    """A fresh adapter; `install` gives it its projections.

    Args:
        model: the model it is for.
        plan: what it is.
        trainable: whether it may train.
        empty: without values, on the meta device, for a file's tensors to be assigned.

    Raises:
        TargetError: what it would train a copy of has no values yet.
    """
    adapter = Adapter(plan.config, projections="", trainable=trainable)
    for path, target in plan.targets.items():
        weight = weight_of(model, path)
        vectors = _empty_vectors if empty else _first_vectors
        d, b = vectors(plan, target, weight)
        adapter.vectors.put(path, Vectors(d, b))
    for path in plan.saved:
        adapter.copies.put(path, _copy_of(path, model.get_submodule(path), empty=empty))
    for path in plan.biases:
        holder = TrainedBias(attribute_of(model.get_submodule(path), "bias"))
        adapter.copies.put(path, _copy_of(path, holder, empty=empty))
    return adapter


def _copy_of(path: str, module: nn.Module, *, empty: bool) -> nn.Module:
    stored = module.state_dict(keep_vars=True).values()
    if empty:
        return copied(module, {id(tensor): _without_values(tensor) for tensor in stored})
    if any(tensor.is_meta for tensor in stored):
        raise TargetError(
            f"{path!r} is on the meta device, and its values are where the adapter's trained copy "
            "starts; load the weights first"
        )
    return copied(module)


def copied(module: nn.Module, tensors: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A copy without the hooks of earlier adapters, which would bring a copy of the bank along.

    Args:
        module: what to copy.
        tensors: what takes the place of tensors of it, by their identity; others are copied.
    """
    hooks = [h for m in module.modules() for kind in _HOOKS for h in m.__dict__[kind].values()]
    kept: dict[int, Any] = {id(hook): hook for hook in hooks if isinstance(hook, EagerHook)}
    twin = copy.deepcopy(module, {**kept, **(tensors or {})})
    unhook(twin)
    return twin


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty


def _empty_vectors(plan: Blueprint, target: Target, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _kept_dtype(weight.dtype, plan)
    sizes = plan.config.r, target.out_features
    d, b = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    return d, b


def _first_vectors(plan: Blueprint, target: Target, weight: Tensor) -> tuple[Tensor, Tensor]:
    config, out = plan.config, target.out_features
    if config.init_weights:
        first = torch.full((config.r,), float(config.d_initial)), torch.zeros(out)
    else:
        first = torch.randn(config.r), torch.ones(out)
    d, b = (_through_base_dtypes(value, [weight], plan) for value in first)
    return d, b


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
    if config.bias == "all" and isinstance(model._parameters.get("bias"), Tensor):
        raise TargetError(
            f"bias='all' would train the parameter 'bias' of the {type(model).__name__} itself, which "
            "no adapter can have a copy of; use bias='vera_only', or let a module hold it"
        )
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
        uses = tuple(tensors[id(attribute_of(home, tensor_name))])
        bases[path, tensor_name] = uses, home
        if path in adapter.frozen and len(uses) > 1:
            bases[everywhere(path), tensor_name] = uses, home
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
