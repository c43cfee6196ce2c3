"""What a kept capture depends on, as one hash: versions, code, configuration, weights' looks, the call."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vera_fx._context import cached
from vera_fx.base.modules import in_bank, original_class
from vera_fx.caching.content import Contents, Unreadable
from vera_fx.capturing.budget import Opening
from vera_fx.capturing.reads import Reader, Reads, reads_of
from vera_fx.capturing.signature import Call
from vera_fx.products.opaque import is_opaque

FORMAT = "vera_fx capture 1"
_VARIABLES = ("TORCH", "PYTORCH", "TRANSFORMERS", "HF_", "VERA_FX")
_PROGRESS = {"VERA_FX_PROGRESS"}


def key_of(
    model: nn.Module,
    forward: Any,
    call: Call,
    opening: Opening,
    settings: Any,
    values: dict[tuple[str, str], Any] | None = None,
    whole: nn.Module | None = None,
) -> str:
    """The key under which a capture of a call is kept.

    Args:
        model: the live model.
        forward: what is captured of it.
        call: the call; sizes above 1 do not count, as with signatures.
        opening: which sizes to leave open.
        settings: what of torch's settings a graph may have baked in.
        values: where to put attributes of modules that are plain values, by path and name, in the place
            of counting them; None to count all.
        whole: the model that ``model`` is a part of.

    Raises:
        Unreadable: some of what the model's code reads cannot be hashed.
    """
    modules = {path: m for path, m in model.named_modules() if not in_bank(path)}
    reads = _reads(modules.values(), whole)
    contents = Contents(
        {id(module): path for path, module in modules.items()},
        read=frozenset(id(reader.where) for reader in reads.readers),
    )
    parts = [
        contents.of(forward),
        repr(opening),
        *_of_call(call, settings),
        *_of_model(modules, contents),
        *_of_reads(reads, modules, contents, values),
    ]
    return _hash((FORMAT, _process(), *_versions(contents.libraries), *parts))


def _hash(parts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    return found.hexdigest()


def _reads(modules: Iterable[nn.Module], whole: nn.Module | None) -> Reads:
    found = reads_of(modules)
    if whole is not None and found.reach(whole.modules()):
        raise Unreadable("a module of the model that is not inside of this part")
    return found


def _of_call(call: Call, settings: Any) -> Iterable[str]:
    contents = Contents()
    yield from map(contents.of, (*call.structure(), settings))
    # What torch.export sees of an argument that is no tensor: its class and its state.
    yield from (f"{name}: {contents.of(type(value))}" for name, value in call.arguments.items())
    yield from _versions(contents.libraries)


def _of_model(modules: dict[str, nn.Module], contents: Contents) -> Iterable[str]:
    """Classes and the looks of all tensors; which of them are one, too."""
    seen: dict[int, str] = {}
    for path, module in modules.items():
        yield f"{path}: {contents.of(original_class(module))} {contents.of(type(module).__mro__[-2])}"
        held = [] if is_opaque(module) else [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in held:
            if tensor is None:
                yield f"{path}.{name}: None"
                continue
            first = seen.setdefault(id(tensor), f"{path}.{name}")
            look = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
            kind = type(tensor).__qualname__
            yield f"{path}.{name}: {first} {look} {kind} {tensor.requires_grad}"


def _of_reads(
    reads: Reads,
    modules: dict[str, nn.Module],
    contents: Contents,
    values: dict[tuple[str, str], Any] | None,
) -> Iterable[str]:
    """All that the model's Python may read; objects without a name of their own in no order."""
    plain = {} if values is None else {id(m.__dict__): path for path, m in modules.items()}
    titles = {id(module.__dict__): f"attributes of {path!r}" for path, module in modules.items()}
    titles |= {id(m._modules): f"modules of {path!r}" for path, m in modules.items()}
    held = {id(d) for m in modules.values() for d in (m._parameters, m._buffers)}
    yield from sorted(
        _of_reader(_without(reader, plain, values), titles, contents)
        for reader in reads.readers
        if id(reader.where) not in held
    )
    yield from sorted(map(contents.of, [*reads.lists, *reads.cells]))
    yield from sorted(contents.of(value) for value, _ in reads.slotted)


def _without(
    reader: Reader, plain: dict[int, str], values: dict[tuple[str, str], Any] | None
) -> Reader:
    """A reader of a module's attributes without those that are plain values, which go to ``values``."""
    path = plain.get(id(reader.where))
    if path is None or values is None:
        return reader
    known = reader.where.keys() - reader.ignored
    found = {name: reader.where[name] for name in known if _is_plain(reader.where[name])}
    values.update({(path, name): value for name, value in found.items()})
    return Reader(reader.where, reader.names, reader.ignored | found.keys())


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in {bool, int, float, str}


def _of_reader(reader: Reader, titles: dict[int, str], contents: Contents) -> str:
    where = reader.where
    title = titles.get(id(where)) or str(where.get("__module__") or where.get("__name__") or "")
    read = where.keys() if reader.names is None else reader.names
    names = [name for name in read if name not in reader.ignored]
    return json.dumps([title, contents.items(where, names)])


def _process() -> str:
    """What is the same for all captures of this process."""
    variables = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith(_VARIABLES) and name not in _PROGRESS
    )
    return json.dumps([sys.version, platform.machine(), torch.__version__, _own(), variables])


@cached(1)
def _own() -> str:
    """The hash of this library's own code: a version number says little while one works on it."""
    found = hashlib.sha256()
    for folder in _folders():
        for path in sorted(folder.rglob("*.py")):
            found.update(path.name.encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def _folders() -> list[Path]:
    import vera_fx.passes

    return [Path(__file__).parents[1], Path(next(iter(vera_fx.passes.__path__)))]


def _versions(libraries: Iterable[str]) -> Iterable[str]:
    for name in sorted(libraries):
        yield f"{name} {_version(name)}"


@cached(256)
def _version(package: str) -> str:
    module = sys.modules.get(package)
    known = getattr(module, "__version__", None)
    if known is None:
        try:
            known = metadata.version(package)
        except metadata.PackageNotFoundError:
            known = ""
    return str(known)
