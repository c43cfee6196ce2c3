"""A plugin of vLLM: a request that names a VeRA adapter is served by the equal LoRA adapter.

vLLM is imported by `register` alone, which vLLM calls (entry point group ``vllm.general_plugins``).
"""

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vera_fx.checkpoint.loading import load_adapter
from vera_fx.checkpoint.lora import lora_errors, to_lora
from vera_fx.checkpoint.peft_config import parse_config
from vera_fx.disk.files import aside, flush, put
from vera_fx.disk.locks import locked
from vera_fx.errors import ConfigError, first_line

ADAPTERS = "VERA_FX_VLLM_ADAPTERS"
CACHE = "VERA_FX_VLLM_CACHE"
MAX_RANK = "VERA_FX_VLLM_MAX_RANK"
LARGEST = 512
"""The largest ``--max-lora-rank`` of vLLM."""
_PATIENCE = 600.0
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_log = logging.getLogger(__name__)


def register() -> None:
    """Register the resolver with vLLM; nothing where ``VERA_FX_VLLM_ADAPTERS`` is not set.

    Raises:
        ConfigError: a variable of the environment has a value that cannot be used.
    """
    adapters = os.environ.get(ADAPTERS)
    if not adapters:
        return
    folder, cache = Path(adapters), os.environ.get(CACHE)
    if not folder.is_dir() or not cache:
        raise ConfigError(
            f"{ADAPTERS} must be a folder of adapter folders and {CACHE} a folder to write to, got "
            f"{adapters!r} and {cache!r}; set both"
        )
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]
    from vllm.lora.resolver import (  # type: ignore[import-not-found]
        LoRAResolver,
        LoRAResolverRegistry,
    )

    rank, cached = _max_rank(), Path(cache)

    class VeraResolver(LoRAResolver):  # type: ignore[misc]
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            found = adapter_folder(folder, lora_name)
            if found is None:
                return None
            lora = await asyncio.to_thread(converted, base_model_name, found, cached, rank)
            number = _number(lora_name, lora.name)
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(lora))

    LoRAResolverRegistry.register_resolver("vera_fx", VeraResolver())


def _number(name: str, content: str) -> int:
    """What vLLM tells adapters apart by: another for every name and content, above 0, of 31 bits."""
    return (int(hashlib.sha256(f"{name} {content}".encode()).hexdigest()[:8], 16) >> 1) + 1


def _max_rank() -> int:
    text = os.environ.get(MAX_RANK, str(LARGEST))
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST:
        raise ConfigError(
            f"{MAX_RANK} must be vLLM's --max-lora-rank, 1 to {LARGEST}, got {text!r}"
        )
    return int(text)


def adapter_folder(folder: Path, name: str) -> Path | None:
    """The VeRA adapter of this name right inside ``folder``; None where there is none."""
    found = folder / name
    if Path(name).name != name or not all((found / file).is_file() for file in _FILES):
        return None
    config = _config(found)
    return found if config.get("peft_type") == "VERA" else None


def converted(base: str, adapter: Path, cache: Path, max_rank: int) -> Path:
    """The adapter as LoRA of at most ``max_rank``, from the cache or written there, whole.

    Args:
        base: folder or name of the base model; its weights are loaded, from local files alone.
        adapter: folder of the VeRA adapter.
        cache: folder of the converted ones, named by their content.
        max_rank: exact up to this rank; the nearest of this rank above it, with a warning.

    Raises:
        ConfigError: vLLM cannot serve the adapter as LoRA (DoRA, biases, saved modules).
        CheckpointError: the adapter cannot be read, or the LoRA cannot be written.
    """
    target = cache / _key(base, adapter, max_rank)
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{target.name}.lock", patience=_PATIENCE):
        if not target.is_dir():
            _convert(base, adapter, target, max_rank)
    return target


def _key(base: str, adapter: Path, max_rank: int) -> str:
    parts = [hashlib.sha256((adapter / name).read_bytes()).hexdigest() for name in _FILES]
    description = Path(base) / "config.json"
    parts += [hashlib.sha256(description.read_bytes()).hexdigest()] if description.is_file() else []
    return hashlib.sha256(json.dumps([base, max_rank, *parts]).encode()).hexdigest()


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / _FILES[0]
    return parse_config(path.read_bytes(), str(path))


def _convert(base: str, adapter: Path, target: Path, max_rank: int) -> None:
    import transformers

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the base model {base!r} cannot be loaded from local files: {first_line(error)}; serve it by "
            "its folder"
        ) from error
    adapted: Any = load_adapter(model, adapter)
    r = _config(adapter)["r"]
    rank = max_rank if r > max_rank else None
    if rank is not None:
        lost = max(lora_errors(adapted, rank).values(), default=0.0)
        _log.warning("%s: r=%d to rank %d loses at most %.3g", adapter, r, rank, lost)
    with aside(target.parent) as temporary:
        to_lora(adapted, temporary, rank=rank)
        _check(_config(temporary), adapter)
        for name in _FILES:
            flush(temporary / name)
        put(temporary, target)


def _check(lora: Mapping[str, Any], adapter: Path) -> None:
    if lora.get("use_dora") or lora["bias"] != "none" or lora["modules_to_save"]:
        raise ConfigError(
            f"{str(adapter)!r} has DoRA, biases or saved modules, which vLLM's LoRA has not; serve it "
            "in process, or merge it"
        )
