"""What the library knows of transformers. Nothing here imports it unless the model comes from it."""

import contextlib
import sys
from collections.abc import Container, Iterable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from vera_fx._context import class_made_of
from vera_fx._torch_graphs import in_place, stays_in_place
from vera_fx.base.hf_tracing import traceable


def is_pretrained(model: nn.Module) -> bool:
    """True for a transformers ``PreTrainedModel``; never imports transformers."""
    return is_pretrained_class(type(model))


def is_pretrained_class(cls: type) -> bool:
    """True for a class of such models."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and issubclass(cls, modeling.PreTrainedModel)


def register_types(model: nn.Module) -> None:
    """Make the caches that the model's calls take and return known to torch's pytrees."""
    if is_pretrained(model):
        from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

        register_cache_pytrees_for_model(cast("Any", model))


def mark_static(cache: Any) -> None:
    """Let CUDA graphs write to the layers of a static cache where they are.

    Transformers marks what its own code allocates; here a graph has allocated it. Anything else than
    such a cache stays as it is.
    """
    for part in (cache, *(getattr(cache, name, None) for name in _HALVES)):
        layers = getattr(part, "layers", None)
        for layer in layers if isinstance(layers, list) else ():
            keys = getattr(layer, "keys", None)
            if getattr(layer, "is_compileable", False) and isinstance(keys, Tensor):
                if in_place(keys):
                    break  # as every later call finds it
                for value in vars(layer).values():
                    if isinstance(value, Tensor):
                        stays_in_place(value)


_HALVES = ("self_attention_cache", "cross_attention_cache")


def hides_progress() -> bool:
    """True if transformers is in use and was told to show no progress, or nothing but errors."""
    logging = sys.modules.get("transformers.utils.logging")
    if logging is None:
        return False
    return not logging.is_progress_bar_enabled() or logging.get_verbosity() > logging.WARNING


_RECORDING = "transformers.utils.output_capturing"


def recorded_by(hook: Any) -> str | None:
    """What a hook of transformers notes while a call asks for it (``hidden_states``); None for others.

    The first call with ``output_hidden_states=True`` puts such hooks on all layers, for good.
    """
    if getattr(hook, "__module__", "") != _RECORDING:
        return None
    held = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=False))
    key = held["key"].cell_contents if "key" in held else None
    return key if isinstance(key, str) else None


def recording() -> Container[str]:
    """What hooks of transformers note now, in this thread."""
    module = sys.modules.get(_RECORDING)
    return (module and module._active_collector.get()) or ()


HOOKED = "_output_capturing_hooks_installed"
"""The attribute of models that have such hooks."""

_TRAINABLE = "trainable quantiser"


def allow_training(model: nn.Module) -> None:
    """Let transformers' Trainer take a quantised model: it asks its quantiser, and knows PEFT's alone."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer, "is_qat_trainable", True):
        quantizer.__class__ = class_made_of(type(quantizer), _TRAINABLE, _trainable)


def refuse_training(model: nn.Module) -> None:
    """Undo `allow_training`."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if getattr(type(quantizer), "_vera_purpose", None) == _TRAINABLE:
        quantizer.__class__ = quantizer._vera_base


def _trainable(base: type) -> type:
    def reduce(self: Any, _protocol: Any) -> tuple[Any, ...]:
        return _plain_again, (base, dict(self.__dict__))

    names: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    names |= {"_vera_base": base, "_vera_purpose": _TRAINABLE, "__reduce_ex__": reduce}
    return type(base.__name__, (base,), {**names, "is_qat_trainable": True})


def _plain_again(base: type, state: dict[str, Any]) -> Any:
    """What pickle and copies make of a quantiser; the copy of an adapted model may train as well."""
    made = object.__new__(class_made_of(base, _TRAINABLE, _trainable))
    made.__dict__.update(state)
    return made


def forget_quantisation(model: nn.Module) -> None:
    """Let a model whose modules are plain now be saved and loaded as one."""
    refuse_training(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


@contextlib.contextmanager
def export_patches(model: nn.Module) -> Iterator[None]:
    """Surroundings for an export: stateful attributes put aside, code that traces well."""
    if not is_pretrained(model):
        yield
        return
    from transformers.exporters.exporter_dynamo import reset_model_state

    with reset_model_state(model), traceable():
        yield


_EXPERTS = {"_is_expert_parallel", "is_transposed", "has_gate"}


def tokenwise(model: nn.Module) -> frozenset[str]:
    """Paths of mixtures of experts: stacked weights that serve every token by itself.

    Their interface (``use_experts_implementation``) takes ``(tokens, width)`` and what the router
    chose for each token, and returns ``(tokens, width)`` in the same order.
    """
    return frozenset(
        path for path, module in _experts(model) if not vars(module)["_is_expert_parallel"]
    )


def _experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    named = model.named_modules()
    return ((path, module) for path, module in named if vars(module).keys() >= _EXPERTS)


def capture_hint(model: nn.Module, arguments: Iterable[str]) -> str:
    """What a user can change about a model of transformers that cannot be captured."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_experts_implementation", None) == "eager" and any(_experts(model)):
        return (
            "Its experts run in a loop over those that were chosen; call "
            'model.set_experts_implementation("grouped_mm"), which does not.'
        )
    if "labels" in arguments and getattr(config, "problem_type", "") is None:
        return (
            "Its loss may be chosen by the values of the labels; set model.config.problem_type, to "
            '"single_label_classification" for example.'
        )
    return ""


_CHECKPOINT = "_gradient_checkpointing_func"


@contextlib.contextmanager
def checkpointing_recorded(model: nn.Module) -> Iterator[set[str]]:
    """Trace layers under gradient checkpointing as plain calls, and note which ones they are.

    Transformers calls such a layer through ``_gradient_checkpointing_func``, which no export can
    trace; the graph gets its checkpoints back from a pass.
    """
    paths = {module: path for path, module in model.named_modules()}
    found: set[str] = set()

    def plain(function: Any, *args: Any, **_: Any) -> Any:
        found.update(paths[layer] for layer in _owners(function) if layer in paths)
        return function(*args)

    replaced = {m: m.__dict__[_CHECKPOINT] for m in paths if _CHECKPOINT in m.__dict__}
    try:
        for module in replaced:
            module.__dict__[_CHECKPOINT] = plain
        yield found
    finally:
        for module, function in replaced.items():
            module.__dict__[_CHECKPOINT] = function


def _owners(function: Any) -> list[Any]:
    """The module that a checkpointed function runs: bound to it, or its first given argument."""
    inner = getattr(function, "func", function)
    return [getattr(inner, "__self__", None), *getattr(function, "args", ())[:1]]


def embeddings_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``(path, module)`` of the input and the output embeddings, for models that tell them."""
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getter = getattr(model, name, None)
        with contextlib.suppress(NotImplementedError, AttributeError):
            module = getter() if getter is not None else None
            if isinstance(module, nn.Module) and id(module) in paths:
                yield paths[id(module)], module


def unset_tied(model: nn.Module) -> None:
    """Note in the configuration that input and output embeddings are two, so that saving keeps both."""
    config: Any = getattr(model, "config", None)
    weights = [getattr(module, "weight", None) for _, module in embeddings_of(model)]
    is_noted = is_pretrained(model) and getattr(config, "tie_word_embeddings", False)
    if is_noted and len(weights) > 1 and weights[0] is not weights[1]:
        config.tie_word_embeddings = False


def vocabulary_sizes(model: nn.Module) -> tuple[int | None, int | None]:
    """Rows of the vocabulary now, and in the checkpoint that the model was loaded from.

    None where there is none or it is not known; the network is never asked.
    """
    config: Any = getattr(model, "config", None)
    name = base_model_name(model)
    if name is None or not is_pretrained(model):
        return None, None
    try:
        saved = type(config).from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return _vocabulary(config), None
    return _vocabulary(config), _vocabulary(saved)


def _vocabulary(config: Any) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)


def base_model_name(model: nn.Module) -> str | None:
    """Where the model was loaded from, as PEFT writes it into ``adapter_config.json``."""
    name: Any = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name or None
