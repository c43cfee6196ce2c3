"""A folder of adapters served lazily: the right ones, within bounds, from any thread, never a capture."""

import json
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vera_fx
from tests.helpers import assert_close, assert_far_apart
from tests.mixing.test_mixed import alone, fill_all
from tests.models import BY_NAME

BASE = "__base__"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.head = nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3)
        self.extra = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.first(x).tanh())) + self.extra(x)


def config(**options: Any) -> vera_fx.VeraConfig:
    given = {"r": 4, "target_modules": ["first"], "modules_to_save": ["head"], "plan": "factored"}
    return vera_fx.VeraConfig(**{**given, **options})


def make(folder: Path, count: int, *, capacity: int = 2) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A model with one adapter in its bank, a store of others, and what each of them computes."""
    torch.manual_seed(0)
    trained = vera_fx.adapt(Tiny().eval(), config(), adapter_name="home")
    base = {k: v for k, v in trained.state_dict().items() if not k.startswith("vera.")}
    x = torch.randn(6, 5)
    for number in range(count):
        vera_fx.add_adapter(trained, f"s{number}")
    fill_all(trained)
    with torch.no_grad():
        results = {n: alone(trained, n, {"x": x}) for n in (*vera_fx.adapter_names(trained), BASE)}
    for number in range(count):
        vera_fx.save_adapter(trained, folder / f"s{number}", adapter_name=f"s{number}")
    vera_fx.save_adapter(trained, folder.parent / "home", adapter_name="home")
    model = Tiny().eval()
    model.load_state_dict(base)
    vera_fx.load_adapter(model, folder.parent / "home", adapter_name="home", plan="factored")
    store = vera_fx.AdapterStore(model, folder, capacity=capacity)
    return model, store, {"x": x, **results}


def assert_rows(model: nn.Module, names: list[str], known: dict[str, Any]) -> None:
    with torch.no_grad():
        mixed = model(known["x"][: len(names)], adapter_names=names)
    for row, name in enumerate(names):
        assert_close(mixed[row], known[name][row], what=f"row {row}, {name}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


def test_rows_of_stored_adapters_within_the_bound(folder: Path) -> None:
    model, store, known = make(folder, 4)
    assert_far_apart(known["s0"], known["s1"])
    assert store.names() == ["s0", "s1", "s2", "s3"]
    assert store.loaded() == []
    for names in (["s0", BASE, "s1"], ["home", "s2", "s2"], ["s1", "s3", "home", BASE]):
        assert_rows(model, names, known)
        assert len(store.loaded()) <= 2
    assert store.loaded() == ["s1", "s3"]
    assert (store.counts.loads, store.counts.hits, store.counts.evictions) == (4, 1, 2)
    assert_rows(model, ["s3"], known)
    assert store.counts.hits == 2
    with pytest.raises(vera_fx.AdapterError, match="3 different adapters.*keeps 2 in memory"):
        assert_rows(model, ["s0", "s1", "s2"], known)


def test_no_recompile_no_recapture_when_adapters_come_and_go(folder: Path) -> None:
    model, store, known = make(folder, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_rows(compiled, ["home", BASE, "home"], known)
    runtime = model._vera_runtime
    captures = len(list(runtime.all_captures()))
    source = folder.parent / "home"
    with torch.compiler.set_stance("fail_on_recompile"):
        for names in (["s0", "s1", "s0"], ["s2", BASE, "s3"], ["home", "s1", "s2"]):
            assert_rows(compiled, names, known)
        store.add("new", source)
        known["new"] = known["home"]
        assert_rows(compiled, ["new", "s3", "new"], known)
        store.delete("new")
        assert_rows(compiled, ["s0", "s3", BASE], known)
    assert store.counts.evictions >= 4
    assert len(list(runtime.all_captures())) == captures


def guarded_thread(failures: list[BaseException], work: Any) -> threading.Thread:
    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    return threading.Thread(target=run)


def test_threads_load_and_add_while_the_model_serves(folder: Path) -> None:
    model, store, known = make(folder, 6, capacity=3)
    failures: list[BaseException] = []
    stop = threading.Event()
    guarded = partial(guarded_thread, failures)

    def load() -> None:
        number = 0
        while not stop.is_set():
            store.load(f"s{number % 6}")
            number += 1

    def come_and_go() -> None:
        for number in range(20):
            store.add(f"t{number}", folder / "s0")
            store.load(f"t{number}")
            store.delete(f"t{number}")

    def serve() -> None:
        for number in range(40):
            assert_rows(model, [f"s{(number + k) % 6}" for k in range(3)], known)

    assert_rows(model, ["home", "s0", "s1"], known)
    helpers = [guarded(load), guarded(come_and_go)]
    servers = [guarded(serve), guarded(serve)]
    for thread in (*helpers, *servers):
        thread.start()
    for thread in (*servers, helpers[1]):
        thread.join(60)
    stop.set()
    helpers[0].join(60)
    assert not failures
    assert len(store.loaded()) <= 3
    assert store.names() == [f"s{number}" for number in range(6)]


def test_one_reader_at_a_time_for_one_adapter(folder: Path) -> None:
    _, store, _ = make(folder, 1)
    threads = [threading.Thread(target=store.load, args=("s0",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert store.counts.loads == 1
    assert store.counts.hits == 7


def damage_config(path: Path, **changes: Any) -> None:
    values = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**values, **changes}))


def damage_weights(path: Path, change: Any) -> None:
    state = load_file(path / WEIGHTS)
    change(state)
    save_file(state, path / WEIGHTS)


D = "base_model.model.first.vera_lambda_d"
DAMAGES: list[tuple[Any, str]] = [
    (lambda p: (p / WEIGHTS).write_bytes(b"\xff" * 64), "damaged or no safetensors"),
    (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-9]), "damaged or no safe"),
    (lambda p: (p / WEIGHTS).unlink(), "there is no adapter_model"),
    (lambda p: (p / CONFIG).write_text("[" * 100_000), "not valid JSON"),
    (lambda p: damage_config(p, r=1 << 40), "other projections"),
    (lambda p: damage_config(p, r=3), "other projections"),
    (lambda p: damage_config(p, peft_type="LORA"), "peft_type='LORA'"),
    (lambda p: damage_config(p, target_modules=["nowhere"]), "does not fit this model"),
    (lambda p: damage_weights(p, lambda s: s.pop(D)), "missing"),
    (lambda p: damage_weights(p, lambda s: s.update(more=torch.ones(2))), "unknown"),
    (lambda p: damage_weights(p, lambda s: s.update({D: torch.ones(9)})), "has shape"),
    (lambda p: damage_weights(p, lambda s: s[D].fill_(float("nan"))), "no finite"),
    (lambda p: damage_weights(p, lambda s: s.update({D: torch.ones(4).int()})), "no finite"),
    (lambda p: damage_weights(p, lambda s: s["base_model.vera_A"].add_(1)), "other projections"),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_a_damaged_adapter_disturbs_no_other(folder: Path, number: int) -> None:
    damage, reason = DAMAGES[number]
    model, store, known = make(folder, 2)
    damage(folder / "s1")
    assert_rows(model, ["s0", "home"], known)
    with pytest.raises(vera_fx.CheckpointError, match=reason):
        assert_rows(model, ["s0", "s1"], known)
    assert store.counts.failures == 1
    assert_rows(model, ["s0", "home", BASE], known)
    assert store.loaded() == ["s0"]
    before = store.names()
    with pytest.raises(vera_fx.CheckpointError):
        store.add("copy", folder / "s1")
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("name", ["../home", "/etc", "", ".", "a/b", "s0\0", "x" * 200, BASE, 7])
def test_names_that_are_paths_are_refused(folder: Path, name: Any) -> None:
    _, store, _ = make(folder, 1)
    assert name not in store
    for step in (store.load, store.delete, lambda n: store.add(n, folder / "s0")):
        with pytest.raises(vera_fx.AdapterError):
            step(name)
    assert store.names() == ["s0"]


def test_unknown_taken_and_deleted(folder: Path) -> None:
    model, store, known = make(folder, 2)
    with pytest.raises(vera_fx.AdapterError, match=r"adapter_names\[1\] is 's9'.*did you mean 's"):
        assert_rows(model, ["s0", "s9"], known)
    for name in ("s0", "home"):
        with pytest.raises(vera_fx.AdapterError, match="already"):
            store.add(name, folder / "s1")
    store.load("s1")
    store.delete("s1")
    assert store.names() == ["s0"]
    with pytest.raises(vera_fx.AdapterError, match="'s1'"):
        assert_rows(model, ["s0", "s1"], known)
    with pytest.raises(vera_fx.AdapterError, match="or it was deleted"):
        store.load("s1")
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(vera_fx.AdapterError, match="capacity"):
            vera_fx.AdapterStore(model, folder, capacity=wrong)


@pytest.mark.parametrize("again", [False, True])
def test_deleted_by_another_process_while_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Half of it is gone then: that is no damage."""
    _, store, _ = make(folder, 1)
    read = store._packer.read

    def deleted(path: Path) -> Any:
        monkeypatch.setattr(store._packer, "read", read)
        path.rename(folder.parent / "away")
        if again:
            shutil.copytree(folder.parent / "away", path)
        (folder.parent / "away" / WEIGHTS).unlink()
        return read(folder.parent / "away")

    monkeypatch.setattr(store._packer, "read", deleted)
    if again:
        store.load("s0")
        assert store.loaded() == ["s0"]
    else:
        with pytest.raises(vera_fx.AdapterError, match="or it was deleted"):
            store.load("s0")


def test_bank_changes_move_the_layout_and_stored_rows_follow(folder: Path) -> None:
    model, store, known = make(folder, 2)
    assert_rows(model, ["s0", "s1"], known)
    wide = config(target_modules=["first", "extra"], modules_to_save=None)
    vera_fx.add_adapter(model, "wide", wide)
    assert len(model.vera.projections) == 1
    fill = model.vera.adapters["wide"]
    for parameter in fill.parameters():
        parameter.data.normal_()
    assert_rows(model, ["s0", BASE, "home", "s1"], known)
    assert store.counts.loads == 2
    vera_fx.delete_adapter(model, "wide")
    assert_rows(model, ["s1", "s0"], known)


def test_a_stored_adapter_of_a_kind_the_bank_lacks(folder: Path) -> None:
    model, _, _ = make(folder, 1)
    bare = vera_fx.adapt(Tiny().eval(), config(modules_to_save=None), adapter_name="bare")
    store = vera_fx.AdapterStore(bare, folder)
    with pytest.raises(vera_fx.CheckpointError, match=r"'head.weight'.*load_adapter first"):
        store.load("s0")
    vera_fx.delete_adapter(model, "home")
    with pytest.raises(vera_fx.CheckpointError, match="load_adapter first"):
        model(torch.randn(2, 5), adapter_names=["s0", BASE])


def test_generate_keeps_its_adapters_while_they_are_deleted(folder: Path) -> None:
    family = BY_NAME["llama"]
    torch.manual_seed(0)
    options = vera_fx.VeraConfig(r=4, target_modules="all-linear", plan="factored")
    model = vera_fx.adapt(family.build().eval(), options, adapter_name="home")
    vera_fx.add_adapter(model, "s0")
    fill_all(model)
    vera_fx.save_adapter(model, folder / "s0", adapter_name="s0")
    inputs = {k: v for k, v in family.inputs().items() if k != "labels"}
    names = ["s0", "home", BASE]
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **greedy, adapter_names=names)
    vera_fx.delete_adapter(model, "s0")
    store = vera_fx.AdapterStore(model, folder)

    def delete_now(ids: Tensor, scores: Tensor) -> Tensor:
        if "s0" in store:
            store.delete("s0")
        return scores

    tokens = model.generate(**inputs, **greedy, adapter_names=names, logits_processor=[delete_now])
    assert torch.equal(tokens, expected)
    with pytest.raises(vera_fx.AdapterError, match=r"adapter_names\[0\] is 's0'"):
        model.generate(**inputs, **greedy, adapter_names=names)
    shutil.rmtree(folder)
