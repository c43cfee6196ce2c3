"""VeRA adapters by a graph pass: adapt, train, compile, save; interchangeable with PEFT."""

from vera_fx._moved import know_old_names
from vera_fx.branches.dvora.config import DVoraConfig
from vera_fx.branches.vera.config import VeraConfig
from vera_fx.caching.captures import capture_cache
from vera_fx.checkpoint.loading import load_adapter
from vera_fx.checkpoint.lora import lora_errors, to_lora
from vera_fx.checkpoint.pretrained import pretrained_methods
from vera_fx.checkpoint.saving import save_adapter, save_adapters
from vera_fx.checkpoint.state_dict import (
    adapter_state_dict,
    load_adapter_state_dict,
)
from vera_fx.checkpoint.store import AdapterStore, StoreCounts
from vera_fx.errors import (
    AdapterError,
    CaptureCacheWarning,
    CaptureError,
    CheckpointError,
    ConfigError,
    ExportError,
    FixedSizesWarning,
    LengthError,
    PartialCaptureWarning,
    PassError,
    RequantisedWarning,
    TargetError,
    VeraFxError,
)
from vera_fx.export.aoti import export_aoti
from vera_fx.export.executorch import export_executorch, export_executorch_data
from vera_fx.export.files import load_program, save_program
from vera_fx.export.onnx import export_onnx
from vera_fx.export.program import export_program
from vera_fx.export.read_back import program_sites, replace_adapter
from vera_fx.export.vectors import program_vectors
from vera_fx.folding.merging import merge, unmerge
from vera_fx.graphs.calibrate import calibrate
from vera_fx.model.adapt import adapt, capture, refresh, unload
from vera_fx.model.adapters import (
    ParameterSummary,
    active_adapters,
    adapter_names,
    add_adapter,
    delete_adapter,
    disable_adapters,
    parameter_summary,
    set_adapter,
    set_trainable,
    train_adapters,
)
from vera_fx.model.groups import parameter_groups
from vera_fx.model.methods import also
from vera_fx.model.on_paper import PaperMemory, memory_on_paper
from vera_fx.products.registered import register_base_product
from vera_fx.report.explain import explain
from vera_fx.training.results import TrainResults
from vera_fx.training.row_losses import RowLosses, row_losses
from vera_fx.training.settings import TrainSettings
from vera_fx.training.train_many import train_many

__version__ = "0.1.0"

know_old_names()
also(pretrained_methods)

__all__ = [
    "AdapterError",
    "AdapterStore",
    "CaptureCacheWarning",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DVoraConfig",
    "ExportError",
    "FixedSizesWarning",
    "LengthError",
    "PaperMemory",
    "ParameterSummary",
    "PartialCaptureWarning",
    "PassError",
    "RequantisedWarning",
    "RowLosses",
    "StoreCounts",
    "TargetError",
    "TrainResults",
    "TrainSettings",
    "VeraConfig",
    "VeraFxError",
    "active_adapters",
    "adapt",
    "adapter_names",
    "adapter_state_dict",
    "add_adapter",
    "calibrate",
    "capture",
    "capture_cache",
    "delete_adapter",
    "disable_adapters",
    "explain",
    "export_aoti",
    "export_executorch",
    "export_executorch_data",
    "export_onnx",
    "export_program",
    "load_adapter",
    "load_adapter_state_dict",
    "load_program",
    "lora_errors",
    "memory_on_paper",
    "merge",
    "parameter_groups",
    "parameter_summary",
    "program_sites",
    "program_vectors",
    "refresh",
    "register_base_product",
    "replace_adapter",
    "row_losses",
    "save_adapter",
    "save_adapters",
    "save_program",
    "set_adapter",
    "set_trainable",
    "to_lora",
    "train_adapters",
    "train_many",
    "unload",
    "unmerge",
]
