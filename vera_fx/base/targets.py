"""Chooses the targets: which linear modules a configuration adapts, by PEFT's rules."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from vera_fx.base.default_targets import DEFAULT_TARGETS
from vera_fx.base.hf import is_pretrained
from vera_fx.base.modules import base_modules, module_paths, tensor_paths
from vera_fx.config import AdapterConfig
from vera_fx.errors import TargetError, listing, nearest
from vera_fx.passes import Target
from vera_fx.products.kinds import KINDS, known_kind


def resolve_targets(
    model: nn.Module, config: AdapterConfig, *, strict: bool = True
) -> dict[str, Target]:
    """Find every module that ``config`` targets, in the model's order.

    Args:
        model: the model to adapt.
        config: what to adapt.
        strict: also refuse entries of a target list that match nothing while others match.

    Raises:
        TargetError: nothing matches, an entry matches nothing, or a match is no linear module.
    """
    config, strict = (
        with_default_targets(model, config),
        strict and config.target_modules is not None,
    )
    wanted = config.target_modules or ()
    modules = base_modules(model)
    if config.is_all_linear:
        matches = _all_linear(model, config)
    else:
        matches = [path for path in modules if _matches(path, wanted, config)]
    kept = [path for path in matches if not _is_excluded(path, config)]
    if not kept:
        raise TargetError(_explain_nothing(modules, wanted, config, matches))
    if strict:
        _check_every_entry(modules, wanted)
    tensors, twins = tensor_paths(model), module_paths(model)
    return {path: _as_target(path, modules[path], tensors, twins) for path in kept}


def targets_now(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The targets as the model has them now: replaced, tied or parametrised since they were chosen.

    Raises:
        TargetError: a target is gone, or no linear module of its size any more.
    """
    tensors, twins = tensor_paths(model), module_paths(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Target] = {}
    for path in targets:
        if path not in modules:
            raise TargetError(
                f"target {path!r} is gone from this model; put a module there, or unload the adapters"
            )
        now = found[path] = _as_target(path, modules[path], tensors, twins)
        sizes = [(t.in_features, t.out_features) for t in (targets[path], now)]
        if sizes[0] != sizes[1]:
            raise TargetError(
                f"target {path!r} was adapted with (in, out) {sizes[0]} and is a module of {sizes[1]} now; "
                "unload the adapters before it is replaced, and adapt the model again"
            )
    return found


def with_default_targets(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """``config`` with the architecture's targets where it gives none.

    Raises:
        TargetError: it gives none, and the architecture has no default.
    """
    if config.target_modules is not None:
        return config
    return config.replace(target_modules=_default(model))


def _default(model: nn.Module) -> tuple[str, ...] | str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in DEFAULT_TARGETS:
        return DEFAULT_TARGETS[model_type]
    linears = {
        path.rpartition(".")[2]
        for path, m in base_modules(model).items()
        if known_kind(m) is not None
    }
    raise TargetError(
        f"target_modules was not given, and there is no default for model type {model_type!r}; "
        f"give target_modules, for example from this model's linear modules: {listing(sorted(linears))}"
    )


def _matches(path: str, wanted: Iterable[str] | str, config: AdapterConfig) -> bool:
    if isinstance(wanted, str):
        return _full_match(wanted, path)
    if path in wanted:  # a full name also overrides layers_to_transform, as in PEFT
        return True
    return any(path.endswith(f".{name}") for name in wanted) and _is_wanted_layer(path, config)


def _full_match(pattern: str, path: str) -> bool:
    return _compiled(pattern).fullmatch(path) is not None


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{pattern!r} is not a regular expression ({error})") from error


def _is_wanted_layer(path: str, config: AdapterConfig) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == ():
        return True
    index = _layer_index(path, config)
    return index is not None and index in ((layers,) if isinstance(layers, int) else layers)


def _layer_index(path: str, config: AdapterConfig) -> int | None:
    """The first numbered segment of ``path``, or the one below ``layers_pattern``."""
    patterns = config.layers_pattern or ()
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns]
    for expression in expressions or [r".*?\.[^.]*\.(\d+)\."]:
        if (match := _compiled(expression).match(path)) is not None:
            return int(match[1])
    return None


def _all_linear(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Every linear module of the wanted layers but the head that transformers' models end in."""
    head = _head(model, config) if is_pretrained(model) else None
    return [
        path
        for path, module in base_modules(model).items()
        if known_kind(module) is not None and module is not head and _is_wanted_layer(path, config)
    ]


def _head(model: Any, config: AdapterConfig) -> nn.Module | None:
    head = model.get_output_embeddings()
    if head is None and config.task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in ("score", "classifier"))
        head = next((module for module in heads if module is not None), None)
    return head


def _is_excluded(path: str, config: AdapterConfig) -> bool:
    exclude = config.exclude_modules or ()
    if isinstance(exclude, str):
        excluded = _full_match(exclude, path)
    else:
        excluded = any(path == name or path.endswith(f".{name}") for name in exclude)
    saved = (rf"(^|.*\.){name}($|\..*)" for name in config.saved_modules)
    return excluded or any(_full_match(pattern, path) for pattern in saved)


def _explain_nothing(
    modules: Mapping[str, nn.Module],
    wanted: Iterable[str] | str,
    config: AdapterConfig,
    matches: list[str],
) -> str:
    if matches:
        return (
            f"all {len(matches)} modules that target_modules={wanted!r} matches are excluded by "
            f"exclude_modules={config.exclude_modules!r} or modules_to_save={config.saved_modules!r}"
        )
    text = f"no module of this model matches target_modules={wanted!r}"
    if config.layers_to_transform is not None:
        text += (
            f" with layers_to_transform={config.layers_to_transform!r} and "
            f"layers_pattern={config.layers_pattern!r}"
        )
    entries = [wanted] if isinstance(wanted, str) else list(wanted)
    return "\n".join([text, *(_hint(entry, modules) for entry in entries)])


def _hint(entry: str, modules: Mapping[str, nn.Module]) -> str:
    linears = {
        path.rpartition(".")[2]
        for path, module in modules.items()
        if known_kind(module) is not None
    }
    hint = nearest(entry.rpartition(".")[2], linears)
    return (
        f"  {entry!r} matches nothing{hint or f'; linear modules here: {listing(sorted(linears))}'}"
    )


def _check_every_entry(modules: Mapping[str, nn.Module], wanted: Iterable[str] | str) -> None:
    if isinstance(wanted, str):
        return
    lost = [
        name for name in wanted if not any(p == name or p.endswith(f".{name}") for p in modules)
    ]
    if lost:
        text = f"target_modules {listing(lost)} match nothing in this model"
        raise TargetError("\n".join([text, *(_hint(name, modules) for name in lost)]))


def _known() -> str:
    return ", ".join(kind.name for kind in reversed(KINDS))


def _as_target(
    path: str,
    module: nn.Module,
    tensors: Mapping[int, list[str]],
    modules: Mapping[int, list[str]],
) -> Target:
    kind = known_kind(module)
    if kind is None:
        raise TargetError(
            f"target {path!r} is a {type(module).__name__}; only {_known()} can be adapted. "
            "Give a narrower target_modules, or name it in exclude_modules"
        )
    reason = kind.refusal(module)
    if reason is not None:
        raise TargetError(f"target {path!r} {reason}")
    in_features, out_features = kind.features(module)
    return Target(
        path,
        in_features=in_features,
        out_features=out_features,
        product=kind.product(module),
        weights=tuple(tensors.get(id(getattr(module, "weight", None)), ())),
        aliases=tuple(alias for alias in modules[id(module)] if alias != path),
    )
