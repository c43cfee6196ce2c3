"""Programs that would run code of their own, made from one of ours: what an attacker sends."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Members = dict[str, bytes]
MODEL, INPUTS = "archive/models/model.json", "archive/data/sample_inputs/model.pt"
WEIGHTS = "archive/data/weights/model_weights_config.json"
CONSTANTS = "archive/data/constants/model_constants_config.json"
MANIFEST = "archive/extra/vera_fx.json"


def members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, contents: Members, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


def pickled(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Evil(marker), buffer)
    return buffer.getvalue()


def edit(contents: Members, name: str, change: Callable[[Any], None]) -> None:
    values = json.loads(contents[name])
    change(values)
    contents[name] = json.dumps(values).encode()


def graph(values: Any) -> Any:
    return values["graph_module"]["graph"]


def inputs(contents: Members, marker: Path) -> None:
    contents[INPUTS] = pickled(marker)


def weight(contents: Members, marker: Path) -> None:
    contents["archive/data/weights/weight_0"] = pickled(marker)
    edit(contents, WEIGHTS, lambda v: next(iter(v["config"].values())).update(use_pickle=True))


def constant(contents: Members, marker: Path) -> None:
    contents["archive/data/constants/opaque_obj_0"] = pickle.dumps(Evil(marker))
    entry = {
        "path_name": "opaque_obj_0",
        "is_param": False,
        "use_pickle": True,
        "tensor_meta": None,
    }
    edit(contents, CONSTANTS, lambda v: v["config"].update(evil=entry))


def old_weights(contents: Members, marker: Path) -> None:
    contents["archive/data/weights/model.pt"] = pickled(marker)


def old_constants(contents: Members, marker: Path) -> None:
    contents["archive/data/constants/model.pt"] = pickled(marker)


def code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w')"


def guard(contents: Members, marker: Path) -> None:
    edit(contents, MODEL, lambda v: v["guards_code"].append(code(marker)))


def size(contents: Members, marker: Path) -> None:
    def change(values: Any) -> None:
        for meta in graph(values)["tensor_values"].values():
            for entry in meta["sizes"]:
                if "as_expr" in entry:
                    entry["as_expr"]["expr_str"] = f"__import__('os').{code(marker)}".replace(
                        "os').open", "builtins').open"
                    )

    edit(contents, MODEL, change)


def insert(values: Any, name: str, target: str, argument: Any, output: Any) -> None:
    """A further node in front of all others."""
    first = graph(values)["nodes"][0]
    given = [{"name": "self", "arg": argument, "kind": 1}]
    node = {**first, "name": name, "target": target, "inputs": given, "outputs": [output]}
    graph(values)["nodes"].insert(0, node)


def call(contents: Members, marker: Path) -> None:
    """A graph that calls an operator on files."""

    def change(values: Any) -> None:
        known = graph(values)["tensor_values"]
        known["evil"] = known["x"]
        text, output = {"as_string": str(marker)}, {"as_tensor": {"name": "evil"}}
        insert(values, "evil", "torch.ops.aten.from_file.default", text, output)
        given = graph(values)["nodes"][0]["inputs"]
        given[0]["name"] = "filename"
        given.append({"name": "shared", "arg": {"as_bool": True}, "kind": 1})
        given.append({"name": "size", "arg": {"as_int": 4}, "kind": 1})

    edit(contents, MODEL, change)


def argument(contents: Members, marker: Path) -> None:
    """Names of arguments that are more: torch writes them into the source of the graph, twice."""

    def change(values: Any) -> None:
        signature = values["graph_module"]["module_call_graph"][0]["signature"]
        first = f'x={code(marker)}):\n    return {{0:"""'
        signature["forward_arg_names"] = [first, "1}#"]
        tree = json.loads(signature["in_spec"])
        keywords = tree[1]["children_spec"][1]
        keywords["context"] = json.dumps(["x", "y"])
        keywords["children_spec"] *= 2
        signature["in_spec"] = json.dumps(tree)

    edit(contents, MODEL, change)


def tree(contents: Members, marker: Path) -> None:
    """A tree of arguments whose type is to be imported: the module makes a file."""
    marker.with_name("evil_module.py").write_text(f"{code(marker)}\ndict = dict\n")

    def change(values: Any) -> None:
        context = {
            "default_factory_module": "evil_module",
            "default_factory_name": "dict",
            "dict_context": [],
        }
        leaf = {"type": "collections.defaultdict", "context": context, "children_spec": []}
        values["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps(
            [1, leaf]
        )

    edit(contents, MODEL, change)


def enum(contents: Members, marker: Path) -> None:
    marker.with_name("evil_enum.py").write_text(f"{code(marker)}\n")

    def change(values: Any) -> None:
        context = json.dumps([{"__enum__": True, "fqn": "evil_enum:Evil", "name": "x"}])
        leaf = {"type": None, "context": None, "children_spec": []}
        spec = {"type": "builtins.dict", "context": context, "children_spec": [leaf]}
        values["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps(
            [1, spec]
        )

    edit(contents, MODEL, change)


ATTACKS: dict[str, tuple[Callable[[Members, Path], None], str]] = {
    f.__name__: (f, reason)
    for f, reason in (
        (inputs, "example inputs hold more"),
        (weight, "is a pickle or an object"),
        (constant, "opaque_obj_0' is not one of a program"),
        (old_weights, "'archive/data/weights/model.pt' is not one of a program"),
        (old_constants, "'archive/data/constants/model.pt' is not one of a program"),
        (guard, "more than an expression of sizes"),
        (size, "more than an expression of sizes"),
        (call, "from_file.default', which reads or writes files"),
        (argument, "is no name"),
        (tree, "of type 'collections.defaultdict'"),
        (enum, "is no path"),
    )
}
