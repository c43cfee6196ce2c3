"""Adapters of strangers: what their files may say, and that a load which fails has changed nothing."""

import json
import os
import struct
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vera_fx
from tests.fuzz.targets import Probe
from tests.helpers import fill_vectors, vectors_of
from tests.models import MLP
from vera_fx.checkpoint import saving
from vera_fx.disk.safetensors_file import SHA256

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
D = "base_model.model.lin0.vera_lambda_d"


def adapted(value: float = 1.0, **options: Any) -> Any:
    model = vera_fx.adapt(
        MLP(), vera_fx.VeraConfig(**{"r": 2, "target_modules": ["lin0"], **options})
    )
    for vector in vectors_of(model).values():
        vector.data.fill_(value)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = adapted(modules_to_save=["lin1"])
    fill_vectors(model)
    return vera_fx.save_adapter(model, tmp_path / "adapter")


def refused(folder: Path, reason: str, error: type[Exception] = vera_fx.CheckpointError) -> None:
    """Both onto a plain model and beside an adapter; neither is another afterwards."""
    plain = MLP()
    beside = vera_fx.adapt(
        MLP(), vera_fx.VeraConfig(r=2, target_modules=["lin0"]), adapter_name="a"
    )
    for model in (plain, beside):
        probe = Probe(model)
        with pytest.raises(error, match=reason) as found:
            vera_fx.load_adapter(model, folder, adapter_name="b")
        assert probe.is_unchanged()
        assert len(str(found.value)) < 3_000
    assert type(plain) is MLP


def with_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The same data under another header."""
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    values = json.loads(data[8 : 8 + length])
    values = change(values) or values
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def entry(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: values[D].update(fields)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "list": (lambda _: b"[]", "its header is no object"),
    "deep": (lambda _: b"[" * 100_000, "is damaged"),
    "no unicode": (lambda _: b"\xff", "is damaged"),
    "twice": (lambda v: json.dumps(v).encode()[:-1] + b', "x": {}, "x": {}}', "is there twice"),
    "metadata": (lambda v: v.update(__metadata__={"a": 1}), "no object of strings"),
    "metadata list": (lambda v: v.update(__metadata__=[]), "no object of strings"),
    "dtype": (entry(dtype="C64"), "of dtype 'C64', and no tensor of an adapter is"),
    "dtype list": (entry(dtype=[]), r"of dtype \[\]"),
    "negative": (entry(shape=[-2]), "no sizes"),
    "float": (entry(shape=[2.0]), "no sizes"),
    "bool": (entry(shape=[True, 2]), "no sizes"),
    "huge": (entry(shape=[2**62]), "no sizes"),
    "terabytes": (entry(shape=[2**40]), "does not fill"),
    "overflow": (entry(shape=[2**61, 2**61, 0, 4]), "does not fill"),
    "dimensions": (entry(shape=[1] * 9), "no sizes"),
    "offsets": (entry(data_offsets=[0]), "does not fill"),
    "outside": (entry(data_offsets=[2**40, 2**40 + 8]), "does not begin where"),
    "backwards": (entry(data_offsets=[8, 0]), "does not fill"),
    "more": (entry(more=1), "not described by"),
    "less": (lambda v: v.update({D: {}}), "not described by"),
    "gap": (lambda v: v.pop(D) and None, "does not begin where|its tensors have"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, folder: Path) -> None:
    change, reason = HEADERS[case]
    with_header(folder, change)
    refused(folder, reason)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1, (64 << 20) + 1])
def test_lengths_of_headers(length: int, folder: Path) -> None:
    """Said to be of any length: nothing is read or taken for it."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])
    refused(folder, "is damaged or no safetensors file")


def change_state(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


STATES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "compiled twin": (
        lambda s: s.update({D.replace("lin0", "_orig_mod.lin0"): s[D].clone()}),
        "is there twice",
    ),
    "projection alone": (lambda s: s.pop("base_model.vera_B"), "has projections, but no"),
    "unknown": (lambda s: s.update({"base_model.model.lin0.lora_A": s[D].clone()}), "unknown"),
    "missing": (lambda s: s.pop(D), "missing"),
    "shape": (lambda s: s.update({D: torch.ones(3)}), r"has shape \(3,\)"),
    "scalar": (lambda s: s.update({D: torch.tensor(1.0)}), r"has shape \(\)"),
    "integers": (lambda s: s.update({D: torch.ones(2, dtype=torch.int64)}), "of dtype torch.int64"),
    "booleans": (lambda s: s.update({D: torch.ones(2, dtype=torch.bool)}), "of dtype torch.bool"),
    "rank of A": (
        lambda s: s.update({"base_model.vera_A": torch.ones(3, 10)}),
        "vera_A .* does not",
    ),
    "narrow A": (lambda s: s.update({"base_model.vera_A": torch.ones(2, 9)}), "vera_A .* does not"),
    "flat A": (lambda s: s.update({"base_model.vera_A": torch.ones(20)}), "vera_A .* does not"),
    "integer A": (
        lambda s: s.update({"base_model.vera_A": torch.ones(2, 10).int()}),
        "of dtype torch.int32",
    ),
    "NaN": (lambda s: s[D].fill_(float("nan")), "no finite numbers; allow_nonfinite=True"),
    "infinite projection": (lambda s: s["base_model.vera_A"].fill_(float("inf")), "no finite"),
    "head": (
        lambda s: s.update({"base_model.model.lin1.weight": torch.ones(2, 2)}),
        "lin1.weight has shape",
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_tensors(case: str, folder: Path) -> None:
    change, reason = STATES[case]
    change_state(folder, change)
    refused(folder, reason)


def test_values_that_are_no_numbers_where_they_are_asked_for(folder: Path) -> None:
    change_state(folder, lambda state: state[D].fill_(float("inf")))
    model = vera_fx.load_adapter(MLP(), folder, allow_nonfinite=True)
    assert any(vector.isinf().all() for vector in vectors_of(model).values())


def test_one_hash_over_all_tensors_and_metadata(folder: Path) -> None:
    """Every byte of the data, and what the metadata say, is what was saved."""
    good = (folder / WEIGHTS).read_bytes()
    begin = 8 + struct.unpack("<Q", good[:8])[0]
    for place in range(begin, len(good), max(1, (len(good) - begin) // 40)):
        bad = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
        (folder / WEIGHTS).write_bytes(bad)
        with pytest.raises(vera_fx.CheckpointError, match="is damaged: its tensors are not those"):
            vera_fx.load_adapter(MLP(), folder)
    (folder / WEIGHTS).write_bytes(good)
    with_header(folder, lambda v: v["__metadata__"].update(more="x"))
    refused(folder, "is damaged: its tensors are not those")
    # Whoever changes tensors on purpose saves them without it, as other tools do.
    with_header(
        folder, lambda v: (v["__metadata__"].pop("more"), v["__metadata__"].pop(SHA256))[:0]
    )
    assert vera_fx.adapter_names(vera_fx.load_adapter(MLP(), folder)) == ["default"]


def test_the_hash_covers_keys_and_shapes(folder: Path) -> None:
    """Two tensors of one size cannot be exchanged."""
    model = adapted(r=20)  # both vectors are of 20 numbers
    fill_vectors(model)
    vera_fx.save_adapter(model, folder)

    def exchange(values: dict[str, Any]) -> None:
        other = D.replace("lambda_d", "lambda_b")
        values[D], values[other] = values[other], values[D]

    with_header(folder, exchange)
    refused(folder, "is damaged: its tensors are not those")


RANGES: dict[str, tuple[Any, str]] = {
    "r": (0, "r must be a positive integer"),
    "r huge": (2**62, "r must be a positive integer up to"),
    "r text": ("2", "r must be a positive integer"),
    "r bool": (True, "r must be"),
    "r float": (2.0, "r must be"),
    "d_initial": (10**400, "d_initial must be a finite number"),
    "d_initial NaN": (float("nan"), "d_initial must be a finite number"),
    "vera_dropout": (1.5, "vera_dropout must be"),
    "projection_prng_key": (2**64, "projection_prng_key must be"),
    "projection_prng_key text": ("0", "projection_prng_key must be"),
    "save_projection": ("yes", "save_projection must be True or False"),
    "bias": ("some", "bias must be one of"),
    "bias list": (["all"], "bias must be one of"),
    "task_type": ("NOTHING", "task_type must be one of"),
    "target_modules": ([1], "target_modules must be"),
    "target_modules dict": ({"lin0": 1}, "target_modules must be"),
    "target_modules nested": ([["lin0"]], "target_modules must be"),
    "target_modules empty": ([""], "has the entry ''"),
    "target_modules long": (["x" * 5_000], "has the entry 'xxx"),
    "target_modules many": (["lin0"] * 200_001, "has 200,001 entries"),
    "target_modules hang": ("(a+)+" * 50 + r"\1", "does not fit|not followed|not a regular"),
    "target_modules deep": ("(" * 3_000, "not a regular expression"),
    "modules_to_save": (["(.*)*(.*)*X"] * 2, "does not fit|modules_to_save|matches"),
    "modules_to_save many": ([f"m{n}" for n in range(257)], "has 257 entries"),
    "layers_to_transform": (["0"], "layers_to_transform must be integers"),
    "layers_to_transform huge": ([2**40], "layers_to_transform must be integers"),
    "layers_pattern": ("(.*)*(.*)*X", "layers_pattern was given without"),
    "init_weights": (None, "init_weights must be"),
    "peft_type": ("LORA", "peft_type='LORA'"),
    "peft_type list": ([], r"peft_type=\[\]"),
    "more": (1, "keys that VeRA configurations do not have"),
}


@pytest.mark.parametrize("case", RANGES)
def test_configurations(case: str, folder: Path) -> None:
    value, reason = RANGES[case]
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, case.partition(" ")[0]: value}))
    refused(folder, reason)


TEXTS = {
    "empty": (b"", "not valid JSON"),
    "list": (b"[]", "holds a list where an object was expected"),
    "deep": (b"[" * 100_000, "not valid JSON"),
    "no unicode": (b'{"r": "\xff"}', "not valid JSON"),
    "twice": (b'{"r": 1, "r": 2}', "'r' is there twice"),
    "digits": (b'{"r": ' + b"1" * 5_000 + b"}", "not valid JSON"),
    "large": (b" " * ((16 << 20) + 1), "more than 16,777,216 bytes"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts_that_are_no_configuration(case: str, folder: Path) -> None:
    text, reason = TEXTS[case]
    (folder / CONFIG).write_bytes(text)
    refused(folder, reason)


@pytest.mark.parametrize("wrong", [None, 3, b"\0", "a\0b", ["a"], object], ids=repr)
def test_folders_that_are_none(wrong: Any) -> None:
    for step in (
        lambda: vera_fx.load_adapter(MLP(), wrong),
        lambda: vera_fx.save_adapter(adapted(), wrong),
        lambda: vera_fx.AdapterStore(adapted(), wrong),
    ):
        with pytest.raises(vera_fx.CheckpointError):
            step()


def test_projections_that_would_fill_the_memory(folder: Path) -> None:
    def small(state: dict[str, torch.Tensor]) -> None:
        rank = 2**26
        state.pop("base_model.vera_A")
        state.pop("base_model.vera_B")
        state[D] = torch.zeros(1).expand(rank).contiguous()

    change_state(folder, small)
    values = json.loads((folder / CONFIG).read_text())
    values.update(r=2**26, save_projection=False)
    (folder / CONFIG).write_text(json.dumps(values))
    refused(folder, "has no projections, and those of rank 67108864 have")


class TestStateDicts:
    def test_nothing_is_written_before_all_is_checked(self) -> None:
        model = adapted(1.0, target_modules=["lin0", "lin1"])
        good = {k: v.clone() for k, v in vera_fx.adapter_state_dict(model).items()}
        last = [key for key in good if "lambda" in key][-1]
        meta, complex_ = good[last].to("meta"), good[last].to(torch.complex64)
        for wrong, reason in (
            ({last: meta}, "cannot be used: .*meta tensor"),
            ({last: complex_}, "of dtype torch.complex64"),
            ({last: good[last] + float("nan")}, "no finite numbers"),
            ({last: good[last][:-1]}, "has shape"),
            ({last: 3}, "is no key with a tensor"),
            ({3: good[last]}, "is no key with a tensor"),
            ({f"_orig_mod.{last}": good[last]}, "is there twice"),
        ):
            state: Any = {k: v * 2 if "lambda" in k else v for k, v in good.items()} | wrong
            probe = Probe(model)
            with pytest.raises(vera_fx.CheckpointError, match=reason):
                vera_fx.load_adapter_state_dict(model, state)
            assert probe.is_unchanged()
        with pytest.raises(vera_fx.CheckpointError, match="must be a mapping"):
            vera_fx.load_adapter_state_dict(model, [])  # type: ignore[arg-type]


class TestOneRename:
    """The weights file is the save: it brings the configuration along."""

    def killed_between(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module, to: Path) -> None:
        """A save that ends after its first rename."""
        put = saving.put

        def once(source: Path, target: Path) -> None:
            put(source, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(saving, "put", once)
            with pytest.raises(KeyboardInterrupt):
                vera_fx.save_adapter(model, to)

    def test_first_save(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.killed_between(monkeypatch, adapted(3.0), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
        model = vera_fx.load_adapter(MLP(), tmp_path)
        assert all((v == 3).all() for v in vectors_of(model).values())

    def test_save_over_another_rank(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        vera_fx.save_adapter(adapted(1.0, r=2), tmp_path)
        self.killed_between(monkeypatch, adapted(2.0, r=5), tmp_path)
        assert json.loads((tmp_path / CONFIG).read_text())["r"] == 2
        model = vera_fx.load_adapter(MLP(), tmp_path)
        assert model.vera.adapters["default"].config.r == 5
        vera_fx.save_adapter(model, tmp_path)
        assert json.loads((tmp_path / CONFIG).read_text())["r"] == 5

    def test_an_edited_configuration_is_followed_and_said(self, folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, "vera_dropout": 0.25}))
        with pytest.warns(
            UserWarning, match="was changed after the adapter was saved.*vera_dropout"
        ):
            model = vera_fx.load_adapter(MLP(), folder)
        assert model.vera.adapters["default"].config.vera_dropout == 0.25
        (folder / CONFIG).write_text(json.dumps({**values, "base_model_name_or_path": "else"}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vera_fx.load_adapter(MLP(), folder)

    def test_replaced_while_it_is_read(self, tmp_path: Path) -> None:
        """Readers beside a writer of two ranks get one save or the other."""
        models = [adapted(2.0, r=2), adapted(5.0, r=5)]
        vera_fx.save_adapter(models[0], tmp_path)
        over = threading.Event()

        def write() -> None:
            while not over.is_set():
                for model in models:
                    vera_fx.save_adapter(model, tmp_path)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            found = set[int]()
            for _ in range(60):
                model = vera_fx.load_adapter(MLP(), tmp_path)
                rank = model.vera.adapters["default"].config.r
                assert all((v == rank).all() for v in vectors_of(model).values())
                found.add(rank)
        finally:
            over.set()
            writer.join(60)
        assert found == {2, 5}


@pytest.fixture
def small_files() -> Any:
    """Files end at 2,000 bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    return lambda on: resource.setrlimit(
        resource.RLIMIT_FSIZE, (2_000 if on else before[0], before[1])
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_full_disk(folder: Path, small_files: Any) -> None:
    before, model = contents(folder.parent), adapted(2.0, r=64)
    store = vera_fx.AdapterStore(vera_fx.load_adapter(MLP(), folder), folder.parent / "store")
    program = vera_fx.export_program(adapted().eval(), (torch.ones(2, 10),), form="constant")
    small_files(True)
    try:
        for step, error in (
            (lambda: vera_fx.save_adapter(model, folder), vera_fx.CheckpointError),
            (lambda: store.add("new", folder), vera_fx.CheckpointError),
            (lambda: vera_fx.save_program(program, folder.parent / "p.pt2"), vera_fx.ExportError),
        ):
            with pytest.raises(error, match="File too large|could not be"):
                step()
    finally:
        small_files(False)
    assert contents(folder.parent) == before
    assert store.names() == []
    assert [path.name for path in store.folder.iterdir()] == []


def test_read_only_folder(folder: Path) -> None:
    if os.name == "nt":
        pytest.skip("no modes")
    before, program = (
        contents(folder),
        vera_fx.export_program(adapted().eval(), (torch.ones(2, 10),)),
    )
    model = vera_fx.load_adapter(MLP(), folder)
    is_root = os.geteuid() == 0  # whom no mode holds back: the test becomes somebody else
    above = [path for path in folder.parents if "pytest-" in str(path)] if is_root else []
    modes = [(path, path.stat().st_mode) for path in (folder, *above)]
    for path in above:
        path.chmod(0o755)
    folder.chmod(0o555)
    if is_root:
        os.seteuid(65_534)
    try:
        if not os.access(vera_fx.__file__, os.R_OK, effective_ids=True):
            pytest.skip("nobody but root can read the library here")
        for step, error in (
            (lambda: vera_fx.save_adapter(model, folder), vera_fx.CheckpointError),
            (lambda: vera_fx.save_adapter(model, folder / "new"), vera_fx.CheckpointError),
            (lambda: vera_fx.save_program(program, folder / "p.pt2"), vera_fx.ExportError),
            (lambda: vera_fx.AdapterStore(model, folder / "store"), vera_fx.CheckpointError),
            (lambda: vera_fx.AdapterStore(model, folder).add("x", folder), vera_fx.CheckpointError),
        ):
            with pytest.raises(error, match="Permission denied"):
                step()
        vera_fx.load_adapter(MLP(), folder)  # reading needs no locks
    finally:
        if is_root:
            os.seteuid(0)
        for path, mode in modes:
            path.chmod(mode)
    assert contents(folder) == before
