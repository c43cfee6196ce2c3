"""Bad input: one clear error of our own class, and a model that is what it was before."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vera_fx
from tests.models import BY_NAME, MLP
from vera_fx.errors import listing, nearest, shown


def state_of(model: nn.Module) -> dict:
    """Everything that must not change when a step is refused."""
    return {
        "class": type(model),
        "modules": [n for n, _ in model.named_modules()],
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "hooks": {n: len(m._forward_hooks) for n, m in model.named_modules()},
        "attributes": sorted(model.__dict__),
        "values": {n: p.detach().clone() for n, p in model.named_parameters()},
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = state_of(model)
    for name in ("class", "modules", "requires_grad", "hooks", "attributes"):
        assert after[name] == before[name], name
    assert all(torch.equal(after["values"][n], v) for n, v in before["values"].items())


CONFIGS = [
    ({"r": 0}, "r must be a positive integer, got 0"),
    ({"r": -3}, "got -3"),
    ({"r": 2.0}, r"got 2\.0"),
    ({"r": True}, "got True"),
    ({"r": "8"}, "got '8'"),
    ({"vera_dropout": 1.0}, "vera_dropout must be at least 0 and below 1"),
    ({"vera_dropout": -0.1}, "vera_dropout"),
    ({"d_initial": float("nan")}, "d_initial must be a finite number"),
    ({"bias": "lora_only"}, "bias must be one of 'none', 'all', 'vera_only'"),
    ({"plan": "fastest"}, "plan must be one of"),
    ({"task_type": "SEQ_CLASS"}, "did you mean 'SEQ_CLS'"),
    ({"projection_prng_key": 1.5}, "projection_prng_key must be an integer"),
    ({"target_modules": [1, 2]}, "target_modules must be a string or a list of strings"),
    ({"layers_pattern": "layers"}, "layers_pattern was given without layers_to_transform"),
    ({"layers_to_transform": ["a"]}, "layers_to_transform must be integers"),
    ({"target_modules": ".*q", "layers_to_transform": 1}, "does not apply to a regular expression"),
    ({"save_projection": "yes"}, "save_projection must be True or False"),
]


@pytest.mark.parametrize(("fields", "message"), CONFIGS, ids=lambda v: str(v)[:40])
def test_config_values(fields: dict, message: str) -> None:
    with pytest.raises(vera_fx.ConfigError, match=message):
        vera_fx.VeraConfig(**fields)


TARGETS = [
    ({"target_modules": ["lin2"]}, r"no module .* matches.*\n.*did you mean 'lin"),
    ({"target_modules": ["lin0", "lim1"]}, r"'lim1' match nothing.*\n.*did you mean 'lin1'"),
    ({"target_modules": "lin"}, "no module of this model matches"),
    ({"target_modules": "lin("}, "is not a regular expression"),
    ({"target_modules": ["drop"]}, "target 'drop' is a Dropout"),
    ({}, "there is no default for model type None.*'lin0', 'lin1'"),
    ({"target_modules": ["lin0"], "exclude_modules": ["lin0"]}, "are excluded by exclude_modules"),
    (
        {"target_modules": ["lin0"], "modules_to_save": ["lin7"]},
        "modules_to_save names 'lin7'.*did you mean",
    ),
]


@pytest.mark.parametrize(("fields", "message"), TARGETS, ids=lambda v: str(v)[:50])
def test_targets(fields: dict, message: str) -> None:
    model = MLP()
    before = state_of(model)
    with pytest.raises(vera_fx.TargetError, match=message):
        vera_fx.adapt(model, vera_fx.VeraConfig(r=3, **fields))
    assert_unchanged(model, before)


def test_layers_that_do_not_exist() -> None:
    config = vera_fx.VeraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[7])
    with pytest.raises(
        vera_fx.TargetError, match="with layers_to_transform=.7,. and layers_pattern=None"
    ):
        vera_fx.adapt(BY_NAME["llama"].build(), config)


CONFIG = vera_fx.VeraConfig(r=3, target_modules=["lin0", "lin1"])


def test_adapting_twice() -> None:
    model = vera_fx.adapt(MLP(), CONFIG)
    before = state_of(model)
    with pytest.raises(
        vera_fx.AdapterError, match="adapted already .adapters: default.; use add_adapter"
    ):
        vera_fx.adapt(model, CONFIG)
    with pytest.raises(vera_fx.AdapterError, match="called 'default' already"):
        vera_fx.add_adapter(model, "default")
    assert_unchanged(model, before)


def test_adapted_part() -> None:
    whole = nn.Sequential(vera_fx.adapt(MLP(), CONFIG), nn.Linear(7, 2))
    with pytest.raises(
        vera_fx.AdapterError, match="module '0' inside this model is adapted already"
    ):
        vera_fx.adapt(whole, vera_fx.VeraConfig(r=2, target_modules=["1"]))


def test_lazy_layer() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = nn.LazyLinear(4)

    with pytest.raises(vera_fx.TargetError, match="lazy"):
        vera_fx.adapt(Lazy(), vera_fx.VeraConfig(r=3, target_modules=["lin0"]))


def test_not_a_module_or_config() -> None:
    with pytest.raises(vera_fx.ConfigError, match="got a dict"):
        vera_fx.adapt(MLP(), {"r": 3})
    with pytest.raises(vera_fx.ConfigError, match="must be a torch.nn.Module"):
        vera_fx.adapt("model", CONFIG)


def test_replaced_forward() -> None:
    model = MLP()
    model.forward = lambda x: x
    with pytest.raises(vera_fx.AdapterError, match="adapt the model before it is wrapped"):
        vera_fx.adapt(model, CONFIG)


def test_own_attribute_called_vera() -> None:
    model = MLP()
    model.vera = nn.Linear(2, 2)
    with pytest.raises(vera_fx.AdapterError, match="attribute 'vera' of its own"):
        vera_fx.adapt(model, CONFIG)


@pytest.mark.parametrize(
    "name",
    ["", "a.b", "a/b", "..", "a\\b", "x" * 200, " a", "a\0", "__base__", "training", 3, None],
)
def test_adapter_names(name: object) -> None:
    model = MLP()
    before = state_of(model)
    with pytest.raises(vera_fx.AdapterError):
        vera_fx.adapt(model, CONFIG, adapter_name=name)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "name", ["a", "vera", "mlp", "lin0", "type", "forward", "adapters", "ünï", "0"]
)
def test_awkward_names_work(name: str, tmp_path: Path) -> None:
    model = vera_fx.adapt(MLP().eval(), CONFIG, adapter_name=name)
    with torch.no_grad():
        for p in model.vera.parameters():
            p.normal_()
    x = torch.randn(2, 10)
    vera_fx.save_adapter(model, tmp_path / "saved", adapter_name=name)
    base = vera_fx.unload(copy.deepcopy(model))
    fresh = vera_fx.load_adapter(base, tmp_path / "saved", adapter_name="other")

    assert torch.equal(fresh(x), model(x))


class Branching(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(x) if x.sum() > 0 else -self.lin0(x)


def test_untraceable_example_warns_and_runs_in_python() -> None:
    config = vera_fx.VeraConfig(r=3, target_modules=["lin0"])
    match = (
        r"Branching cannot be captured whole and runs in Python: .*cannot capture Branching\(x\)"
    )
    with pytest.warns(vera_fx.PartialCaptureWarning, match=match):
        model = vera_fx.adapt(Branching(), config, example_inputs=(torch.randn(2, 10),))
    assert model(torch.randn(2, 10)).shape == (2, 4)


def test_unadaptable_use_leaves_the_model_alone() -> None:
    class Sliced(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.lin0.weight[:4])

    model = Sliced()
    before = state_of(model)
    with pytest.raises(vera_fx.TargetError, match="target 'lin0'.*exclude it from target_modules"):
        vera_fx.adapt(model, CONFIG, example_inputs={"x": torch.randn(2, 10)})
    assert_unchanged(model, before)


def test_argument_of_unknown_type() -> None:
    """The forward itself runs, and says what it thinks of it."""

    class Thing:
        pass

    model = vera_fx.adapt(MLP(), CONFIG)
    with (
        pytest.warns(vera_fx.PartialCaptureWarning, match="argument 'x' holds a Thing"),
        pytest.raises(TypeError, match="linear"),
    ):
        model(Thing())


def test_wrong_call_is_a_type_error() -> None:
    model = vera_fx.adapt(MLP(), CONFIG)
    with pytest.raises(TypeError, match="too many positional arguments"):
        model(torch.randn(2, 10), torch.randn(2, 10))


def test_functions_need_an_adapted_model() -> None:
    for function in (vera_fx.explain, vera_fx.unload, vera_fx.merge, vera_fx.adapter_names):
        with pytest.raises(
            vera_fx.AdapterError, match=r"this MLP is not adapted; call vera_fx.adapt"
        ):
            function(MLP())
    with pytest.raises(vera_fx.AdapterError, match="this OptimizedModule is not adapted"):
        vera_fx.adapter_names(torch.compile(MLP()))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return vera_fx.save_adapter(vera_fx.adapt(MLP(), CONFIG), tmp_path / "adapter")


def rewrite_json(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "DROP"}))


JSON = [
    ({"alpha": 3}, "keys that VeRA configurations do not have:\n  'alpha'"),
    ({"vera_dropot": 0.1}, "did you mean 'vera_dropout'"),
    ({"peft_type": "LORA"}, "peft_type='LORA'"),
    ({"peft_type": "DROP"}, "peft_type=None"),
    ({"r": 0}, "r must be a positive integer"),
    ({"r": "256"}, "got '256'"),
    ({"r": 5}, r"vera_lambda_. has shape .* need"),
    ({"target_modules": ["lin0"]}, "unknown: 'base_model.model.lin1.vera_lambda_"),
    ({"target_modules": ["q_proj"]}, "does not fit this model"),
]


@pytest.mark.parametrize(("changes", "message"), JSON, ids=lambda v: str(v)[:40])
def test_damaged_configuration(saved: Path, changes: dict, message: str) -> None:
    rewrite_json(saved, **changes)
    model = MLP()
    before = state_of(model)
    with pytest.raises(vera_fx.CheckpointError, match=message):
        vera_fx.load_adapter(model, saved)
    assert_unchanged(model, before)


def test_newer_peft_may_have_unknown_keys(saved: Path) -> None:
    rewrite_json(saved, some_new_feature=1, peft_version="0.99.0")
    with pytest.warns(UserWarning, match="written by a newer PEFT; ignoring keys"):
        vera_fx.load_adapter(MLP(), saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "holds a list"),
        ("[" * 99999, "not valid JSON"),
    ],
    ids=["empty", "cut", "list", "deep"],
)
def test_configuration_that_is_no_object(saved: Path, text: str, message: str) -> None:
    (saved / "adapter_config.json").write_text(text)
    with pytest.raises(vera_fx.CheckpointError, match=message):
        vera_fx.load_adapter(MLP(), saved)


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 60, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    model = MLP()
    before = state_of(model)
    with pytest.raises(vera_fx.CheckpointError, match="is damaged or no safetensors file"):
        vera_fx.load_adapter(model, saved)
    assert_unchanged(model, before)


def edit_weights(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.update({k.replace("__", "."): v for k, v in changes.items()})
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def test_weights_of_other_shapes_or_targets(saved: Path) -> None:
    for change, message in (
        ({"base_model__model__lin0__vera_lambda_b": torch.zeros(4)}, r"shape \(4,\).*need \(20,\)"),
        (
            {"base_model__model__lin0__vera_lambda_b": None},
            "missing: 'base_model.model.lin0.vera_lambda_b'",
        ),
        ({"base_model__vera_A": None, "base_model__vera_B": None}, "has no vera_A and vera_B"),
    ):
        torch.manual_seed(0)
        vera_fx.save_adapter(vera_fx.adapt(MLP(), CONFIG), saved)
        edit_weights(saved, **change)
        model = MLP()
        before = state_of(model)
        with pytest.raises(vera_fx.CheckpointError, match=message):
            vera_fx.load_adapter(model, saved)
        assert_unchanged(model, before)


def test_projections_of_other_sizes(saved: Path) -> None:
    edit_weights(saved, base_model__vera_A=torch.zeros(3, 12))
    with pytest.raises(vera_fx.CheckpointError, match=r"vera_A \(3, 12\).*need \(3, 20\)"):
        vera_fx.load_adapter(MLP(), saved)


def test_missing_files(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(vera_fx.CheckpointError, match="no adapter_config.json in .*no folder"):
        vera_fx.load_adapter(MLP(), tmp_path / "nowhere")
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(vera_fx.CheckpointError, match="is a pickle, which vera_fx never loads"):
        vera_fx.load_adapter(MLP(), saved)


def test_loading_for_another_model(saved: Path) -> None:
    with pytest.raises(vera_fx.CheckpointError, match="does not fit this model"):
        vera_fx.load_adapter(BY_NAME["llama"].build(), saved)


def test_saving_to_a_place_that_cannot_be(tmp_path: Path) -> None:
    model = vera_fx.adapt(MLP(), CONFIG)
    (tmp_path / "file").write_text("x")
    with pytest.raises(vera_fx.CheckpointError, match="could not be saved"):
        vera_fx.save_adapter(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_failed_save_leaves_the_old_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vera_fx.checkpoint.saving.save_file", full_disk)
    with pytest.raises(vera_fx.CheckpointError, match="No space left"):
        vera_fx.save_adapter(
            vera_fx.adapt(MLP(), vera_fx.VeraConfig(r=9, target_modules=["lin0"])), saved
        )
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize(
    ("variable", "value"), [("VERA_FX_VERIFY", "yes"), ("VERA_FX_PASS_LIMIT", "-1")]
)
def test_debug_knobs(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    model = vera_fx.adapt(MLP(), CONFIG)
    with pytest.raises(vera_fx.ConfigError, match=f"{variable} must be"):
        model(torch.randn(2, 10))


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_values_of_any_kind_are_shown_briefly() -> None:
    for value in (Unshowable(), 10**5_000, "x" * 10**6, "\ud800", b"\xff" * 10**5):
        text = shown(value)
        assert 0 < len(text) < 300
        text.encode()


def test_messages_are_cut_where_they_say_least() -> None:
    error = vera_fx.ConfigError("a" * 100 + "b" * 10**6 + "what to do")
    assert len(str(error)) < 8_100
    assert str(error).startswith("a" * 100)
    assert str(error).endswith("what to do")
    assert len(nearest("x" * 10**6, ["x" * 10**5])) < 1_000
    assert len(listing(["x" * 10**5] * 10**4)) < 3_000
