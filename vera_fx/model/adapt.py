"""The way in and out: adapt a model, look at what it holds, give it back."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vera_fx._torch import normal_tensors
from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank, bank_of
from vera_fx.bank.blueprint import Blueprint, blueprint
from vera_fx.bank.build import build_adapter, draw, install, unhook
from vera_fx.bank.names import check_name
from vera_fx.base.hf import allow_training, refuse_training, register_types
from vera_fx.base.modules import BANK, base_modules
from vera_fx.base.sharding import has_sharded
from vera_fx.base.targets import resolve_targets
from vera_fx.branches.kinds import KINDS, config_from, is_config
from vera_fx.config import AdapterConfig
from vera_fx.errors import AdapterError, ConfigError
from vera_fx.folding.for_good import merge_for_good
from vera_fx.folding.merging import unmerge
from vera_fx.graphs.around import prepare
from vera_fx.graphs.parts import restore_parts
from vera_fx.graphs.runtime import require_adapted, runtime_of
from vera_fx.model.containers import place_bank, remove_bank
from vera_fx.model.entries import make_entries
from vera_fx.model.model_class import extend, is_adapted, restore_class
from vera_fx.processes.wrapped import unwrapped
from vera_fx.products.kinds import allow_packing, keep_gradients

M = TypeVar("M", bound=nn.Module)


def adapt(
    model: M,
    config: AdapterConfig,
    *,
    adapter_name: str = "default",
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    autocast_adapter_dtype: bool = True,
) -> M:
    """Adapt ``model`` in place with one trainable adapter, of VeRA (arXiv 2310.11454) or another kind.

    The base is frozen, a bank is attached as ``model.vera``, and the model's class is extended so that
    its calls run adapted graphs. No module is replaced.

    Args:
        model: any ``nn.Module``, a Hugging Face model or not.
        config: what to adapt and how; PEFT's own ``VeraConfig`` is taken as well.
        adapter_name: name of the first adapter.
        example_inputs: arguments of one call (a mapping of keywords, or a sequence) to capture
            right away; otherwise each signature is captured at its first call.
        autocast_adapter_dtype: keep the vectors of half-precision models in float32, as PEFT does.

    Returns:
        The same object.

    Raises:
        ConfigError: ``config`` is no `VeraConfig` or configuration of another kind.
        TargetError: the targets do not fit the model.
        AdapterError: the model is adapted already, or the name cannot be used.
        CaptureError: ``example_inputs`` are no call that could be captured.
        After any of them the model is what it was before.
    """
    config = check_adaptable(model, config)
    check_name(adapter_name, taken=())
    plan = blueprint(model, config, resolve_targets(model, config), autocast=autocast_adapter_dtype)
    with normal_tensors():
        adapter = build_adapter(model, plan, trainable=not config.inference_mode)
        adapt_with(model, adapter_name, adapter, draw(plan), plan)
    if example_inputs is not None:
        _capture_example(model, example_inputs)
    return model


def adapt_with(
    model: nn.Module,
    name: str,
    adapter: Adapter,
    projections: Mapping[str, Tensor],
    plan: Blueprint,
) -> None:
    """Put a finished adapter on an unadapted model: the one step that changes the model.

    Whatever it raises, the model is what it was before.
    """
    bank = AdapterBank()
    bank.thawed = tuple(path for path, p in model.named_parameters() if p.requires_grad)
    try:
        install(model, bank, name, adapter, projections, plan.targets)
        model.requires_grad_(requires_grad=False)
        place_bank(model, bank)
        bank.train(model.training)
        bank.activate([name])
        register_types(model)
        allow_training(model)
        bank.unpacked = keep_gradients(model)
        extend(model)
        make_entries(model)
    except BaseException:
        _detach(model, bank)
        raise


def check_adaptable(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """Refuse what cannot be adapted, before anything is built; gives `checked_config`.

    Raises:
        ConfigError: wrong kinds of arguments.
        AdapterError: the model is adapted already or cannot hold a bank.
    """
    config = checked_config(config)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    _check_not_pefts(model)
    _check_not_reduced(model)
    if hasattr(model, "_orig_mod"):
        raise AdapterError(
            "this is the wrapper that torch.compile made; adapt the model that was given to "
            "torch.compile, before or after, and call the wrapper as always"
        )
    if is_adapted(model):
        raise AdapterError(
            f"this {type(model).__name__} is adapted already (adapters: "
            f"{', '.join(bank_of(model).adapters)}); use add_adapter for another adapter, or unload first"
        )
    inner = [path for path, module in base_modules(model).items() if is_adapted(module)]
    if inner:
        raise AdapterError(
            f"the module {inner[0]!r} inside this model is adapted already; unload it first"
        )
    if hasattr(model, BANK):
        raise AdapterError(
            f"this {type(model).__name__} has an attribute {BANK!r} of its own, where the adapter bank goes"
        )
    if "forward" in model.__dict__:
        raise AdapterError(
            f"the forward of this {type(model).__name__} was replaced on the object (by a wrapper such "
            "as accelerate's); adapt the model before it is wrapped"
        )
    return config


def _check_not_reduced(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        raise AdapterError(
            "this is a DistributedDataParallel, which reduces the gradients of those parameters alone "
            "that trained when it was made; adapt the model first and wrap it then: "
            "DistributedDataParallel(vera_fx.adapt(wrapper.module, config))"
        )


def _check_not_pefts(model: nn.Module) -> None:
    wrapped = [path for path, module in model.named_modules() if _is_pefts(module)]
    if wrapped:
        where = "this is" if not wrapped[0] else f"{wrapped[0]!r} in this {type(model).__name__} is"
        raise AdapterError(
            f"{where} PEFT's, which has replaced layers of the model; give vera_fx the plain model: "
            "peft_model.unload(), or peft_model.merge_and_unload() to keep what was trained. An adapter "
            "that PEFT saved is read by vera_fx.load_adapter(base_model, folder)"
        )


def _is_pefts(module: nn.Module) -> bool:
    bases = {
        f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(module).__mro__
    }
    return not bases.isdisjoint({"peft.PeftModel", "peft.BaseTuner", "peft.BaseTunerLayer"})


def checked_config(config: object) -> AdapterConfig:
    """A configuration of an adapter, ours or PEFT's, as ours; refuses anything else.

    Raises:
        ConfigError: with what was given.
    """
    config = config_from(config)
    if not isinstance(config, AdapterConfig) or not is_config(config):
        known = " or ".join(f"vera_fx.{kind.config.__name__}" for kind in KINDS)
        kind = type(config)
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        raise ConfigError(f"config must be a {known}, got a {module}{kind.__qualname__}")
    return config


def _capture_example(model: nn.Module, inputs: Sequence[Any] | Mapping[str, Any]) -> None:
    """Capture a call of a model that was just adapted; give it back if that fails."""
    try:
        if isinstance(inputs, Mapping):
            prepare(model, (), dict(inputs))
        else:
            prepare(model, tuple(inputs), {})
    except BaseException:
        _detach(model, bank_of(model))
        raise


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Capture and adapt the graph of one signature ahead of its first call.

    A model that cannot be captured whole warns (`PartialCaptureWarning`); the graphs of its parts
    are captured when they are first called.

    Raises:
        AdapterError: the model is not adapted.
        TargetError: a target is used in a way that cannot be adapted.
    """
    model = unwrapped(model)
    require_adapted(model)
    prepare(model, args, kwargs)


def refresh(model: nn.Module) -> None:
    """Forget which state the model's Python was in, so that the next call captures it anew.

    Needed only after changes that leave no mark: contents of NumPy arrays and of other objects whose
    classes are written in C, files that a forward reads, entries of containers with more than
    10,000. Everything else is noticed (docs/reliability.md).

    Raises:
        AdapterError: the model is not adapted.
    """
    model = unwrapped(model)
    require_adapted(model)
    runtime_of(model).refresh()


def unload(model: M, *, merge: bool = False, safe: bool = True) -> M:
    """Give the model its original class back and take the bank off it.

    Args:
        model: an adapted model; it is returned, out of whatever is wrapped around it.
        merge: fold the active adapters into the base weights first; otherwise the base
            weights are what they were before `adapt`. Either way the parameters that trained
            before `adapt` may train again. Quantised modules become plain ``nn.Linear``s, whose
            memory is the dense model's.
        safe: with ``merge``, check the merged weights for NaN and infinity first.

    Raises:
        AdapterError: the model is not adapted.
    """
    model = unwrapped(model)
    require_adapted(model)
    if has_sharded(model):
        raise AdapterError(
            f"this {type(model).__name__} is sharded (fully_shard), which has changed its class after adapt; "
            "save the adapter and load the base anew, or merge(model) and go on with it as it is"
        )
    if merge:
        merge_for_good(model, safe=safe)
    else:
        unmerge(model)
    _detach(model, bank_of(model))
    return model


def _detach(model: nn.Module, bank: AdapterBank) -> None:
    """Take everything off the model that adapting has put there, as far as it came."""
    unhook(model)
    restore_parts(model)
    restore_class(model)
    remove_bank(model)
    refuse_training(model)
    allow_packing(model, bank.unpacked)
    for path in bank.thawed:
        model.get_parameter(path).requires_grad_(True)
    model.__dict__.pop("_vera_runtime", None)
