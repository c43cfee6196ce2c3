"""Adapters on disk: PEFT's files and ours are the same files."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import vera_fx
from tests.helpers import fill_vectors, main_output, peft_pair, vectors_of
from tests.models import BY_NAME, MLP, Family

NAMES = ("bert", "gpt2", "llama", "t5")  # every variant of a small model: test_parity_files.py


def run(model: nn.Module, family: Family):
    inputs = family.inputs()
    with torch.no_grad():
        return main_output(model(**inputs))


def build(name: str) -> tuple[Family, nn.Module]:
    torch.manual_seed(0)
    family = BY_NAME[name]
    return family, family.build().eval()


@pytest.mark.parametrize("name", NAMES)
class TestInterchange:
    def test_files_are_the_same(self, name: str, tmp_path: Path) -> None:
        family, base = build(name)
        theirs, ours = peft_pair(base, **family.config)
        theirs.save_pretrained(tmp_path / "theirs")
        vera_fx.save_adapter(ours, tmp_path / "ours")

        configs = [
            json.loads((tmp_path / who / "adapter_config.json").read_text())
            for who in ("theirs", "ours")
        ]
        for config in configs:
            if isinstance(config["target_modules"], list):
                config["target_modules"].sort()
        assert configs[0] == configs[1]
        tensors = [
            load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")
        ]
        assert tensors[0].keys() == tensors[1].keys()
        copied = {
            k for k in tensors[0] if "classifier" in k
        }  # a head that each copied from the base
        for key in tensors[0].keys() - copied:
            assert torch.equal(tensors[0][key], tensors[1][key]), key

    def test_peft_loads_ours(self, name: str, tmp_path: Path) -> None:
        family, base = build(name)
        config = vera_fx.VeraConfig(r=6, plan="factored", **family.config)
        ours = vera_fx.adapt(copy.deepcopy(base), config)
        fill_vectors(ours)
        vera_fx.save_adapter(ours, tmp_path)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()

        assert torch.equal(run(theirs, family), run(ours.eval(), family))

    def test_ours_loads_pefts(self, name: str, tmp_path: Path) -> None:
        family, base = build(name)
        theirs, _ = peft_pair(base, **family.config)
        theirs.save_pretrained(tmp_path)
        ours = vera_fx.load_adapter(
            copy.deepcopy(base), tmp_path, adapter_name="mine", plan="factored"
        )

        assert torch.equal(run(ours, family), run(theirs.eval(), family))
        assert vera_fx.active_adapters(ours) == ["mine"]
        assert not any(p.requires_grad for p in ours.parameters())


def test_trained_head_and_biases_travel(tmp_path: Path) -> None:
    family, base = build("bert")
    config = {"task_type": "SEQ_CLS", "bias": "all"}
    theirs, ours = peft_pair(base, **config)
    for model in (theirs, ours):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(**family.inputs()).loss.backward()
            optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    vera_fx.save_adapter(ours, tmp_path / "ours")
    loaded = vera_fx.load_adapter(copy.deepcopy(base), tmp_path / "theirs", plan="factored")
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()

    keys = [
        set(load_file(tmp_path / who / "adapter_model.safetensors")) for who in ("theirs", "ours")
    ]
    # PEFT also writes its wrappers' inner names of the saved head's bias; nobody reads them.
    strays = {
        f"base_model.model.classifier.{name}.bias"
        for name in ("modules_to_save", "original_module")
    }
    assert keys[0] - strays == keys[1]
    assert torch.equal(run(loaded, family), run(theirs.eval(), family))
    assert torch.equal(run(reloaded, family), run(ours.eval(), family))
    torch.testing.assert_close(run(loaded, family), run(ours.eval(), family), rtol=1e-4, atol=1e-5)


def test_loading_a_second_adapter_keeps_the_first(tmp_path: Path) -> None:
    family, base = build("bert")
    first, second = (
        vera_fx.VeraConfig(r=r, target_modules=t, projection_prng_key=k)
        for r, t, k in ((6, ["query", "value"], 0), (3, ["dense"], 7))
    )
    expected = {}
    for name, config in (("first", first), ("second", second)):
        model = vera_fx.adapt(copy.deepcopy(base), config)
        fill_vectors(model)
        vera_fx.save_adapter(model, tmp_path / name)
        expected[name] = run(model, family)
    both = vera_fx.load_adapter(copy.deepcopy(base), tmp_path / "first", adapter_name="first")
    vera_fx.load_adapter(both, tmp_path / "second", adapter_name="second")

    assert vera_fx.active_adapters(both) == ["first"]
    for name in ("first", "second", "first"):
        vera_fx.set_adapter(both, name)
        torch.testing.assert_close(run(both, family), expected[name], rtol=1e-5, atol=1e-6)


def test_equal_projections_are_kept_once(tmp_path: Path) -> None:
    config = vera_fx.VeraConfig(r=4, target_modules=["lin0", "lin1"])
    model = vera_fx.adapt(MLP(), config)
    vera_fx.save_adapter(model, tmp_path)
    vera_fx.load_adapter(model, tmp_path, adapter_name="again")
    vera_fx.add_adapter(model, "same")
    vera_fx.add_adapter(
        model,
        "other",
        vera_fx.VeraConfig(r=4, target_modules=["lin0", "lin1"], projection_prng_key=1),
    )

    assert len(model.vera.projections) == 2
    vera_fx.delete_adapter(model, "other")
    assert len(model.vera.projections) == 1


def test_drawn_projections_are_checked_against_the_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vera_fx.VeraConfig(r=4, target_modules=["lin0"], save_projection=False)
    vera_fx.save_adapter(vera_fx.adapt(MLP(), config), tmp_path)
    vera_fx.load_adapter(MLP(), tmp_path)
    monkeypatch.setattr(
        "vera_fx.branches.vera.parameters.draw_projections",
        lambda r, i, o, key: (torch.ones(r, i), torch.ones(o, r)),
    )
    with pytest.raises(vera_fx.CheckpointError, match="not the ones it was trained with"):
        vera_fx.load_adapter(MLP(), tmp_path)


def test_state_dict_round_trip_and_refusals() -> None:
    config = vera_fx.VeraConfig(r=4, target_modules=["lin0", "lin1"])
    model, other = (vera_fx.adapt(MLP(), config) for _ in range(2))
    fill_vectors(model)
    vera_fx.load_adapter_state_dict(other, vera_fx.adapter_state_dict(model))

    for name, value in vectors_of(model).items():
        assert torch.equal(vectors_of(other)[name], value)
    wrong = {**vera_fx.adapter_state_dict(model), "base_model.vera_A": torch.zeros(4, 20)}
    with pytest.raises(vera_fx.CheckpointError, match="differ from those it was made with"):
        vera_fx.load_adapter_state_dict(other, wrong)


FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def small_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = vera_fx.VeraConfig(r=2, target_modules=["lin0"], modules_to_save=["lin1"])
    return vera_fx.save_adapter(vera_fx.adapt(MLP(), config), tmp_path_factory.mktemp("small"))


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, str, int, int]]:
    """(file, kind, where from 0 to 9999, byte): where files say most, bytes are hit most often."""
    place = st.one_of(st.integers(0, 300), st.integers(0, 9999))
    kind = st.sampled_from(["set", "flip", "cut", "insert", "repeat"])
    one = st.tuples(st.sampled_from(FILES), kind, place, st.integers(0, 255))
    return draw(st.lists(one, min_size=1, max_size=4))


def damaged(content: bytes, kind: str, place: int, byte: int) -> bytes:
    at = place % max(len(content), 1)
    if kind == "cut":
        return content[:at]
    if kind == "repeat":
        return content[:at] + content[max(0, at - byte) :]
    middle = {"set": bytes([byte]), "insert": bytes([byte]) + content[at : at + 1]}.get(kind)
    if middle is None:
        middle = bytes(b ^ (1 << byte % 8) for b in content[at : at + 1])
    return content[:at] + middle + content[at + 1 :]


@given(damages())
@pytest.mark.filterwarnings(
    "ignore:.*written by a newer PEFT", "ignore:.*no projections and no hash"
)
def test_damaged_files_are_refused_or_harmless(
    small_adapter: Path, tmp_path_factory: pytest.TempPathFactory, damage: list
) -> None:
    """Whatever happened to the bytes: one kind of error, and a model that is what it was."""
    folder = tmp_path_factory.mktemp("damaged")
    contents = {name: (small_adapter / name).read_bytes() for name in FILES}
    for name, kind, place, byte in damage:
        contents[name] = damaged(contents[name], kind, place, byte)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    model = MLP()
    before = (dict(model.named_modules()), dict(model.named_parameters()), list(model.__dict__))
    try:
        vera_fx.load_adapter(model, folder)
    except vera_fx.CheckpointError:
        assert type(model) is MLP
        assert before == (
            dict(model.named_modules()),
            dict(model.named_parameters()),
            list(model.__dict__),
        )
        assert all(p.requires_grad for p in model.parameters())
    else:
        assert vera_fx.adapter_names(model) == ["default"]
        assert model(torch.zeros(2, 10)).shape == (2, 7)


def test_base_state_dict_keys_stay() -> None:
    base = MLP()
    before = list(base.state_dict())
    model = vera_fx.adapt(
        base, vera_fx.VeraConfig(r=2, target_modules=["lin0"], save_projection=False)
    )
    model(torch.randn(3, 10))
    after = list(model.state_dict())

    assert [key for key in after if not key.startswith("vera.")] == before
    assert [key for key in after if key.startswith("vera.")] == [
        "vera.adapters.default.vectors.lin0.vera_lambda_d",
        "vera.adapters.default.vectors.lin0.vera_lambda_b",
    ]
