"""Adapter names, checked in one place: whatever is taken is a name of a file and of a module."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vera_fx
from tests.models import MLP
from vera_fx.bank.names import check_name

CONFIG = vera_fx.VeraConfig(r=2, target_modules=["lin0"])

REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": ("", "non-empty string"),
    "no text": (7, "non-empty string"),
    "none": (None, "non-empty string"),
    "dot": ("a.b", r"without '\.'"),
    "parent": ("..", "without"),
    "slash": ("a/b", "without '/'"),
    "backslash": ("a\\b", "without"),
    "drive": ("c:", "without ':'"),
    "wildcard": ("a*", "without"),
    "zero": ("a\0", "without"),
    "line": ("a\nb", "without"),
    "separator": ("a\u2028b", "without"),
    "surrogate": ("a\ud800", "without"),
    "space": (" a", "spaces around it"),
    "long": ("x" * 129, "at most 128 characters"),
    "many bytes": ("🤖" * 64, "256 bytes as a file name"),
    "base": ("__base__", "stands for the plain base model"),
    "module state": ("training", "torch keeps module state"),
    "device": ("Con", "names a device"),
    "port": ("com¹", "names a device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_are_refused_everywhere(case: str, tmp_path: Path) -> None:
    name, reason = REFUSED[case]
    model = vera_fx.adapt(MLP(), CONFIG, adapter_name="home")
    vera_fx.save_adapter(model, tmp_path / "saved", adapter_name="home")
    before = list(model.state_dict())
    store = vera_fx.AdapterStore(model, tmp_path / "store")
    for step in (
        lambda: vera_fx.adapt(MLP(), CONFIG, adapter_name=name),
        lambda: vera_fx.add_adapter(model, name),
        lambda: vera_fx.load_adapter(model, tmp_path / "saved", adapter_name=name),
        lambda: vera_fx.load_adapter(MLP(), tmp_path / "saved", adapter_name=name),
        lambda: store.add(name, tmp_path / "saved"),
    ):
        with pytest.raises(vera_fx.AdapterError, match=reason):
            step()
    assert list(model.state_dict()) == before
    assert store.names() == []
    assert name not in store


@given(st.text(max_size=150))
def test_a_name_that_is_taken_is_a_file_and_a_parameter(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    try:
        check_name(name, ())
    except vera_fx.AdapterError:
        return
    folder = tmp_path_factory.mktemp("names")
    (folder / name).mkdir()
    assert [path.name for path in folder.iterdir()] == [name]
    model = vera_fx.adapt(MLP(), CONFIG, adapter_name=name)
    assert vera_fx.adapter_names(model) == [name]
    assert any(f".{name}." in key for key in model.state_dict())


def test_names_that_some_file_systems_take_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vera_fx.adapt(MLP(), CONFIG, adapter_name="Ä")
    vera_fx.add_adapter(model, "a\u0308")  # in memory they are two
    monkeypatch.setattr("vera_fx.checkpoint.saving.folds_case", lambda _: True)
    with pytest.raises(vera_fx.AdapterError, match="are one to file systems"):
        vera_fx.save_adapters(model, tmp_path / "adapters")
    assert not list((tmp_path / "adapters").iterdir())
    monkeypatch.setattr("vera_fx.checkpoint.saving.folds_case", lambda _: False)
    assert len(vera_fx.save_adapters(model, tmp_path / "adapters")) == 2


def test_a_store_takes_no_names_that_differ_in_case_alone(tmp_path: Path) -> None:
    model = vera_fx.adapt(MLP(), CONFIG, adapter_name="home")
    vera_fx.save_adapter(model, tmp_path / "saved", adapter_name="home")
    store = vera_fx.AdapterStore(model, tmp_path / "store")
    store.add("straße", tmp_path / "saved")
    for name in ("STRASSE", "Straße", "HOME"):
        with pytest.raises(vera_fx.AdapterError, match="are one to file systems"):
            store.add(name, tmp_path / "saved")
    assert store.names() == ["straße"]
