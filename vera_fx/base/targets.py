"""Chooses the targets: which linear modules a configuration adapts, by PEFT's rules."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from vera_fx.base.default_targets import DEFAULT_TARGETS
from vera_fx.base.hf import is_pretrained
from vera_fx.base.modules import base_modules, module_paths, tensor_paths
from vera_fx.base.sharding import check_gathered
from vera_fx.config import AdapterConfig
from vera_fx.errors import TargetError, listing, nearest, shown
from vera_fx.expressions import FileText, Match, compiled, full_match
from vera_fx.passes import Target
from vera_fx.products.kinds import KINDS, cut_of, known_kind

_HINTS = 8
"""Entries that a message explains."""


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
        match = _matcher(wanted, config)
        matches = [path for path in modules if match(path)]
    is_excluded = _exclusion(config)
    kept = [path for path in matches if not is_excluded(path)]
    if not kept:
        raise TargetError(_explain_nothing(modules, wanted, config, matches))
    if strict:
        _check_every_entry(modules, wanted)
    check_gathered(model)
    tensors, twins = tensor_paths(model), module_paths(model)
    return {path: _as_target(path, modules[path], tensors, twins) for path in kept}


def targets_now(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The targets as the model has them now: replaced, tied or parametrised since they were chosen.

    Raises:
        TargetError: a target is gone, or no linear module of its size any more.
    """
    check_gathered(model)
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
    linears = [path for path, m in base_modules(model).items() if known_kind(m) is not None]
    names, repeated = {path.rpartition(".")[2] for path in linears}, _repeated(linears)
    blocks = f"those that repeat from block to block: {listing(repeated)}; or from all of "
    raise TargetError(
        f"target_modules was not given, and there is no default for model type {model_type!r}; give "
        f"target_modules, for example from {blocks if repeated else ''}this model's linear modules: "
        f"{listing(sorted(names))}"
    )


def _repeated(paths: Iterable[str]) -> list[str]:
    """The last words of paths that stand in several numbered blocks, in the model's order."""
    counts: dict[str, int] = {}
    for path in paths:
        *parents, name = path.split(".")
        if any(segment.isdecimal() for segment in parents):
            counts[name] = counts.get(name, 0) + 1
    return [name for name, count in counts.items() if count > 1]


def _matcher(wanted: Iterable[str] | str, config: AdapterConfig) -> Match:
    """Whether a path is that of a target."""
    if isinstance(wanted, str):
        return full_match(wanted)
    names, is_wanted_layer = frozenset(wanted), _layer_matcher(config)
    # A full name also overrides layers_to_transform, as in PEFT.
    return lambda path: (
        path in names or (not names.isdisjoint(_ends(path)) and is_wanted_layer(path))
    )


def _ends(path: str) -> Iterator[str]:
    """``"b.c"`` and ``"c"`` for ``"a.b.c"``: as many as the path has dots, however many names there are."""
    dot = path.find(".")
    while dot >= 0:
        yield path[dot + 1 :]
        dot = path.find(".", dot + 1)


def _layer_matcher(config: AdapterConfig) -> Match:
    layers = config.layers_to_transform
    if layers is None or layers == ():
        return lambda _: True
    wanted = frozenset((layers,) if isinstance(layers, int) else layers)
    index_of = _layer_index(config)
    return lambda path: index_of(path) in wanted


def _layer_index(config: AdapterConfig) -> Callable[[str], int | None]:
    """The first numbered segment of a path, or the one below ``layers_pattern``."""
    patterns = config.layers_pattern or ()
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    finders = [_index_below(pattern) for pattern in patterns] or [_index_below(r"[^.]*", r".*?\.")]

    def index_of(path: str) -> int | None:
        found = (index for find in finders if (index := find(path)) is not None)
        return next(found, None)

    return index_of


def _index_below(pattern: str, before: str = r"(?:^|.*?\.)") -> Callable[[str], int | None]:
    if not isinstance(pattern, FileText):
        expression = compiled(rf"{before}{pattern}\.(\d+)\.")
        return lambda path: int(match[1]) if (match := expression.match(path)) else None
    is_above = full_match(FileText(f"{before}{pattern}"))

    def find(path: str) -> int | None:
        segments = path.split(".")
        numbered = (n for n, s in enumerate(segments[:-1]) if n and s.isdecimal())
        found = (int(segments[n]) for n in numbered if is_above(".".join(segments[:n])))
        return next(found, None)

    return find


def _all_linear(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Every linear module of the wanted layers but the head that transformers' models end in."""
    head = _head(model, config) if is_pretrained(model) else None
    is_wanted_layer = _layer_matcher(config)
    return [
        path
        for path, module in base_modules(model).items()
        if known_kind(module) is not None and module is not head and is_wanted_layer(path)
    ]


def _head(model: Any, config: AdapterConfig) -> nn.Module | None:
    head = model.get_output_embeddings()
    if head is None and config.task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in ("score", "classifier"))
        head = next((module for module in heads if module is not None), None)
    return head


def _exclusion(config: AdapterConfig) -> Match:
    """Whether a path is left out: by ``exclude_modules``, or as part of a module trained in full."""
    exclude = config.exclude_modules or ()
    if isinstance(exclude, str):
        is_named = full_match(exclude)
    else:
        names = frozenset(exclude)
        is_named = lambda path: path in names or not names.isdisjoint(_ends(path))  # noqa: E731
    saved = [f".{name}." for name in config.saved_modules]
    return lambda path: is_named(path) or any(name in f".{path}." for name in saved)


def _explain_nothing(
    modules: Mapping[str, nn.Module],
    wanted: Iterable[str] | str,
    config: AdapterConfig,
    matches: list[str],
) -> str:
    if matches:
        return (
            f"all {len(matches)} modules that target_modules={shown(wanted)} matches are excluded by "
            f"exclude_modules={shown(config.exclude_modules)} or "
            f"modules_to_save={shown(config.saved_modules)}"
        )
    text = f"no module of this model matches target_modules={shown(wanted)}"
    if config.layers_to_transform is not None:
        text += (
            f" with layers_to_transform={shown(config.layers_to_transform)} and "
            f"layers_pattern={shown(config.layers_pattern)}"
        )
    entries = [wanted] if isinstance(wanted, str) else list(wanted)
    return "\n".join([text, *(_hint(entry, modules) for entry in entries[:_HINTS])])


def _hint(entry: str, modules: Mapping[str, nn.Module]) -> str:
    linears = {
        path.rpartition(".")[2]
        for path, module in modules.items()
        if known_kind(module) is not None
    }
    hint = nearest(entry.rpartition(".")[2], linears)
    return f"  {shown(entry)} matches nothing{hint or f'; linear modules here: {listing(sorted(linears))}'}"


def _check_every_entry(modules: Mapping[str, nn.Module], wanted: Iterable[str] | str) -> None:
    if isinstance(wanted, str):
        return
    known = {end for path in modules for end in (path, *_ends(path))}
    lost = [name for name in wanted if name not in known]
    if lost:
        text = f"target_modules {listing(lost)} match nothing in this model"
        raise TargetError("\n".join([text, *(_hint(name, modules) for name in lost[:_HINTS])]))


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
    product = kind.product(module)
    weight = getattr(module, "weight", None) if product.layout else None
    return Target(
        path,
        in_features=in_features,
        out_features=out_features,
        product=product,
        weights=tuple(tensors.get(id(weight), ())),
        aliases=tuple(alias for alias in modules[id(module)] if alias != path),
        cut=cut_of(module),
    )
