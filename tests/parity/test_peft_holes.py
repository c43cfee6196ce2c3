"""Known defects of PEFT 0.21.2's VeRA: shown where that is cheap, and the right behaviour here."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vera_fx
from tests.helpers import (
    adapted_by_peft,
    adapted_by_us,
    adapter_vectors,
    assert_close,
    assert_far_apart,
    fill_adapters,
)
from tests.models import MLP

X = torch.randn(4, 10, generator=torch.Generator().manual_seed(3))
BOTH: dict[str, Any] = {"r": 5, "target_modules": ["lin0", "lin1"]}
WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:.*no projections and no hash")


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval()


def in_peft(base: nn.Module, first: str = "a", **fields: Any) -> peft.PeftModel:
    return adapted_by_peft(base, first, **BOTH | fields)


def in_ours(base: nn.Module, first: str = "a", **fields: Any) -> nn.Module:
    return adapted_by_us(base, first, **BOTH | fields)


def add(model: nn.Module, name: str, **fields: Any) -> None:
    """Another adapter of the fields, in PEFT's model or ours."""
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, peft.VeraConfig(**BOTH | fields))
    else:
        vera_fx.add_adapter(model, name, vera_fx.VeraConfig(plan="factored", **BOTH | fields))


def alone(base: nn.Module, name: str, **fields: Any) -> Tensor:
    """What PEFT computes with this adapter as the only one: the oracle for several."""
    model = in_peft(base, name, **fields)
    fill_adapters(model)
    return model(X)


def test_adapter_names_choose_per_row(base: nn.Module) -> None:
    theirs, ours = in_peft(base), in_ours(base)
    for model in (theirs, ours):
        add(model, "b")
        fill_adapters(model)
    names = ["b", "a", "__base__", "b"]
    assert torch.equal(theirs(X, adapter_names=names), theirs(X))  # not a word about the rows

    mixed = ours(X, adapter_names=names)
    expected = {"a": alone(base, "a"), "b": alone(base, "b"), "__base__": base(X)}
    for row, name in enumerate(names):
        assert_close(mixed[row], expected[name][row])


SECONDS = {
    "smaller rank": {"r": 2},
    "larger rank": {"r": 8},
    "another seed": {"projection_prng_key": 4},
    "larger targets": {"target_modules": ["lin1"]},
    "other saving": {"save_projection": False},
}


@pytest.mark.parametrize("second", SECONDS)
def test_a_second_adapter_may_differ(base: nn.Module, second: str) -> None:
    fields, first = SECONDS[second], {"target_modules": ["lin0"]}
    theirs, ours = in_peft(base, **first), in_ours(base, **first)

    def use_in_peft() -> None:
        add(theirs, "b", **{**first, **fields})
        theirs.set_adapter("b")
        theirs(X)

    with pytest.raises((ValueError, RuntimeError)):
        use_in_peft()
    add(ours, "b", **{**first, **fields})
    fill_adapters(ours)
    for name, its in (("b", {**first, **fields}), ("a", first), ("b", {**first, **fields})):
        vera_fx.set_adapter(ours, name)
        assert torch.equal(ours(X), alone(base, name, **its)), name


def test_projections_that_are_drawn_again_are_those_of_the_training(
    base: nn.Module, tmp_path: Path
) -> None:
    """PEFT cuts the second adapter's projections out of the first one's, which are other numbers."""
    fields = {"target_modules": ["lin0"], "save_projection": False}
    single = in_peft(base, "b", **fields)
    fill_adapters(single)
    expected = single(X)
    single.save_pretrained(tmp_path)
    larger = {"save_projection": False}
    theirs, ours = in_peft(base, **larger), in_ours(base, **larger)
    theirs.load_adapter(tmp_path / "b", "b"), theirs.set_adapter("b")
    assert_far_apart(theirs(X), expected)

    vera_fx.load_adapter(ours, tmp_path / "b", adapter_name="b", plan="factored")
    vera_fx.set_adapter(ours, "b")
    assert torch.equal(ours(X), expected)


def test_loading_other_projections_leaves_the_first_adapter_alone(
    base: nn.Module, tmp_path: Path
) -> None:
    other = in_peft(base, "b")
    fill_adapters(other)
    with torch.no_grad():
        other.base_model.vera_A["b"].mul_(-2)
    second = other(X)
    other.save_pretrained(tmp_path)
    theirs, ours = in_peft(base), in_ours(base)
    fill_adapters(theirs), fill_adapters(ours)
    first = ours(X)
    assert torch.equal(theirs(X), first)
    theirs.load_adapter(tmp_path / "b", "b")
    assert_far_apart(theirs(X), first)  # the active adapter is still "a"

    vera_fx.load_adapter(ours, tmp_path / "b", adapter_name="b", plan="factored")
    assert torch.equal(ours(X), first)
    vera_fx.set_adapter(ours, "b")
    assert torch.equal(ours(X), second)
    assert len(ours.vera.projections) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_projections_are_stored_once(base: nn.Module, dtype: torch.dtype) -> None:
    theirs, ours = in_peft(base.to(dtype)), in_ours(base.to(dtype))
    for model in (theirs, ours):
        for name in ("b", "c"):
            add(model, name)
    stored = {theirs.base_model.vera_A[name].data_ptr() for name in "abc"}
    assert len(stored) == (1 if dtype == torch.float32 else 3)
    assert len(ours.vera.projections) == 1


def test_state_dict_has_one_pair_of_projections(base: nn.Module) -> None:
    theirs, ours = in_peft(base), in_ours(base)
    assert sum("vera_A" in key for key in theirs.state_dict()) == 3  # one per layer, and its own
    assert sum("vera_A" in key for key in ours.state_dict()) == 1
    assert {k for k in ours.state_dict() if not k.startswith("vera.")} == set(base.state_dict())


def test_delete_all_then_add(base: nn.Module) -> None:
    theirs, ours = in_peft(base), in_ours(base)
    theirs.delete_adapter("a"), vera_fx.delete_adapter(ours, "a")
    with pytest.raises(ValueError, match="buffers are empty. This should not happen"):
        add(theirs, "b")
    assert torch.equal(ours(X), base(X))

    add(ours, "b")
    fill_adapters(ours)
    assert torch.equal(ours(X), base(X))
    vera_fx.set_adapter(ours, "b")
    assert torch.equal(ours(X), alone(base, "b"))


def test_deleting_the_active_adapter_chooses_no_other(base: nn.Module) -> None:
    """PEFT goes on with whichever adapter comes first in the alphabet."""
    theirs, ours = in_peft(base, "z"), in_ours(base, "z")
    for model in (theirs, ours):
        add(model, "b"), add(model, "c")
        fill_adapters(model)
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        theirs.delete_adapter("z")
    with pytest.warns(UserWarning, match="No adapter is active now.*'b', 'c'"):
        vera_fx.delete_adapter(ours, "z")
    assert torch.equal(ours(X), base(X))
    vera_fx.set_adapter(ours, ["b", "c"])
    vera_fx.delete_adapter(ours, "c")
    assert vera_fx.active_adapters(ours) == ["b"]


def test_merging_one_of_two_active_adapters_keeps_the_other(base: nn.Module) -> None:
    theirs, ours = in_peft(base), in_ours(base)
    for model in (theirs, ours):
        add(model, "b")
        fill_adapters(model)
    theirs.base_model.set_adapter(["a", "b"]), vera_fx.set_adapter(ours, ["a", "b"])
    expected = ours(X)
    theirs.merge_adapter(["a"]), vera_fx.merge(ours, "a")
    assert_far_apart(theirs(X), expected)
    assert_close(theirs(X), alone(base, "a"), factor=20)

    assert_close(ours(X), expected, factor=20)
    vera_fx.unmerge(ours)
    assert_close(ours(X), expected, factor=20)


def test_disabling_while_merged_leaves_weights_alone_in_forward(base: nn.Module) -> None:
    theirs, ours = in_peft(base), in_ours(base)
    fill_adapters(theirs), fill_adapters(ours)
    expected = ours(X)
    theirs.merge_adapter(), vera_fx.merge(ours, keep_base=True)
    merged = ours.lin0.weight.clone()
    with theirs.disable_adapter():
        before = theirs.lin0.base_layer.weight.clone()
        theirs(X)
        assert not torch.equal(theirs.lin0.base_layer.weight, before)  # forward has unmerged it
    assert not theirs.base_model.model.lin0.merged  # for good

    with vera_fx.disable_adapters(ours):
        before = ours.lin0.weight.clone()
        assert torch.equal(ours(X), base(X))
        assert torch.equal(ours.lin0.weight, before)
    assert torch.equal(ours.lin0.weight, merged)
    assert_close(ours(X), expected, factor=20)


class Attends(nn.Module):
    """Torch's attention, which reads the weight of its output projection without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("train", [True, False])
def test_out_proj_of_torchs_attention_is_adapted(train: bool) -> None:
    torch.manual_seed(0)
    base, x = Attends().train(train), torch.randn(2, 5, 12)
    fields = {"target_modules": ["out_proj"]}
    theirs, ours = in_peft(base, **fields).train(train), in_ours(base, **fields)
    fill_adapters(theirs), fill_adapters(ours)
    assert_close(theirs(x), base(x))  # adapted, they say

    folded = vera_fx.unload(copy.deepcopy(ours), merge=True)
    assert_far_apart(ours(x), base(x))
    assert_close(ours(x), folded(x), factor=20)
    ours(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapter_vectors(ours).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_loaded_for_inference_never_train(
    base: nn.Module, dtype: torch.dtype, tmp_path: Path
) -> None:
    vera_fx.save_adapter(
        in_ours(base, modules_to_save=["lin1"], target_modules=["lin0"]), tmp_path, adapter_name="a"
    )
    half = base.to(dtype)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(half), tmp_path)
    ours = vera_fx.load_adapter(copy.deepcopy(half), tmp_path)

    def trains(model: nn.Module) -> bool:
        return any(p.requires_grad for p in model.parameters())

    assert trains(theirs) == (dtype != torch.float32)
    assert not trains(ours)
    theirs.set_adapter("default"), vera_fx.set_adapter(ours, "default")
    assert trains(theirs)
    assert not trains(ours)
    with vera_fx.disable_adapters(ours):
        assert not trains(ours)
    assert not trains(ours)
    vera_fx.merge(ours), vera_fx.unmerge(ours)
    vera_fx.load_adapter(ours, tmp_path, adapter_name="second")
    vera_fx.set_adapter(ours, "second")
    assert not trains(ours)
    vera_fx.load_adapter(ours, tmp_path, adapter_name="third", trainable=True)
    training = {n.split(".")[2] for n, p in ours.named_parameters() if p.requires_grad}
    assert training == {"third"}  # at once, as PEFT's
    vera_fx.set_adapter(ours, "third")
    assert {n.split(".")[2] for n, p in ours.named_parameters() if p.requires_grad} == {"third"}


def test_names_of_modules_lose_no_tensors(base: nn.Module, tmp_path: Path) -> None:
    """PEFT leaves every key out that has the name of another adapter in it."""
    theirs, ours = in_peft(base, "default"), in_ours(base, "default")
    for model in (theirs, ours):
        add(model, "lin0")
        fill_adapters(model)
    theirs.save_pretrained(tmp_path / "theirs"), vera_fx.save_adapters(ours, tmp_path / "ours")
    lost = (
        load_file(tmp_path / "ours" / WEIGHTS).keys()
        - load_file(tmp_path / "theirs" / WEIGHTS).keys()
    )
    assert lost == {f"base_model.model.lin0.vera_lambda_{vector}" for vector in "bd"}

    fresh = vera_fx.load_adapter(copy.deepcopy(base), tmp_path / "ours", plan="factored")
    assert torch.equal(fresh(X), alone(base, "default"))


HOSTILE = (
    "default", "a", "vera", "mlp", "MLP", "lin0", "lin", "lin01", "vera_lambda_", "vera_lambda_d",
    "vera_A", "base_layer", "base_model", "model", "modules_to_save", "original_module", "adapters",
    "vectors", "copies", "weight", "bias", "0", "forward", "keys", "pop", "ünï", "with space", "-x",
)  # fmt: skip


def test_hostile_names_on_one_model(base: nn.Module, tmp_path: Path) -> None:
    ours = in_ours(
        base, "default", modules_to_save=["lin1"], target_modules=["lin0"], bias="vera_only"
    )
    for name in HOSTILE[1:]:
        vera_fx.add_adapter(ours, name)
    fill_adapters(ours)
    with torch.no_grad():
        for name in HOSTILE:
            for _, _, tensor in ours.vera.adapter(name).copied_tensors():
                tensor.add_(len(name) / 10 + ord(name[-1]) / 1000)
    expected: dict[str, Tensor] = {}
    for name in HOSTILE:
        vera_fx.set_adapter(ours, name)
        expected[name] = ours(X)
    folders = vera_fx.save_adapters(ours, tmp_path)
    twin = copy.deepcopy(ours)
    twin.load_state_dict(ours.state_dict())
    fresh = copy.deepcopy(base)
    for name in reversed(HOSTILE):
        vera_fx.load_adapter(fresh, folders[name], adapter_name=name, plan="factored")
    for name in HOSTILE:
        for model in (fresh, twin):
            vera_fx.set_adapter(model, name)
            assert torch.equal(model(X), expected[name]), name
        state = vera_fx.adapter_state_dict(ours, name)
        assert len(state) == 2 + 2 + 2 + 1, name
        single = load_file(folders[name] / WEIGHTS)
        assert state.keys() == single.keys(), name
        assert all(torch.equal(value, single[key]) for key, value in state.items()), name
    assert len({str(value) for value in expected.values()}) == len(HOSTILE)


def test_a_refused_adapter_leaves_no_half_of_it(base: nn.Module) -> None:
    theirs, ours = in_peft(base, target_modules=["lin0"]), in_ours(base, target_modules=["lin0"])
    before = set(ours.state_dict())
    with pytest.raises(TypeError, match="is not supported"):
        add(theirs, "b", target_modules=["lin0", "drop"])
    assert any(key[0] == "b" for key in adapter_vectors(theirs))

    with pytest.raises(vera_fx.TargetError, match="target 'drop' is a Dropout"):
        add(ours, "b", target_modules=["lin0", "drop"])
    assert set(ours.state_dict()) == before
    assert vera_fx.adapter_names(ours) == ["a"]


def test_all_biases_of_two_adapters(base: nn.Module) -> None:
    """PEFT trains the base's own biases, so only one adapter may, and disabling keeps them."""
    theirs, ours = in_peft(base, bias="all"), in_ours(base, bias="all")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        add(theirs, "b", bias="all")
    add(ours, "b", bias="all")
    fill_adapters(ours)
    results = []
    for name in ("a", "b"):
        vera_fx.set_adapter(ours, name)
        with torch.no_grad():
            for p in ours.parameters():
                if p.requires_grad and p.numel() in {20, 7}:
                    p.add_(1 + ord(name))
        results.append(ours(X))
    with vera_fx.disable_adapters(ours):
        assert torch.equal(ours(X), base(X))
    vera_fx.set_adapter(ours, "a")
    assert torch.equal(ours(X), results[0])
    assert_far_apart(results[0], results[1])


def stack(layers: int) -> nn.Module:
    """Numbered layers with several linear modules each."""
    blocks = (
        nn.ModuleDict({name: nn.Linear(3, 3) for name in ("q", "k", "v")}) for _ in range(layers)
    )
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(blocks)})})


@pytest.mark.parametrize("layers", [2, 7])
def test_all_linear_in_chosen_layers(layers: int) -> None:
    """PEFT obeys or ignores ``layers_to_transform`` here, by the number of layers of the model."""
    fields = {"r": 2, "target_modules": "all-linear", "layers_to_transform": [1]}
    theirs = peft.get_peft_model(stack(layers), peft.VeraConfig(**fields))
    ours = vera_fx.adapt(stack(layers), vera_fx.VeraConfig(**fields))
    chosen = {f"model.layers.1.{name}" for name in ("q", "k", "v")}
    assert (set(theirs.base_model.targeted_module_names) == chosen) == (layers == 7)
    assert set(ours.vera.structure.targets) == chosen


def test_layers_of_a_regular_expression_are_not_ignored() -> None:
    fields = {"r": 2, "target_modules": r".*\.q", "layers_to_transform": [1]}
    theirs = peft.get_peft_model(stack(3), peft.VeraConfig(**fields))
    assert len(theirs.base_model.targeted_module_names) == 3
    with pytest.raises(vera_fx.ConfigError, match="does not apply to a regular expression"):
        vera_fx.VeraConfig(**fields)


def test_targets_that_do_not_exist_are_not_ignored(base: nn.Module) -> None:
    assert in_peft(base, target_modules=["lin0", "lim1"]).base_model.targeted_module_names == [
        "lin0"
    ]
    with pytest.raises(vera_fx.TargetError, match="'lim1' match nothing.*\n.*did you mean 'lin1'"):
        in_ours(base, target_modules=["lin0", "lim1"])


def test_the_users_configuration_stays_as_it_is(base: nn.Module) -> None:
    theirs = peft.VeraConfig(r=2, target_modules="all-linear")
    peft.get_peft_model(copy.deepcopy(base), theirs)
    assert theirs.target_modules == {"lin0", "lin1"}
    mine = vera_fx.VeraConfig(r=2, target_modules="all-linear")
    vera_fx.adapt(base, mine)
    assert mine == vera_fx.VeraConfig(r=2, target_modules="all-linear")


def test_an_adapter_of_another_method_is_refused(base: nn.Module, tmp_path: Path) -> None:
    other = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["lin0"]))
    other.save_pretrained(tmp_path)
    with pytest.raises(vera_fx.CheckpointError, match="is for peft_type='LORA'"):
        vera_fx.load_adapter(base, tmp_path)
    assert type(base) is MLP
