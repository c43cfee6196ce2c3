"""Builds adapters: projections, vectors and the modules an adapter trains beside them.

Nothing here touches the model; `install` is the one step that does.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter, TrainedBias, Vectors, everywhere, is_everywhere
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.blueprint import Blueprint, home
from vera_fx.bank.hooks import EagerBranch, EagerCopy, EagerHook
from vera_fx.bank.structure import Base
from vera_fx.base.modules import tensor_paths
from vera_fx.base.sharding import is_distributed, whole
from vera_fx.base.targets import targets_now
from vera_fx.errors import TargetError
from vera_fx.passes import Target
from vera_fx.products.kinds import style_of, weight_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_Place = tuple[torch.dtype, torch.device]


def draw(plan: Blueprint) -> dict[str, Tensor]:
    """Fresh projections for the blueprint, in the values PEFT would hold."""
    drawn = plan.kind.parameters.draw(plan.config, *plan.sizes)
    return {n: _through_base(t, plan.places.values(), plan) for n, t in drawn.items()}


def settle(plan: Blueprint, value: Tensor) -> Tensor:
    """A projection read from a file as the bank keeps it: own memory, unrounded as in PEFT."""
    *_, (dtype, device) = plan.places.values()
    return value.to(device=home(device), dtype=plan.kept_dtype(dtype), copy=True)


def _through_base(value: Tensor, places: Iterable[_Place], plan: Blueprint) -> Tensor:
    """Cast as PEFT does: to each base layer's dtype in turn, and back to float32 from a half.

    On a half-precision base A, B and the first vectors so hold rounded values in float32
    (``BaseTunerLayer._move_adapter_to_device_of_base_layer``, then ``cast_adapter_dtype``).
    """
    for dtype, device in places:
        value = value.to(device=home(device), dtype=dtype)
    return value.to(plan.kept_dtype(value.dtype))


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
    for path in plan.targets:
        vectors = _empty_vectors(plan, path) if empty else _first_vectors(model, plan, path)
        adapter.vectors.put(path, Vectors(vectors))
    for path in plan.saved:
        adapter.copies.put(path, _copy_of(path, model.get_submodule(path), empty=empty))
    for path in plan.biases:
        holder = TrainedBias(attribute_of(model.get_submodule(path), "bias"))
        adapter.copies.put(path, _copy_of(path, holder, empty=empty))
    return adapter


def _empty_vectors(plan: Blueprint, path: str) -> dict[str, Tensor]:
    dtype = plan.kept_dtype(plan.places[path][0])
    sizes = plan.kind.own_sizes(plan.config.r, plan.targets[path])
    return {n: torch.empty(size, dtype=dtype, device="meta") for n, size in sizes.items()}


def _first_vectors(model: nn.Module, plan: Blueprint, path: str) -> dict[str, Tensor]:
    def weight() -> Tensor:
        return whole(weight_of(model, path))

    if plan.targets[path].cut is not None and not plan.config.init_weights:
        raise TargetError(
            f"{path!r} is under tensor parallelism, and init_weights=False draws other vectors in each process; "
            "use init_weights=True, and load values into the adapter"
        )
    first = plan.kind.parameters.first(plan.config, plan.targets[path], weight)
    place, kept = plan.places[path], plan.kind.parameters.unrounded
    return {n: _first(v, place, plan, rounded=n not in kept) for n, v in first.items()}


def _first(value: Tensor, place: _Place, plan: Blueprint, *, rounded: bool) -> Tensor:
    dtype, device = place
    if rounded:
        return _through_base(value, [place], plan)
    return value.to(device=home(device), dtype=plan.kept_dtype(dtype))


def _copy_of(path: str, module: nn.Module, *, empty: bool) -> nn.Module:
    stored = module.state_dict(keep_vars=True).values()
    if empty:
        return copied(module, {id(tensor): _without_values(tensor) for tensor in stored})
    if any(style_of(inner) is not None for inner in module.modules()):
        raise TargetError(
            f"{path!r} is under tensor parallelism, and the adapter would train a whole copy of it; leave it "
            "out of the parallel plan, or out of modules_to_save and bias"
        )
    if any(map(is_distributed, stored)):
        raise TargetError(
            f"{path!r} is sharded (fully_shard), and the adapter would train a copy of it; adapt the model "
            "before it is sharded"
        )
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


def install(
    model: nn.Module,
    bank: AdapterBank,
    name: str,
    adapter: Adapter,
    projections: Mapping[str, Tensor],
    targets: Mapping[str, Target],
) -> None:
    """Put a built adapter into the bank, inactive, and hook the modules that it adapts."""
    places: list[tuple[str, str]] = []
    for path, tensor_name, _ in adapter.copied_tensors():
        places.append((path, tensor_name))
        if path in adapter.frozen:
            places.append((everywhere(path), tensor_name))
    bases = _bases(model, places)
    _hook_all(model, bank, adapter)
    bank.insert(name, adapter, projections, targets, bases)


def follow(model: nn.Module, bank: AdapterBank) -> None:
    """Let the bank know the model as it is now: modules replaced, tied or parametrised since.

    Raises:
        TargetError: a target, or a module that an adapter has a copy of, is gone.
    """
    structure = bank.structure
    targets = targets_now(model, structure.targets)
    bases = _bases(model, structure.base_paths)
    for name in bank.adapters:
        _hook_all(model, bank, bank.adapter(name))
    if structure.follow(targets, bases):
        bank.rebind()


def _bases(model: nn.Module, places: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Base]:
    """Where the base's own tensor at each place is read, and its module."""
    tensors, found = tensor_paths(model), dict[tuple[str, str], Base]()
    for path, name in places:
        try:
            module = model.get_submodule(path.removesuffix("."))
            uses = tuple(tensors[id(attribute_of(module, name))])
        except (AttributeError, KeyError) as error:
            raise TargetError(
                f"an adapter has a copy of {name!r} of {path!r}, which is gone from this model; put a "
                "module like it there, or unload the adapters"
            ) from error
        # What stands for every use is only needed where there are several.
        if not is_everywhere(path) or len(uses) > 1:
            found[path, name] = uses, module
    return found


def _hook_all(model: nn.Module, bank: AdapterBank, adapter: Adapter) -> None:
    hooks = ((EagerBranch, adapter.vectors.by_path), (EagerCopy, adapter.copies.by_path))
    for kind, paths in hooks:
        for path in paths:
            _hook(model.get_submodule(path), kind(bank, path))


def attribute_of(root: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path below ``root``."""
    *parents, name = path.split(".")
    return getattr(root.get_submodule(".".join(parents)), name)


def _hook(module: nn.Module, hook: EagerHook) -> None:
    known = [key for key, h in module._forward_hooks.items() if _is_alike(h, hook)]
    if known and isinstance(hook, EagerBranch) and style_of(module) is not None:
        # Behind what makes a plain tensor of the output, if that came later.
        cast("Any", module._forward_hooks).move_to_end(known[0])
    if not known:
        # A copy replaces the output that branches are added to.
        module.register_forward_hook(hook, prepend=isinstance(hook, EagerCopy), with_kwargs=True)


def _is_alike(known: object, hook: EagerHook) -> bool:
    return type(known) is type(hook) and cast("EagerHook", known).path == hook.path


def unhook(model: nn.Module) -> None:
    """Take all hooks of the library off the model."""
    for module in model.modules():
        for kind in _HOOKS:
            hooks = module.__dict__[kind]
            for key in [key for key, hook in hooks.items() if isinstance(hook, EagerHook)]:
                del hooks[key]
                module.__dict__[f"{kind}_with_kwargs"].pop(key, None)
