"""One adapter: its branch's tensors for every target, and its own copies of what else it trains."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from vera_fx.branches.kinds import kind_of
from vera_fx.branches.protocol import BranchKind
from vera_fx.config import AdapterConfig


def everywhere(path: str) -> str:
    """The place of a copy that stands for every use of a tensor, inside its module and elsewhere."""
    return f"{path}."


def is_everywhere(path: str) -> bool:
    """True for such a place."""
    return path.endswith(".")


class Vectors(nn.Module):
    """The trained tensors of one target, as parameters under the names that their kind gives them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return cast("dict[str, Tensor]", self._parameters)

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        return ", ".join(f"{name}={tuple(t.shape)}" for name, t in self.tensors.items())


class TrainedBias(nn.Module):
    """An adapter's own copy of one module's bias, ``(out,)``."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())


class Tree(nn.Module):
    """Modules kept under the paths they serve, so that parameter names read like the model's.

    Attributes:
        by_path: the modules by path.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_path: dict[str, nn.Module] = {}

    def put(self, path: str, module: nn.Module) -> None:
        """Hang ``module`` at ``path``, with plain containers for the segments between."""
        *parents, name = path.split(".")
        # Through _modules: add_module refuses segments such as "type" that nn.Module defines.
        children = self._modules
        for segment in parents:
            container = children.get(segment) or nn.Module()
            children[segment] = container
            children = container._modules
        children[name] = module
        self.by_path[path] = module

    def extra_repr(self) -> str:
        """A count, so that ``print(model)`` stays readable."""
        return f"{len(self.by_path)} entries"


@dataclass(slots=True)
class Folded:
    """What it takes to get an adapter out of the base again: as it was when it went in.

    Attributes:
        vectors: copies of its vectors by target path.
        kept: what base tensors were before, by their path: weights that are not computed back, and
            whatever the adapter has a copy of.
        exact: whether weights are kept.
        stored: what called modules held their weights in, by target path.
    """

    vectors: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    kept: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    exact: bool = False
    stored: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


class Adapter(nn.Module):
    """A named branch for some targets, with its own copies of saved modules and trained biases.

    Attributes:
        config: what it was made from.
        projections: the key of its projections in the bank.
        trainable: False for an adapter loaded for inference, which never trains.
        learning: whether it trains, when it is not resting inside ``disable_adapters``.
        vectors: `Vectors` by target path.
        copies: modules trained in full (``modules_to_save``) and `TrainedBias`, by module path.
        origin: what its files said of the base that it was trained on, if it was loaded.
        frozen: paths of those copies that never train and stand for every use of the base's tensors.
    """

    def __init__(self, config: AdapterConfig, projections: str, *, trainable: bool = True) -> None:
        super().__init__()
        self.config = config
        self.projections = projections
        self.trainable = trainable
        self.learning = False
        self.vectors = Tree()
        self.copies = Tree()
        self.frozen: set[str] = set()
        self.origin: dict[str, str] = {}

    @property
    def kind(self) -> BranchKind:
        """The kind of its branches."""
        return kind_of(self.config)

    def vectors_at(self, path: str) -> Vectors | None:
        """The tensors for one target, or None if this adapter has none there."""
        found = self.vectors.by_path.get(path)
        return found if isinstance(found, Vectors) else None

    def copied_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """``(module path, tensor name, tensor)`` of everything that replaces a base tensor."""
        for path, module in self.copies.by_path.items():
            for named in (module.named_parameters(), module.named_buffers()):
                yield from ((path, name, tensor) for name, tensor in named)

    @property
    def copied(self) -> dict[str, Tensor]:
        """The same tensors by the path of what each replaces; frozen ones `everywhere` as well."""
        copies = list(self.copied_tensors())
        frozen = ((everywhere(path), name, t) for path, name, t in copies if path in self.frozen)
        return {f"{path}.{name}": tensor for path, name, tensor in (*copies, *frozen)}

    def has(self, path: str) -> bool:
        """Whether it has a branch at the target, or its own value of the tensor, at ``path``."""
        return path in self.vectors.by_path or path in self.copied

    def let_train(self, *, allowed: bool, now: bool = True) -> None:
        """Train from now on, or no more. One that was loaded for inference never does.

        Args:
            allowed: whether it trains.
            now: False inside ``disable_adapters``, where nothing requires gradients until it ends.
        """
        if self.trainable:
            self.learning = allowed
            # Not self.requires_grad_: a walk by names costs several times the flags themselves.
            for vectors in self.vectors.by_path.values():
                for parameter in vectors._parameters.values():
                    cast("Tensor", parameter).requires_grad = allowed and now
            self.copies.requires_grad_(allowed and now)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return (
            f"Adapter({self.kind.name}, r={self.config.r}, targets={len(self.vectors.by_path)}, "
            f"copies={len(self.copies.by_path)}, parameters={count:,}, trainable={self.trainable})"
        )
