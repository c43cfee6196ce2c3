"""Programs of strangers: nothing that a file says is run, and whatever it says is one kind of error."""

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vera_fx
from tests.export import hostile
from tests.export.export_models import adapted, call_of

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    _, model = adapted("mlp")
    program = vera_fx.export_program(model, kwargs=call_of("mlp"), form="constant")
    return vera_fx.save_program(program, tmp_path_factory.mktemp("saved") / "p.pt2")


@pytest.mark.parametrize("attack", hostile.ATTACKS)
def test_no_code_of_a_file_is_run(
    attack: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these files makes a file of its own under plain torch."""
    monkeypatch.syspath_prepend(str(tmp_path))
    change, reason = hostile.ATTACKS[attack]
    marker, contents = tmp_path / "marker", hostile.members(saved)
    change(contents, marker)
    path = hostile.write(tmp_path / "evil.pt2", contents)

    with pytest.raises(vera_fx.ExportError, match=reason):
        vera_fx.load_program(path)
    assert not marker.exists()
    with contextlib.suppress(Exception):  # it runs first, and may fail then
        torch.export.load(path).module()(**call_of("mlp"))
    assert marker.exists(), "the attack is none: the test proves nothing"


def changed(saved: Path, tmp_path: Path, change: Any, **options: Any) -> Path:
    contents = hostile.members(saved)
    change(contents)
    return hostile.write(tmp_path / "changed.pt2", contents, **options)


def node(**fields: Any) -> Any:
    """A change of the first operator of the graph."""
    return lambda c: hostile.edit(
        c, hostile.MODEL, lambda v: hostile.graph(v)["nodes"][0].update(fields)
    )


def member(name: str, data: bytes = b"x") -> Any:
    return lambda c: c.update({f"archive/{name}": data})


def payload(**fields: Any) -> Any:
    def change(values: Any) -> None:
        next(iter(values["config"].values())).update(fields)

    return lambda c: hostile.edit(c, hostile.WEIGHTS, change)


def meta(**fields: Any) -> Any:
    def change(values: Any) -> None:
        next(iter(values["config"].values()))["tensor_meta"].update(fields)

    return lambda c: hostile.edit(c, hostile.WEIGHTS, change)


REFUSED = {
    "compiled code": (member("data/aotinductor/model/evil.so"), "is not one of a program"),
    "outside of the folder": (lambda c: c.update({"../evil": b""}), "is not one of a program"),
    "another program": (member("models/other.json"), "is not one of a program"),
    "no graph": (lambda c: c.pop(hostile.MODEL), "has no member 'models/model.json'"),
    "function of torch": (
        node(target="torch.os.system"),
        "'torch.os.system', which is no operator",
    ),
    "method of an operator": (
        node(target="torch.ops.aten.add.__call__"),
        "this torch does not have",
    ),
    "loading of a library": (node(target="torch.ops.load_library.x"), "takes operators of 'aten'"),
    "other operators": (node(target="torch.ops.debugprims.load_tensor"), "trusts those too"),
    "higher order": (node(target="torch.ops.higher_order.aoti_call_delegate"), "of that kind are"),
    "saving": (node(target="torch.ops.aten.save.default"), "reads or writes files|does not have"),
    "caller of methods": (node(target="_operator.methodcaller"), "which is no operator"),
    "name of a node": (node(name="x; import os"), "is no name"),
    "unknown field": (node(source="import os"), "'source' holds 'import os', and is not known"),
    "unknown metadata": (node(metadata={"hook": "os.system"}), "metadata 'hook' is not known"),
    "an object": (node(inputs=[{"name": "", "arg": {"as_custom_obj": {"a": 1}}}]), "of its own"),
    "pickled": (payload(use_pickle=True), "pickle or an object"),
    "almost false": (payload(use_pickle=0), "pickle or an object"),
    "elsewhere": (payload(path_name="../../etc/passwd"), "pickle or an object"),
    "more": (payload(more=1), "in another way than torch does"),
    "negative size": (meta(sizes=[{"as_int": -1}]), "sizes or strides that are none"),
    "endless size": (meta(sizes=[{"as_int": 2**50}]), "sizes or strides that are none"),
    "size of symbols": (
        meta(sizes=[{"as_expr": {"expr_str": "s0"}}]),
        "cannot be read as a program",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_program_holds_is_refused(case: str, saved: Path, tmp_path: Path) -> None:
    change, reason = REFUSED[case]
    with pytest.raises(vera_fx.ExportError, match=reason):
        vera_fx.load_program(changed(saved, tmp_path, change))


def test_members_are_stored_once_and_as_they_are(saved: Path, tmp_path: Path) -> None:
    packed = changed(saved, tmp_path, lambda _: None, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(vera_fx.ExportError, match="is compressed or encrypted"):
        vera_fx.load_program(packed)
    twice = changed(saved, tmp_path, lambda _: None)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(hostile.MODEL, b"{}")
    with pytest.raises(vera_fx.ExportError, match="is there twice"):
        vera_fx.load_program(twice)


def test_zeros_that_take_no_room_in_the_file(saved: Path, tmp_path: Path) -> None:
    """Torch makes an empty tensor of the size that the file asks for: terabytes from nothing."""

    def change(contents: hostile.Members) -> None:
        contents["archive/data/weights/weight_0"] = b""
        meta(sizes=[{"as_int": 2**39}], strides=[{"as_int": 1}])(contents)

    with pytest.raises(vera_fx.ExportError, match=r"of sizes \[549755813888\] has 0 bytes"):
        vera_fx.load_program(changed(saved, tmp_path, change))


def test_operators_of_others_are_taken_where_they_are_trusted(tmp_path: Path) -> None:
    @torch.library.custom_op("vera_fx_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    x = torch.ones(3)
    path = vera_fx.save_program(torch.export.export(Net(), (x,)), tmp_path / "p.pt2")
    with pytest.raises(vera_fx.ExportError, match="namespaces=\\['vera_fx_tests'\\]"):
        vera_fx.load_program(path)
    program = vera_fx.load_program(path, namespaces=["vera_fx_tests"])
    assert torch.equal(program.module()(x), 2 * x)


def test_programs_of_version_0_1_load() -> None:
    program = vera_fx.load_program(DATA / "v0_1" / "program.pt2")
    assert vera_fx.program_sites(program) == ("0", "2")


MANIFESTS: dict[str, tuple[Any, str]] = {
    "list": (lambda _: [1], "it is .*not an object"),
    "form": (lambda m: {**m, "form": "mixed"}, "form is 'mixed', not one of 'merged'"),
    "more": (lambda m: {**m, "more": 1}, "has 'more' beside"),
    "less": (lambda m: {k: v for k, v in m.items() if k != "targets"}, "lacks 'targets'"),
    "kind": (lambda m: {**m, "kind": "LoRA"}, "kind is 'LoRA', not one of 'VeRA'"),
    "width": (
        lambda m: {**m, "targets": [{**m["targets"][0], "in_features": "7"}]},
        "in_features is",
    ),
    "dtype": (
        lambda m: {**m, "projections": {**m["projections"], "through": ["load"]}},
        "through is 'load'",
    ),
    "hash": (lambda m: {**m, "projections": {**m["projections"], "sha256": "0"}}, "not a SHA-256"),
    "seed": (lambda m: {**m, "projections": {**m["projections"], "seed": 2**64}}, "seed is 1844"),
    "name": (
        lambda m: {**m, "vectors": {k: {**v, "name": "vera.x"} for k, v in m["vectors"].items()}},
        "which the program has not",
    ),
    "tensor": (
        lambda m: {
            **m,
            "projections": {
                **m["projections"],
                "tensors": {
                    k: {**v, "sha256": "0" * 64} for k, v in m["projections"]["tensors"].items()
                },
            },
        },
        "is damaged: its SHA-256",
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_of_unknown_form(case: str, saved: Path, tmp_path: Path) -> None:
    change, reason = MANIFESTS[case]

    def rewrite(contents: hostile.Members) -> None:
        manifest = json.loads(contents[hostile.MANIFEST])
        contents[hostile.MANIFEST] = json.dumps(change(manifest)).encode()

    with pytest.raises(vera_fx.ExportError, match=reason):
        vera_fx.load_program(changed(saved, tmp_path, rewrite))


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b"1" * 5000])
def test_manifests_that_are_none(text: bytes, saved: Path, tmp_path: Path) -> None:
    path = changed(saved, tmp_path, lambda c: c.update({hostile.MANIFEST: text}))
    with pytest.raises(vera_fx.ExportError, match="is not of a form that is known here"):
        vera_fx.load_program(path)
    with pytest.raises(vera_fx.ExportError, match="is no program"):
        vera_fx.program_sites(text)  # type: ignore[arg-type]


def test_projections_that_would_fill_the_memory(saved: Path, tmp_path: Path) -> None:
    def change(contents: hostile.Members) -> None:
        def huge(manifest: Any) -> None:
            manifest["projections"].update(left_out=True, r=2**30)

        hostile.edit(contents, hostile.MANIFEST, huge)

    with pytest.raises(vera_fx.ExportError, match="to be drawn for the program have"):
        vera_fx.load_program(changed(saved, tmp_path, change))
