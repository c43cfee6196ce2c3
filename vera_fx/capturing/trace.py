"""Runs torch.export over one call of a model, in surroundings that leave no traces."""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from vera_fx._context import capturing, holding, now, patched
from vera_fx._torch import is_wrapper
from vera_fx._torch_graphs import SOURCES, ending_sources
from vera_fx._torch_sizes import ENVIRONMENTS, forget_sizes, noting_environments
from vera_fx.base.hf import checkpointing_recorded, export_patches
from vera_fx.base.modules import in_bank
from vera_fx.base.side_effects import Counts, SideEffects, set_numbers
from vera_fx.capturing.budget import Clock, Opening
from vera_fx.capturing.open_integers import sizes_as_integers
from vera_fx.capturing.returned_objects import Stateful, mark_returned
from vera_fx.capturing.shell import shell_of
from vera_fx.capturing.signature import Call, CallReader, map_tensors
from vera_fx.capturing.stand_ins import Answers, asking
from vera_fx.errors import CaptureError, TargetError
from vera_fx.products.opaque import is_opaque

_NONE: Counts = {}
_ENDING = "what ends with a capture"


def trace(
    model: nn.Module,
    entry: tuple[Any, CallReader],
    call: Call,
    stateful: Stateful,
    opening: Opening,
) -> tuple[ExportedProgram, frozenset[str]]:
    """Export one call of a model.

    Args:
        model: the live model.
        entry: the original, unbound forward of its class, and the reader that took ``call`` apart.
        call: the call; its tensors are copied.
        stateful: the arguments that are objects with a state of their own.
        opening: which sizes to leave open.

    Returns:
        The program; and the paths of layers under gradient checkpointing.

    Raises:
        Exception: whatever torch.export or the model's forward raises.
        OutOfTime: leaving these sizes open takes too long.
    """
    effects, what = SideEffects(model), f"{type(model).__name__}({', '.join(call.arguments)})"
    clock = Clock(what, opening)
    copies = {name: map_tensors(value, _copy) for name, value in call.inputs.items()}
    names = {f"input_{i}": n for i, n in enumerate(copies) if _has_tensor(copies[n])}
    inputs = {key: copies[name] for key, name in names.items()}

    def run(shell: nn.Module, **given: Any) -> Any:
        arguments = {**copies, **{names[key]: value for key, value in given.items()}}
        with clock, effects.noted(shell):
            result = _run(shell, *entry, arguments)
        return mark_returned(result, stateful.pick(arguments))

    with clock.running(), asking(answers := Answers()), effects.put_back():
        found = _settled(model, run, inputs, opening, effects)
    if torch.is_grad_enabled():
        answers.tell()
    return found


def _settled(
    model: nn.Module, run: Any, inputs: dict[str, Any], opening: Opening, effects: SideEffects
) -> tuple[ExportedProgram, frozenset[str]]:
    """The program of a forward whose result is all that it does, or does again with every call.

    What is made once and kept leaves nothing to do for a second trace; neither does a generator that
    the forward seeds itself.

    Raises:
        CaptureError: it draws random numbers that are not torch's, or counts its calls.
    """
    found = _found(model, run, inputs, opening)
    if not (effects.drawn or effects.counted):
        return found
    before, effects.drawn, effects.counted, effects.sure = effects.counted, False, {}, True
    found = _found(model, run, inputs, opening, before)
    if effects.drawn:
        raise CaptureError(
            "its forward draws random numbers of Python's or NumPy's generators, which a graph would draw "
            "once for all calls; draw them with torch"
        )
    if again := sorted({".".join(filter(None, key)) for key in effects.counted.keys() & before}):
        raise CaptureError(
            f"its forward changes the number in {again[0]} with every call, which a graph would not do; "
            "count outside of the forward, or in a buffer"
        )
    return found


def _found(
    model: nn.Module, run: Any, inputs: dict[str, Any], opening: Opening, numbers: Counts = _NONE
) -> tuple[ExportedProgram, frozenset[str]]:
    shell = shell_of(model, run, list(inputs))
    set_numbers(shell, numbers)
    found = _traced(shell, inputs, opening)
    past = list(aliased(found[0], model))
    _check_opaque(model, past)
    if not past:
        return found
    # Some code holds on to the live modules, past the ones that it was given: let it have them.
    return _traced(shell_of(model, run, list(inputs), live=True), inputs, opening)


def _check_opaque(model: nn.Module, paths: Sequence[str]) -> None:
    """Refuse code that computes with a quantised tensor itself: what is in it only its module knows."""
    for path in paths:
        owner = path.rpartition(".")[0]
        if is_opaque(module := model.get_submodule(owner)):
            raise TargetError(
                f"{path!r} is read by code other than {owner!r}, a {type(module).__name__}, which alone "
                "knows what is stored in it; keep that layer from being quantised"
            )


def _run(shell: nn.Module, forward: Any, reader: CallReader, arguments: dict[str, Any]) -> Any:
    for value in arguments.values():
        sizes_as_integers(value)
    args, kwargs = reader.split(arguments)
    try:
        return forward(shell, *args, **kwargs)
    except Exception as error:
        raise _Stopped from error


def _traced(
    shell: nn.Module, inputs: dict[str, Any], opening: Opening
) -> tuple[ExportedProgram, frozenset[str]]:
    shapes = cast("Any", _dynamic_shapes(inputs, opening))
    try:
        with _tracing(shell), checkpointing_recorded(shell) as checkpointed:
            exported = torch.export.export(shell, (), inputs, strict=False, dynamic_shapes=shapes)
    except _Stopped as error:
        raise error.__cause__ or error from None
    return exported, frozenset(checkpointed)


def aliased(exported: ExportedProgram, model: nn.Module) -> Iterator[str]:
    """Paths of the model's own tensors that the program holds as constants, past their modules."""
    held = {tensor.data_ptr(): path for path, tensor in _tensors(model) if tensor.numel()}
    held.pop(0, None)  # sharded, or freed until it is gathered
    for name in exported.graph_signature.lifted_tensor_constants:
        path = held.get(cast("Tensor", exported.constants[name]).data_ptr())
        if path is not None:
            yield path


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        if in_bank(prefix):
            continue
        own = (
            module.named_buffers(prefix, recurse=False),
            module.named_parameters(prefix, recurse=False),
        )
        yield from (
            (path, t) for named in own for path, t in named if not (t.is_meta or is_wrapper(t))
        )


class _Stopped(Exception):  # noqa: N818
    """The model's forward raised; torch would print half a graph for some errors of its own."""


@torch.inference_mode(mode=False)  # whose tensors nothing outside of it may write to
def _copy(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def _has_tensor(value: Any) -> bool:
    found: list[Tensor] = []
    map_tensors(value, lambda x: found.append(x) or x)
    return bool(found)


def _dynamic_shapes(inputs: dict[str, Any], opening: Opening) -> ShapesCollection | None:
    shapes = ShapesCollection()
    some = False

    def mark(value: Tensor) -> Tensor:
        nonlocal some
        dims = dict.fromkeys(opening.opens(value), Dim.AUTO)
        if dims:
            shapes[value] = dims
            some = True
        return value

    for value in inputs.values():
        map_tensors(value, mark)
    return shapes if some else None


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """What torch keeps for good of the graphs that this thread makes in the block ends with them."""
    environments: list[Any] = []
    try:
        with patched(_ENDING, _ending), holding(_ENDING, environments):
            yield
    finally:
        forget_sizes(environments)


def _ending() -> dict[tuple[Any, str], Any]:
    noted = functools.partial(now, _ENDING)
    run, init = (getattr(*place) for place in (SOURCES, ENVIRONMENTS))
    return {
        SOURCES: ending_sources(run, lambda: noted() is not None),
        ENVIRONMENTS: noting_environments(init, noted),
    }


@contextlib.contextmanager
def _tracing(shell: nn.Module) -> Iterator[None]:
    """The surroundings of an export: gradients on, no fast paths, no traces left behind."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fused fast path of nn.TransformerEncoderLayer hides its linear calls.
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            capturing(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
            export_patches(shell),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
