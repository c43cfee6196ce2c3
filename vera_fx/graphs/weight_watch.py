"""Looks at what a forward that runs in Python does with the tensors of targets.

Graphs find every use of a target's weight. Where a forward runs in Python, branches are added by
the hooks of the modules that it calls, and a weight that is used without its module's call would
silently miss its branch. A watch refuses such a use.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vera_fx._context import holding, modules_inside, now
from vera_fx._torch import tree_flatten, without_mode
from vera_fx.bank.bank import AdapterBank, adapted_paths
from vera_fx.base.sharding import is_distributed
from vera_fx.errors import TargetError


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Inside the block every use of every tensor is right, and costs nothing."""
    with holding("unwatched", value=True), without_mode(WeightWatch):
        yield


class WeightWatch(TorchFunctionMode):
    """Inside the ``with`` block, tensors of adapted modules may be used by their own calls only.

    Raises:
        TargetError: from the operator that uses one elsewhere.
    """

    def __init__(self, model: nn.Module, bank: AdapterBank, inside: str = "") -> None:
        """Args: the model, its bank, and the path below which targets are looked at."""
        super().__init__()
        self._owners = dict(_tensors(model, bank, f"{inside}." if inside else ""))

    def __bool__(self) -> bool:
        """False if there is nothing to look at: where no tensor of a target is whole now."""
        return bool(self._owners)

    def __enter__(self) -> "WeightWatch":
        self._before = list(modules_inside())
        modules_inside().clear()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        modules_inside()[:] = self._before

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``, unless it makes something of a tensor that it should not have."""
        result = func(*args, **(kwargs or {}))
        if not now("unwatched"):
            self._check(func, args, kwargs or {}, result)
        return result

    def _check(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        for value in (*args, *kwargs.values()):
            for part in value if isinstance(value, list | tuple) else (value,):
                owner = self._owners.get(id(part)) if isinstance(part, Tensor) else None
                if owner is not None and self._is_misused(func, owner, result):
                    raise TargetError(
                        f"{owner!r} is adapted, and a forward that runs in Python uses one of its "
                        f"tensors in {getattr(func, '__name__', func)} without calling the module, "
                        f"so that the adapter would be left out; exclude {owner!r} from the targets, "
                        "or call the module"
                    )

    def _is_misused(self, func: Any, owner: str, result: Any) -> bool:
        if any(owner == path or owner.startswith(f"{path}.") for path in modules_inside()):
            return False
        if func is F.embedding:  # of a weight that is tied to a target's
            return False
        if getattr(func, "__name__", "").endswith("_") and self._owners.get(id(result)) == owner:
            return False  # written to, not computed with: RWKV scales weights between modes
        # Sizes, dtypes and the like are no tensors.
        return any(isinstance(leaf, Tensor) for leaf in tree_flatten(result)[0])


def _tensors(model: nn.Module, bank: AdapterBank, prefix: str) -> Iterator[tuple[int, str]]:
    """Every tensor of the adapted modules with that prefix, by identity, and the module's path.

    Without those of which a process has a part only: nothing computes with these by mistake.
    """
    for path in (p for p in adapted_paths(bank) if p.startswith(prefix)):
        module = model.get_submodule(path)
        for named in (module.named_parameters(), module.named_buffers()):
            yield from ((id(t), path) for _, t in named if not is_distributed(t))
