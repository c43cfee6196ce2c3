"""The few private corners of torch (2.11 to 2.15) that the library needs, each behind one name."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType  # noqa: TC003
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch._dynamo
import torch._inductor.config
from torch import nn
from torch._C._dynamo.guards import RootGuardManager, TensorGuards, dict_version
from torch._dynamo.eval_frame import set_eval_frame, skip_code
from torch._dynamo.exc import TorchDynamoException, Unsupported
from torch._dynamo.guards import GuardManagerType
from torch.export.pt2_archive._package import load_pt2
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _pop_mode_temporarily,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

P = ParamSpec("P")
R = TypeVar("R")

TreeSpec = pytree.TreeSpec
tree_flatten = pytree.tree_flatten
tree_unflatten = pytree.tree_unflatten
tree_map = pytree.tree_map
tree_flatten_with_path = pytree.tree_flatten_with_path
register_pytree_node = pytree.register_pytree_node
MappingKey = pytree.MappingKey
SUPPORTED_NODES = pytree.SUPPORTED_NODES

SIZE_QUESTIONS = ((ShapeEnv, "evaluate_expr"), (ShapeEnv, "simplify"))
"""Methods by which a trace asks about open sizes; slow traces spend their time below them."""


is_wrapper = is_traceable_wrapper_subclass
outside_modes = _disable_current_modes
"""Inside the block operators run on real tensors, also while torch.export traces around it."""


def behind_dynamo(error: Exception) -> Exception:
    """The error of a compiled graph's call: under fullgraph Dynamo's own hides it.

    GraphModule prints where it failed by a generator, which Dynamo tries to compile, and cannot.
    """
    first = error.__context__
    hides = isinstance(error, Unsupported) and "trace generator" in str(error)
    inner = isinstance(first, TorchDynamoException)
    return first if hides and isinstance(first, Exception) and not inner else error


def outside_dynamo(fn: Callable[P, R]) -> Callable[P, R]:
    """Run ``fn`` and all it calls in plain Python, also while torch.compile is active."""
    return cast("Callable[P, R]", torch.compiler.disable(fn, reason="vera_fx picks the graph"))


def skip_frame(fn: Callable[P, R]) -> Callable[P, R]:
    """Let torch.compile pass over the frame of ``fn`` itself, but compile what it calls.

    Whatever of ours runs between a compiled model's call and its graph needs this: a frame that is
    compiled, be it without any operator, is compiled again for every model, and eight times at most.

    ``torch.compiler.disable(recursive=False)`` means the same, but the stance
    ``fail_on_recompile`` takes its frame for a recompile (torch 2.13).
    """
    skip_code(cast("FunctionType", fn).__code__)
    return fn


def break_trace() -> None:
    """Where torch.compile traces a caller, end its graph here; nothing where none traces.

    It would follow the call into a frame that it passes over when it comes upon it by itself.
    """
    torch._dynamo.graph_break()


@skip_frame
def stop_compiling() -> Any:
    """Let Python run what this thread calls from now on; gives what compiled it until now."""
    return set_eval_frame(None)


@skip_frame
def start_compiling(compiler: Any) -> None:
    """Let ``compiler``, from `stop_compiling`, compile what this thread calls from now on."""
    set_eval_frame(compiler)


@contextlib.contextmanager
def compiled_by(compiler: Any) -> Iterator[None]:
    """Inside the block ``compiler`` compiles what this thread calls."""
    before = set_eval_frame(compiler)
    try:
        yield
    finally:
        set_eval_frame(before)


def stamp(dicts: Iterable[dict[Any, Any]]) -> int:
    """A number that grows whenever any of ``dicts`` changes (a key set to another value).

    Dynamo's own dictionary versions, which are globally unique and only ever increase.
    """
    return sum(map(dict_version, dicts))


class DictMarks:
    """Notices that some dictionary has changed since this was made, in one call.

    By Dynamo's guards in C++, which take half the time of a walk in Python; where a torch has them
    under another signature, by that walk.
    """

    def __init__(self, dicts: Iterable[dict[Any, Any]]) -> None:
        self._dicts = dict(enumerate(dicts))
        self._stamp = stamp(self._dicts.values())
        self._root = self._guards()

    def hold(self) -> bool:
        """True while all are what they were."""
        if self._root is not None:
            return cast("bool", self._root.check(self._dicts))
        return stamp(self._dicts.values()) == self._stamp

    def _guards(self) -> Any:
        plain, root = GuardManagerType.GUARD_MANAGER, RootGuardManager()
        try:
            for key, held in self._dicts.items():
                manager = root.getitem_manager(key, f"L[{key}]", held, plain)
                manager.add_dict_version_guard(held, ["changed"], None)
        except (AttributeError, TypeError):
            return None
        return root


class TensorMarks:
    """Notices that some tensor has another dtype, device, layout or size than it had, in one call.

    Dynamo's own guard on tensors, in C++: a walk in Python takes ten times as long.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tuple(tensors)
        fixed = {"dynamic_dims_sizes": self._sizes(), "dynamic_dims_strides": self._strides()}
        self._guard = TensorGuards(*self._tensors, **fixed) if self._tensors else None

    def hold(self) -> bool:
        """True while all are what they were."""
        return self._guard is None or bool(self._guard.check(*self._tensors))

    def _sizes(self) -> list[list[int]]:
        return [list(tensor.shape) for tensor in self._tensors]

    def _strides(self) -> list[list[None]]:
        return [[None] * tensor.ndim for tensor in self._tensors]


def is_transformed(value: torch.Tensor) -> bool:
    """True for a tensor inside of a transform of ``torch.func``, as ``vmap``, also in traced graphs."""
    return bool(cast("Any", torch._C)._functorch.is_functorch_wrapped_tensor(value))


def operator_arguments(namespace: str, name: str, overload: str) -> dict[str, str] | None:
    """Names and types of an operator's arguments; None if there is no such operator."""
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        return None
    return {argument.name: str(argument.type) for argument in found._schema.arguments}


def load_archive(file: Any) -> tuple[Any, dict[str, str]]:
    """The program called ``model`` in an open ``.pt2`` file, and its extra files.

    ``torch.export.load`` reads files of older formats if this fails, by another way than was checked.
    """
    found = load_pt2(file)
    return found.exported_programs["model"], found.extra_files


def normal_tensors() -> contextlib.AbstractContextManager[None]:
    """Inside the block tensors are made that may train, also within ``torch.inference_mode()``.

    What is made in inference mode never can, and nothing says so until a backward.
    """
    return cast("contextlib.AbstractContextManager[None]", torch.inference_mode(mode=False))


def generators_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Afterwards the random generators of the CPU and of ``device`` stand where they stood."""
    if device.type in {"cpu", "meta"} or not hasattr(
        torch.get_device_module(device), "default_generators"
    ):
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[cast("Any", device)], device_type=device.type)


NO_BACKWARD = -1


@skip_frame
def backward_now() -> int:
    """A number for the backward that autograd runs in this thread; `NO_BACKWARD` for none."""
    return torch._C._current_graph_task_id()


@skip_frame
def in_backward() -> bool:
    """True while autograd runs a backward in this thread."""
    return torch._C._current_graph_task_id() != NO_BACKWARD


@skip_frame
def in_transform() -> bool:
    """True inside of ``torch.func.grad``, ``vmap``, ``jvp`` and the like."""
    return cast("Any", torch._C)._functorch.peek_interpreter_stack() is not None


def any_autocast() -> bool:
    """True if autocast is on for any type of device."""
    return bool(torch._C._is_any_autocast_enabled())


def default_device() -> torch.device | None:
    """The device that new tensors are made on; None for the CPU, as where nothing was set."""
    if torch._C._len_torch_function_stack() == 0:  # asking costs a walk over the modes
        return None
    found = torch.get_default_device()
    return None if found.type == "cpu" else found


def any_global_hook() -> bool:
    """True if some hook was registered for the calls of all modules."""
    return bool(_has_any_global_hook())


@functools.cache
def device_types() -> tuple[str, ...]:
    """Every type of device that this build of torch knows autocast for."""
    known = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "ipu", "xla", "maia", "privateuseone")
    return tuple(kind for kind in known if _has_autocast(kind))


def _has_autocast(kind: str) -> bool:
    try:
        torch.is_autocast_enabled(kind)
    except (RuntimeError, ValueError):
        return False
    return True


@skip_frame
def active_ddp() -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` whose forward runs now."""
    return cast("Any", DistributedDataParallel)._get_active_ddp_module()


def reduced_by(ddp: DistributedDataParallel) -> frozenset[int]:
    """Identities of the parameters whose gradients it reduces: those that trained when it was made."""
    buckets = ddp.reducer._get_zeros_like_grad_buckets()
    delayed: Any = ddp.__dict__.get("_delay_all_reduce_params", [])
    return frozenset(map(id, [*delayed, *(p for b in buckets for p in b.parameters())]))


def sharded_by(model: nn.Module) -> tuple[Any, frozenset[int]]:
    """The mesh that ``fully_shard`` cuts parameters over, and identities of those that it gathers."""
    modules: Any = (m for m in model.modules() if hasattr(m, "_get_fsdp_state"))
    groups = [g for m in modules for g in m._get_fsdp_state()._fsdp_param_groups]
    params = [p for group in groups for p in group.fsdp_params]
    known = [t for p in params for t in (p.sharded_param, getattr(p, "_unsharded_param", None))]
    return next((g.mesh_info.mesh for g in groups), None), frozenset(map(id, known))


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` at the end of the backward that runs now in this thread."""
    cast("Any", torch.autograd.Variable)._execution_engine.queue_callback(function)


@contextlib.contextmanager
def without_mode(kind: type[TorchFunctionMode]) -> Iterator[None]:
    """Inside the block a mode of that class, if it is this thread's innermost, sees no function."""
    if not isinstance(_get_current_function_mode(), kind):
        yield
        return
    with _pop_mode_temporarily():
        yield
