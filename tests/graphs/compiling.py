"""What ``torch.compile`` is held to: whole graphs, and no recompiles after the first change."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import vera_fx
from tests.helpers import assert_close, loss_of, main_output
from tests.models import Family


def cut(value: Any, batch: int, length: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value[:batch]
    return value[:, :length] if value.ndim == 2 and value.dtype == torch.int64 else value


BACK_AND_FORTH = ((2, 7), (2, 5), (1, 7), (2, 7), (2, 1))
"""Batch and length of call after call, size 1 of either included."""


def calls(family: Family, sizes: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    inputs = family.inputs()
    sizes = sizes if "input_ids" in inputs else [size for size in sizes if size[1] > 1]
    for batch, length in sizes:
        yield {name: cut(value, batch, length) for name, value in inputs.items()}


def assert_fullgraph(
    family: Family,
    model: nn.Module,
    backend: str,
    *,
    sizes: Sequence[tuple[int, int]] = BACK_AND_FORTH,
    output: Callable[[Any], Tensor] = main_output,
) -> None:
    """Compile an adapted model and call it in both modes with all sizes, then all again."""
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def run(*, check: bool) -> None:
        for train in (True, False, True):
            model.train(train)
            for inputs in calls(family, sizes):
                torch.manual_seed(5)
                result = compiled(**inputs)
                if check and not train:
                    assert_close(output(result), output(model(**inputs)), factor=10)
                if train:
                    loss_of(result).backward()

    run(check=True)
    warm = counter.frame_count
    with torch.compiler.set_stance("fail_on_recompile"):
        run(check=False)

    signatures = len(vera_fx.explain(model).graphs)
    assert warm == counter.frame_count
    assert warm <= 2 * signatures, "more than one dynamic recompile per signature"
    assert not torch._dynamo.utils.counters["graph_break"]
