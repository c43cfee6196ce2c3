"""The plugin of vLLM against a stand-in of its interface; PEFT is the oracle of the outputs."""

import asyncio
import copy
import sys
import tomllib
import types
from pathlib import Path

import peft
import pytest
import torch
import transformers

import vera_fx
from tests.helpers import assert_close, assert_far_apart, fill_vectors
from tests.models import BY_NAME
from vera_fx.engines import vllm as engine


class Request:
    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str) -> None:
        self.name, self.number, self.path = lora_name, lora_int_id, lora_path


class Registry:
    def __init__(self) -> None:
        self.resolvers: dict = {}

    def register_resolver(self, name: str, resolver: object) -> None:
        self.resolvers[name] = resolver


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    registry = Registry()
    contents = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": Request},
        "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": registry},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "adapters").mkdir()
    monkeypatch.setenv(engine.ADAPTERS, str(tmp_path / "adapters"))
    monkeypatch.setenv(engine.CACHE, str(tmp_path / "cache"))
    return registry


@pytest.fixture
def saved(tmp_path: Path) -> tuple:
    family = BY_NAME["llama"]
    base = family.build().eval()
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(r=6, **family.config))
    fill_vectors(model)
    vera_fx.save_adapter(model, tmp_path / "adapters" / "mine")
    return base, family.inputs(), str(tmp_path / "base")


def logits(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def resolve(registry: Registry, base: str, name: str) -> Request | None:
    return asyncio.run(registry.resolvers["vera_fx"].resolve_lora(base, name))


def test_peft_loads_what_vllm_is_given(registry: Registry, saved: tuple, tmp_path: Path) -> None:
    base, inputs, folder = saved
    engine.register()
    request = resolve(registry, folder, "mine")
    again = resolve(registry, folder, "mine")
    assert request is not None
    assert again is not None
    assert (request.path, request.number) == (again.path, again.number)
    lora = peft.PeftModel.from_pretrained(copy.deepcopy(base), request.path).eval()
    vera = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapters/mine").eval()
    assert_close(logits(lora, inputs), logits(vera, inputs), factor=5)
    assert_far_apart(logits(lora, inputs), logits(base, inputs))


def test_a_smaller_rank_is_said(
    registry: Registry, saved: tuple, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setenv(engine.MAX_RANK, "4")
    engine.register()
    request = resolve(registry, saved[2], "mine")
    assert request is not None
    assert peft.LoraConfig.from_pretrained(request.path).r == 4
    assert "r=6 to rank 4 loses at most" in caplog.text


def test_what_lora_has_not_is_refused_every_time(
    registry: Registry, saved: tuple, tmp_path: Path
) -> None:
    base, _, folder = saved
    config = vera_fx.VeraConfig(r=6, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = vera_fx.adapt(copy.deepcopy(base), config)
    vera_fx.save_adapter(model, tmp_path / "adapters" / "headed")
    engine.register()
    for _ in range(2):
        with pytest.raises(vera_fx.VeraFxError, match="saved modules"):
            resolve(registry, folder, "headed")
    assert resolve(registry, folder, "mine") is not None


def test_a_second_request_converts_nothing(
    registry: Registry, saved: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.register()
    first = resolve(registry, saved[2], "mine")
    monkeypatch.setattr(engine, "load_adapter", None)
    again = resolve(registry, saved[2], "mine")
    assert first is not None
    assert again is not None
    assert first.path == again.path


def test_damaged_files_and_missing_bases_are_the_users_errors(
    registry: Registry, saved: tuple, tmp_path: Path
) -> None:
    engine.register()
    with pytest.raises(vera_fx.ConfigError, match="cannot be loaded from local files"):
        resolve(registry, str(tmp_path / "nowhere"), "mine")
    (tmp_path / "adapters" / "mine" / "adapter_config.json").write_text("{")
    with pytest.raises(vera_fx.CheckpointError, match="not valid JSON"):
        resolve(registry, saved[2], "mine")


def test_vllm_finds_it_by_its_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    place = project["entry-points"]["vllm.general_plugins"]["vera_fx"]
    assert place == f"{engine.__name__}:{engine.register.__name__}"


@pytest.mark.parametrize("name", ["other", "../adapters/mine", ""])
def test_other_names_are_not_ours(registry: Registry, saved: tuple, name: str) -> None:
    engine.register()
    assert resolve(registry, saved[2], name) is None


def test_a_wrong_rank_is_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine.MAX_RANK, "1024")
    with pytest.raises(vera_fx.VeraFxError, match="1 to 512, got '1024'"):
        engine.register()
    assert not registry.resolvers
