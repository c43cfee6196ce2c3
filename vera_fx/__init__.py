"""VeRA adapters by a graph pass: adapt, train, compile, save; interchangeable with PEFT."""

from vera_fx.adapt import adapt, capture, unload
from vera_fx.adapters import (
    ParameterSummary,
    active_adapters,
    adapter_names,
    add_adapter,
    delete_adapter,
    disable_adapters,
    parameter_summary,
    set_adapter,
)
from vera_fx.checkpoint import (
    adapter_state_dict,
    load_adapter,
    load_adapter_state_dict,
    save_adapter,
)
from vera_fx.config import VeraConfig
from vera_fx.errors import (
    AdapterError,
    CaptureError,
    CheckpointError,
    ConfigError,
    TargetError,
    VeraFxError,
)
from vera_fx.explain import explain
from vera_fx.lora import to_lora
from vera_fx.merging import merge, unmerge

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "ParameterSummary",
    "TargetError",
    "VeraConfig",
    "VeraFxError",
    "active_adapters",
    "adapt",
    "adapter_names",
    "adapter_state_dict",
    "add_adapter",
    "capture",
    "delete_adapter",
    "disable_adapters",
    "explain",
    "load_adapter",
    "load_adapter_state_dict",
    "merge",
    "parameter_summary",
    "save_adapter",
    "set_adapter",
    "to_lora",
    "unload",
    "unmerge",
]
