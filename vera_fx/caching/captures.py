"""A folder of captures: read where one fits a call, written where none did."""

import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vera_fx._context import Registration, registered
from vera_fx.caching.content import Unreadable
from vera_fx.caching.graph_file import read_graph, write_graph
from vera_fx.caching.key import FORMAT, key_of
from vera_fx.caching.reports import read_report, write_report
from vera_fx.caching.trees import read_tree, write_tree
from vera_fx.capturing.budget import Opening
from vera_fx.capturing.export_call import (
    CONSTANT,
    Capture,
    Exported,
    Guards,
    cleaned,
    export_call,
    live_graph,
)
from vera_fx.capturing.signature import Call, CallReader
from vera_fx.disk.files import aside, flush, put, writing
from vera_fx.disk.safetensors_file import MAX_HEADER, SHA256, digest, open_weights
from vera_fx.disk.sizes_and_names import check_guard, check_name
from vera_fx.errors import CaptureCacheWarning, CheckpointError, ConfigError, first_line

_KIND = "capture cache"
_TEXT = "vera_fx.capture"
_SUFFIX = ".capture.safetensors"
_SIZES = 8
"""Captures of one key: of calls whose sizes no other admits."""


def capture_cache(folder: str | Path) -> Registration:
    """Keep captures in a folder, so that a later process of the same model starts without exporting.

    A capture is found again only by a process with the same model (its code and all globals that it
    names, configuration, modules, dtypes, shapes and devices of its weights), the same versions of
    Python, torch, this library and all libraries below the model, the same settings, environment
    variables of theirs, and a call of the same signature. No weights are kept, and nothing in the
    files is code. What cannot be kept is captured as ever, with a warning that says why.

    Args:
        folder: the folder; made if it is missing. Several processes may use it at once.

    Returns:
        What ends it: by ``remove()``, or at the end of a ``with`` block. Else it lasts as long as the
        process.

    Raises:
        ConfigError: the folder cannot be made.
    """
    path = Path(folder)
    try:
        with writing(path):
            pass
    except OSError as error:
        raise ConfigError(
            f"captures cannot be kept in {str(path)!r}: {error}; name a folder that can be written to"
        ) from error
    return Registration(_KIND, _KIND, CaptureFolder(path.resolve()))


def captured(
    model: nn.Module,
    entry: tuple[Any, CallReader],
    call: Call,
    opening: Opening,
    settings: Any,
) -> Capture:
    """The capture of a call: from the folder that is in use, if it has one that fits.

    Args:
        model: the live model.
        entry: its original, unbound forward, and the reader that took ``call`` apart.
        call: the call.
        opening: which sizes to leave open.
        settings: what of torch's settings a graph may have baked in.

    Raises:
        CaptureError: torch.export cannot trace the call.
    """
    folder: CaptureFolder | None = registered(_KIND).get(_KIND)
    if folder is None:
        return cleaned(model, call, export_call(model, *entry, call, opening))
    try:
        key = key_of(model, entry[0], call, opening, settings)
    except Unreadable as reason:
        _tell(f"captures of this {type(model).__name__} are not kept: it reads {reason}")
        return cleaned(model, call, export_call(model, *entry, call, opening))
    found = folder.find(key, model, call)
    if found is not None:
        return cleaned(model, call, found)
    return folder.add(key, model, call, export_call(model, *entry, call, opening))


@dataclass(frozen=True, slots=True)
class CaptureFolder:
    """The folder of a capture cache."""

    path: Path

    def find(self, key: str, model: nn.Module, call: Call) -> Exported | None:
        """The kept graph that admits the call's sizes; None if there is none."""
        for file in self._files(key):
            try:
                found = _read(file, key, model)
            except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
                _tell(f"{file} is not used: {first_line(error)}; delete it")
                continue
            except OSError:  # somebody has just removed it
                continue
            if found.guards is not None and found.guards.admit(call.leaves):
                return found
        return None

    def add(self, key: str, model: nn.Module, call: Call, exported: Exported) -> Capture:
        """Keep an exported call; its capture.

        Raises:
            OutOfTime, CaptureError: as the passes.
        """
        capture = cleaned(model, call, exported)
        try:
            self._save(key, json.dumps(_written(capture)), _constants(capture))
        except (OSError, Unreadable) as reason:
            _tell(f"a capture of {type(model).__name__} is not kept: {reason}")
        return capture

    def _files(self, key: str) -> list[Path]:
        return sorted(self.path.glob(f"{key}-*{_SUFFIX}"))

    def _save(self, key: str, text: str, constants: Mapping[str, Tensor]) -> None:
        if len(text) > MAX_HEADER // 2:
            raise Unreadable(f"its description has {len(text):,} characters")
        metadata = {"format": FORMAT, "key": key, _TEXT: text}
        metadata[SHA256] = digest(constants, metadata)
        with writing(self.path), aside(self.path) as temporary:
            known = self._files(key)
            for old in known[: len(known) + 1 - _SIZES]:
                old.unlink(missing_ok=True)
            name = f"{key}-{time.time_ns():020d}{_SUFFIX}"
            save_file(dict(constants), temporary / name, metadata)
            flush(temporary / name)
            put(temporary / name, self.path / name)


def _tell(text: str) -> None:
    warnings.warn(text, CaptureCacheWarning, stacklevel=4)


def _written(capture: Capture) -> dict[str, Any]:
    if capture.aliased:
        raise Unreadable(f"it reads {capture.aliased[0]!r} past its module")
    return {
        "graph": write_graph(capture.graph.graph),
        "out_spec": write_tree(capture.out_spec),
        "opening": capture.opening.name,
        "checkpointed": sorted(capture.checkpointed),
        "fixed": capture.guards.fixed,
        "relations": capture.guards.relations,
        "report": write_report(capture.report),
    }


def _constants(capture: Capture) -> dict[str, Tensor]:
    """Copies of the graph's own tensors."""
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in capture.graph.__dict__.items()
        if name.startswith(CONSTANT)
    }


def _read(file: Path, key: str, model: nn.Module) -> Exported:
    """What a file holds, bound to a model.

    Raises:
        CheckpointError, ValueError, KeyError, TypeError, AttributeError: the file is damaged, or not
            one of a capture with that key.
        OSError: it cannot be opened.
    """
    with open_weights(file, str) as opened:
        metadata, tensors = opened.metadata, opened.read()
    if (metadata["format"], metadata["key"]) != (FORMAT, key) or SHA256 not in metadata:
        raise ValueError("it holds a capture of something else")
    text = json.loads(metadata[_TEXT])
    graph = read_graph(text["graph"], frozenset({"vera_fx"}))
    constants = _placed(text["graph"]["nodes"], tensors)
    relations = text["relations"]
    if relations is not None:
        check_guard(relations)
    fixed = tuple((int(i), int(dim), int(size)) for i, dim, size in text["fixed"])
    return Exported(
        graph=live_graph(graph, model, constants),
        out_spec=read_tree(text["out_spec"]),
        opening=Opening[text["opening"]],
        checkpointed=frozenset(text["checkpointed"]),
        guards=Guards(fixed, relations),
        report=read_report(text["report"]),
    )


def _placed(nodes: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The graph's own tensors, on the devices that they were on."""
    devices = {n["target"]: n["val"]["device"] for n in nodes if n["target"] in tensors}
    for name in tensors:
        check_name(name)
        if not name.startswith(CONSTANT):
            raise ValueError(f"{name!r} is no constant of a graph")
    return {name: value.to(torch.device(devices[name])) for name, value in tensors.items()}
