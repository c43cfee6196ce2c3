"""Everything about a new adapter that the model and its configuration decide, before it is built."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vera_fx.base.modules import base_modules
from vera_fx.base.targets import with_default_targets
from vera_fx.branches.kinds import kind_of
from vera_fx.branches.protocol import BranchKind
from vera_fx.config import AdapterConfig
from vera_fx.errors import TargetError, listing, nearest, shown
from vera_fx.passes import OPEN, Target
from vera_fx.products.kinds import place_of, style_of
from vera_fx.products.opaque import is_opaque

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a new adapter is.

    Attributes:
        config: the configuration.
        targets: the targets by path.
        places: dtype and device of each target's weight.
        saved: paths of the modules trained in full.
        biases: paths of the modules whose bias trains.
        autocast: keep vectors and projections of half-precision bases in float32, as PEFT does.
    """

    config: AdapterConfig
    targets: Mapping[str, Target]
    places: Mapping[str, tuple[torch.dtype, torch.device]]
    saved: tuple[str, ...]
    biases: tuple[str, ...]
    autocast: bool = True

    @property
    def kind(self) -> BranchKind:
        """The kind of its branches."""
        return kind_of(self.config)

    @property
    def sizes(self) -> tuple[int, int]:
        """``(max_in, max_out)`` over the targets."""
        targets = self.targets.values()
        return max(t.in_features for t in targets), max(t.out_features for t in targets)

    @property
    def home(self) -> torch.device:
        """Where the adapter's tensors go: the device of the targets."""
        return home(next(iter(self.places.values()))[1])

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a tensor beside a weight of ``dtype``."""
        return torch.float32 if self.autocast and dtype in _HALF else dtype


def home(device: torch.device) -> torch.device:
    """Beside the weight, or on the CPU while the weight has no values."""
    return torch.device("cpu") if device.type == "meta" else device


def blueprint(
    model: nn.Module,
    config: AdapterConfig,
    targets: Mapping[str, Target],
    *,
    autocast: bool = True,
) -> Blueprint:
    """Find what the adapter trains beside its vectors.

    Raises:
        TargetError: ``modules_to_save`` names a module that does not exist, or the targets are
            spread over devices.
    """
    config = with_default_targets(model, config)
    _check_plan(config, targets)
    _check_cuts(config, targets)
    saved = _saved_modules(model, config)
    places = {path: place_of(model, path) for path in targets}
    trained = [t.device for path in saved for t in model.get_submodule(path).parameters()]
    used = [*(device for _, device in places.values()), *trained]
    devices = {str(device) for device in used if device.type != "meta"}
    if len(devices) > 1:
        raise TargetError(
            f"the targets and saved modules lie on several devices ({listing(sorted(devices))}); "
            "vera_fx adapts models that are on one device"
        )
    biases = _bias_modules(model, config, targets, saved)
    _check_copied(model, saved, biases)
    return Blueprint(config, targets, places, saved, biases, autocast)


def _check_copied(model: nn.Module, saved: tuple[str, ...], biases: tuple[str, ...]) -> None:
    """Refuse to train copies of what only a module's own code reads."""
    for path in biases:
        if style_of(model.get_submodule(path)) is not None:
            raise TargetError(
                f"an adapter cannot train the bias of {path!r}, which is under tensor parallelism; use "
                "bias='none'"
            )
    for parent in saved:
        for path, module in model.get_submodule(parent).named_modules(prefix=parent):
            if is_opaque(module):
                raise TargetError(
                    f"modules_to_save cannot train a copy of {path!r}: quantised weights "
                    f"({type(module).__name__}) do not train; keep it from being quantised"
                )


def _check_plan(config: AdapterConfig, targets: Mapping[str, Target]) -> None:
    """Refuse a plan asked for by name that a target has no way to follow."""
    products = {path: target.product for path, target in targets.items()}
    lacking = [p for p, product in products.items() if config.plan not in {*product.plans, *OPEN}]
    if lacking:
        product = products[lacking[0]]
        raise TargetError(
            f"plan={config.plan!r} reads the base's weight, and that of {lacking[0]!r} "
            f"({getattr(product, 'make', 'its module')}) is read by its own module alone; use 'auto', "
            f"or one of {', '.join(map(repr, product.plans))}"
        )


def _check_cuts(config: AdapterConfig, targets: Mapping[str, Target]) -> None:
    """Refuse what cannot be computed beside products that are cut over processes."""
    cut = next((path for path, target in targets.items() if target.cut is not None), None)
    if cut is None:
        return
    kind = kind_of(config)
    if kind.not_cut:
        raise TargetError(
            f"{cut!r} is under tensor parallelism, beside which {kind.name} is not computed: {kind.not_cut}; "
            "use fully_shard (FSDP2), which gathers weights"
        )
    if config.dropout and not config.inference_mode:
        raise TargetError(
            f"{cut!r} is under tensor parallelism, where each process would drop other elements of the "
            f"branch's input than the next (dropout {config.dropout}); use a dropout of 0"
        )


def _saved_modules(model: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Paths of the modules to save: PEFT matches the end of the path, with or without a dot."""
    modules = base_modules(model)
    for name in config.named_modules_to_save:
        if not any(path.endswith(name) for path in modules):
            names = {path.rpartition(".")[2] for path in modules}
            raise TargetError(
                f"modules_to_save names {shown(name)}, which is no module{nearest(name, names)}"
            )
    found: list[str] = []
    for path in modules:
        inside = any(path.startswith(f"{parent}.") for parent in found)
        if not inside and any(path.endswith(name) for name in config.saved_modules):
            found.append(path)
    return tuple(found)


def _bias_modules(
    model: nn.Module, config: AdapterConfig, targets: Mapping[str, Target], saved: tuple[str, ...]
) -> tuple[str, ...]:
    if config.trains_biases == "none":
        return ()
    if config.trains_biases == "all" and isinstance(model._parameters.get("bias"), Tensor):
        raise TargetError(
            f"bias='all' would train the parameter 'bias' of the {type(model).__name__} itself, which "
            f"no adapter can have a copy of; use bias={config.biases[2]!r}, or let a module hold it"
        )
    modules = base_modules(model)
    paths = list(targets) if config.trains_biases == "targets" else list(modules)
    return tuple(
        path
        for path in paths
        if isinstance(modules[path]._parameters.get("bias"), Tensor)
        and not any(path == parent or path.startswith(f"{parent}.") for parent in saved)
    )
