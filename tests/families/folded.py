"""An oracle for modules that read a target's weight without calling it, where hooks see nothing."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class FoldedReference:
    """``base`` with the branches of ``adapted`` in its weights: ``W + diag(b) B diag(d) A``.

    The vectors are those of ``adapted``, so gradients can be compared by parameter.
    """

    def __init__(self, base: nn.Module, adapted: nn.Module) -> None:
        self._base, self._adapted = base, adapted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        weights = dict(self._weights())
        return torch.func.functional_call(self._base, weights, args, kwargs)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        bank = self._adapted.vera
        adapter = bank.adapter("default")
        pair = bank.projections_of(adapter)
        for path in adapter.vectors.by_path:
            weight = self._base.get_submodule(path).weight
            out_features, in_features = weight.shape
            vectors = adapter.vectors_at(path)
            left = vectors.vera_lambda_b[:, None] * pair.vera_B[:out_features]
            right = vectors.vera_lambda_d[:, None] * pair.vera_A[:, :in_features]
            yield f"{path}.weight", weight.detach() + left @ right

    def train(self, mode: bool) -> None:
        self._base.train(mode)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._adapted.named_parameters()
