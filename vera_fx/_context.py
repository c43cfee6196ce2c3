"""All state that belongs to no model: of one thread, or of the whole process.

Every piece has an owner and an end. What a thread is doing lasts as long as a ``with`` block; what is
set for the whole process lasts as long as somebody inside a block needs it, or as long as the object
lives that asked for it. `residents` counts what is there now.
"""

import contextlib
import functools
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import nn

from vera_fx._torch import skip_frame
from vera_fx._torch_graphs import at_end_of, dynamic_source

P = ParamSpec("P")
R = TypeVar("R")

# Not ContextVars: hooks ask for them, and Dynamo can trace them only with a thread's own state.
_thread = threading.local()
_lock = threading.RLock()
_capture_lock = threading.RLock()

# --- what a thread is doing ----------------------------------------------------------------------


@skip_frame
def now(name: str, default: Any = None) -> Any:
    """What holds under ``name`` for the calls that this thread makes now."""
    return getattr(_thread, name, default)


@contextlib.contextmanager
def holding(name: str, value: Any) -> Iterator[None]:
    """Inside the block ``value`` holds under ``name`` for this thread; then what did before."""
    before = getattr(_thread, name, None)
    setattr(_thread, name, value)
    try:
        yield
    finally:
        setattr(_thread, name, before)


_captures: list[int] = []


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Inside the block this thread captures a model; hooks of the library stay silent.

    One capture at a time: torch.export is not made for several threads.
    """
    with _capture_lock:
        _captures.append(threading.get_ident())
        try:
            with holding("capturing", value=True):
                yield
        finally:
            _captures.remove(threading.get_ident())


@skip_frame
def is_capturing() -> bool:
    """True while this thread captures."""
    return bool(getattr(_thread, "capturing", False))


@skip_frame
def traced_by_others() -> bool:
    """True while the model is traced by an export that is none of this library's captures.

    torch's flag is one for all threads: without the list, calls in other threads would take a
    capture for somebody else's export.
    """
    return torch.compiler.is_exporting() and not _captures


class Run(Protocol):
    """A call of a model whose forward runs in Python now, in this thread."""

    def call(
        self, part: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a module of the model that may be one of its parts; ``base`` is what it was."""
        ...


@skip_frame
def current_run() -> Run | None:
    """The innermost run of this thread."""
    return getattr(_thread, "run", None)


@skip_frame
def set_run(run: Run | None) -> None:
    """Make ``run`` the innermost run of this thread."""
    _thread.run = run


_of_parts: "weakref.WeakKeyDictionary[nn.Module, dict[str, Callable[..., Any]]]" = (
    weakref.WeakKeyDictionary()
)


def remember(part: nn.Module, **what: Callable[..., Any]) -> None:
    """Keep functions for a module: ``run`` gives a run like the last that it took part in, or None.

    Calls that are in no run go to ``start``, with the module, its class and the arguments.
    """
    _of_parts[part] = {**_of_parts.get(part, {}), **what}


@skip_frame
def remembered(part: nn.Module, what: str) -> Callable[..., Any] | None:
    """What `remember` was given for ``part``; None if it was given nothing."""
    return _of_parts.get(part, {}).get(what)


def modules_inside() -> list[str]:
    """Paths of the adapted modules whose own forward runs now in this thread, outermost first."""
    if not hasattr(_thread, "inside"):
        _thread.inside = []
    return _thread.inside


def enter(path: str) -> None:
    """An adapted module's own forward begins."""
    modules_inside().append(path)


def leave(path: str) -> None:
    """An adapted module's own forward has ended; those it called and that failed end with it."""
    inside = modules_inside()
    if path in inside:
        del inside[inside.index(path) :]


# --- what is set for the whole process -----------------------------------------------------------

Attributes = Mapping[tuple[Any, str], Any]
_patches: dict[str, tuple[list[int], Attributes]] = {}


@contextlib.contextmanager
def patched(name: str, replacements: Callable[[], Attributes]) -> Iterator[None]:
    """Inside the block attributes of foreign classes and modules are replaced, in all threads.

    They are put back when the last block of that name ends.

    Args:
        name: of the patch.
        replacements: makes what to put there, by owner and attribute.
    """
    with _lock:
        users, _ = _patches.setdefault(name, ([], {}))
        users.append(threading.get_ident())
        if len(users) == 1:
            _patches[name] = users, _replaced(replacements())
    try:
        yield
    finally:
        with _lock:
            users, originals = _patches[name]
            users.remove(threading.get_ident())
            if not users:
                _replaced(originals)
                del _patches[name]


def original(name: str, owner: Any, attribute: str) -> Any:
    """What a patch in place has put aside."""
    return _patches[name][1][owner, attribute]


def _replaced(attributes: Attributes) -> Attributes:
    """Set attributes of classes and modules; the result is what they were."""
    before = {(owner, name): vars(owner)[name] for owner, name in attributes}
    for (owner, name), value in attributes.items():
        setattr(owner, name, value)
    return before


_open: Counter[str] = Counter()
_openers: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()


def open_dimensions(owner: object, sources: Iterable[tuple[str, int]]) -> None:
    """Let compiled code take any size along dimensions of the tensors that it reads.

    Else every new size of a parameter, which Dynamo takes for fixed, would be compiled anew. This
    is ``torch.compiler.config.dynamic_sources``, the documented way to say so.

    Args:
        owner: for as long as it lives.
        sources: regular expressions for Dynamo's names of the places, without commas and spaces, and
            the dimension in each.
    """
    with _lock:
        known = _openers.setdefault(owner, set())
        entries = tuple(e for s, dim in sources if (e := dynamic_source(s, dim)) not in known)
        known.update(entries)
        _count_open(entries, 1)
    if entries:
        at_end_of(owner, _close_dimensions, entries)


def _close_dimensions(entries: tuple[str, ...]) -> None:
    with _lock:
        _count_open(entries, -1)


def _count_open(entries: tuple[str, ...], step: int) -> None:
    config = cast("Any", torch.compiler.config)
    foreign = [e for e in config.dynamic_sources.split(",") if e and e not in _open]
    for entry in entries:
        _open[entry] += step
        if not _open[entry]:
            del _open[entry]
    config.dynamic_sources = ",".join([*foreign, *_open])


_classes: dict[str, MutableMapping[type, type]] = {}


def class_made_of(base: type, purpose: str, make: Callable[[type], type]) -> type:
    """The class that ``make`` makes of ``base``: one for all who use it, for as long as they do."""
    with _lock:
        known = _classes.setdefault(purpose, weakref.WeakKeyDictionary())
        reference = known.get(base)
        found = None if reference is None else reference()
        if found is None:
            found = make(base)
            known[base] = cast("Any", weakref.ref(found))
        return found


_caches: list[Any] = []


def cached(limit: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep a function's last ``limit`` results for the process; arguments hold nothing of a model."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        kept = functools.lru_cache(maxsize=limit)(function)
        _caches.append(kept)
        return cast("Callable[P, R]", kept)

    return decorate


_registered: dict[str, dict[Any, Any]] = {}


class Registration:
    """Something registered for the process, until `remove` or the end of a ``with``."""

    def __init__(self, kind: str, key: Any, value: Any) -> None:
        known = _registered.setdefault(kind, {})
        self._place, self._before = (known, key), known.get(key)
        known[key] = value

    def remove(self) -> None:
        """Take it back; what was registered before it holds again."""
        known, key = self._place
        known.pop(key, None)
        known |= {} if self._before is None else {key: self._before}

    def __enter__(self) -> "Registration":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@skip_frame
def registered(kind: str) -> Mapping[Any, Any]:
    """What is registered of that kind now."""
    return _registered.get(kind, {})


next_number = itertools.count().__next__
"""Numbers the folders that graphs are dumped to."""


def residents() -> dict[str, int]:
    """How much of each kind is there now: nothing, when no model is adapted and no call runs."""
    return {
        "captures": len(_captures),
        "patches": len(_patches),
        "open dimensions": len(_open),
        "registrations": sum(len(d) for k, d in _registered.items() if k != "measured devices"),
        "classes": sum(r() is not None for d in _classes.values() for r in cast("Any", d).values()),
    }
