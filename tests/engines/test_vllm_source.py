"""The plugin in vLLM's own classes: `resolver.py`, `request.py` and `peft_helper.py` of its `vllm/lora`.

``VLLM_SOURCE=folder`` names unpacked sources (or where vLLM is installed); without it this is skipped.
The files are loaded alone, in the place of a vLLM that would need its kernels; they need ``msgspec``.
"""

import asyncio
import importlib.util
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.engines.test_vllm import logits
from tests.engines.test_vllm import saved as saved  # noqa: PLC0414
from vera_fx.engines import vllm as engine

SOURCE = os.environ.get("VLLM_SOURCE")
pytestmark = pytest.mark.skipif(SOURCE is None, reason="VLLM_SOURCE names no sources of vLLM")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """vLLM's registry of resolvers, from its own file."""
    if importlib.util.find_spec("msgspec") is None:
        pytest.skip("msgspec is not installed")
    stands_in: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.config": {},
        "vllm.config.lora": {"LoRAConfig": object},
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.tensorizer": {"TensorizerConfig": object},
    }
    for name, values in stands_in.items():
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[name]).update(values)
    for part in ("request", "resolver", "peft_helper"):
        name = f"vllm.lora.{part}"
        path = Path(SOURCE or "") / "vllm" / "lora" / f"{part}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    monkeypatch.setenv(engine.ADAPTERS, str(tmp_path / "adapters"))
    monkeypatch.setenv(engine.CACHE, str(tmp_path / "cache"))
    return sys.modules["vllm.lora.resolver"].LoRAResolverRegistry


def test_the_plugin_is_a_resolver_of_vllm(registry: Any, saved: tuple) -> None:
    import peft

    base, inputs, folder = saved
    engine.register()
    assert registry.get_supported_resolvers() == {"vera_fx"}
    resolver = registry.get_resolver("vera_fx")
    assert isinstance(resolver, sys.modules["vllm.lora.resolver"].LoRAResolver)
    found = asyncio.run(resolver.resolve_lora(folder, "mine"))
    assert type(found) is sys.modules["vllm.lora.request"].LoRARequest
    assert found.lora_name == "mine"
    assert 0 < found.lora_int_id < 1 << 31
    # vLLM reads one rank and one alpha for all modules, and no pattern of PEFT's.
    helper = sys.modules["vllm.lora.peft_helper"].PEFTHelper.from_local_dir(found.lora_path, 4096)
    helper.validate_legal(types.SimpleNamespace(max_lora_rank=6))
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        helper.validate_legal(types.SimpleNamespace(max_lora_rank=5))
    config = peft.LoraConfig.from_pretrained(found.lora_path)
    assert not config.rank_pattern
    assert not config.alpha_pattern
    assert helper.vllm_lora_scaling_factor == config.lora_alpha / config.r
    plain = logits(base, inputs).clone()
    theirs = peft.PeftModel.from_pretrained(base, found.lora_path).eval()
    assert not (logits(theirs, inputs) - plain).abs().max() < 1e-3
    assert asyncio.run(resolver.resolve_lora(folder, "none")) is None
