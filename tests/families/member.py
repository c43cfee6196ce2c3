"""One row of the matrix of families."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import main_output
from tests.models import BY_NAME, Family, text_inputs

COLUMNS = ("capture", "train", "generate", "compile", "export", "mixed")
"""What is checked for each family, in the order of the table."""


@dataclass(frozen=True)
class Member(Family):
    """A family, and what is known of it beforehand.

    Attributes:
        oracle: ``"peft"``, or ``"folded"`` where PEFT adapts targets without effect.
        output: what of a result has one row per row of the batch.
        limits: for each column that does not work, what its error must say.
        parts: why its forward, with the labels of training, runs in Python and its modules in graphs
            of their own; nothing if all of it becomes one graph.
    """

    oracle: str = "peft"
    output: Callable[[Any], Tensor] = main_output
    limits: Mapping[str, str] = field(default_factory=dict)
    parts: str = ""

    def call(self, model: Callable[..., Any], inputs: dict[str, Any] | None = None) -> Any:
        """Call a model, ours or PEFT's or the base, from one state of the random generator."""
        torch.manual_seed(5)
        inputs = self.inputs() if inputs is None else inputs
        # PEFT's wrapper of plain modules passes arguments on by position only.
        return model(**inputs) if hasattr(model, "config") else model(*inputs.values())

    def inference(self) -> dict[str, Any]:
        """The inputs of a call that computes no loss and returns no cache."""
        inputs = self.inputs()
        labels = inputs.pop("labels", None)
        inputs.pop("return_loss", None)
        if self.generates:
            inputs["use_cache"] = False
            if getattr(self.build().config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = labels
        return inputs


def known(name: str) -> Member:
    """A family that `tests.models` has already."""
    return Member(**vars(BY_NAME[name]))


def causal(name: str, kind: str, targets: Any = None, /, **config: Any) -> Member:
    """A decoder-only language model of transformers."""
    return of_transformers(name, kind, "ForCausalLM", text_inputs, targets, **config)


def of_transformers(
    name: str,
    kind: str,
    head: str,
    inputs: Callable[[], dict[str, Tensor]],
    targets: Any = None,
    /,
    **config: Any,
) -> Member:
    """A model of transformers: its configuration's class is ``kind`` and Config."""
    chosen = {} if targets is None else {"target_modules": targets}
    build = functools.partial(_build, kind, head, config)
    return Member(name, build, inputs, chosen, generates=head.startswith("ForC"))


def _build(kind: str, head: str, config: Mapping[str, Any]) -> nn.Module:
    import transformers

    settings = getattr(transformers, f"{kind}Config")(**config)
    return getattr(transformers, f"{kind.removesuffix('Text')}{head}")(settings)
