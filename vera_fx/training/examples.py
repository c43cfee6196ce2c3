"""Examples of a job: in which order they come, and how rows of several jobs become one batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vera_fx.errors import ConfigError
from vera_fx.training.row_losses import IGNORED
from vera_fx.training.settings import TrainSettings

Example = Mapping[str, Any]
"""One row without its batch dimension: tensors, lists of numbers or numbers, by the model's arguments."""

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Example]], Mapping[str, Tensor]]


class Examples(Protocol):
    """A dataset: what has a length and gives examples by number (a list, a ``datasets.Dataset``)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Order:
    """Which examples each step of a job takes. A function of settings and step, so nothing to save."""

    def __init__(self, settings: TrainSettings, size: int) -> None:
        """Args: the settings, and how many examples there are."""
        self._settings, self._size = settings, size
        self._epochs: dict[int, list[int]] = {}

    def at(self, step: int) -> list[int]:
        """The numbers of the examples of step ``step``: epochs follow each other without a gap."""
        first = step * self._settings.batch_size
        return [self._number(place) for place in range(first, first + self._settings.batch_size)]

    def _number(self, place: int) -> int:
        epoch, at = divmod(place, self._size)
        if not self._settings.shuffle:
            return at
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            generator = torch.Generator().manual_seed((self._settings.seed << 24) + epoch)
            self._epochs[epoch] = torch.randperm(self._size, generator=generator).tolist()
        return self._epochs[epoch][at]


def length_of(example: Example) -> int:
    """How many tokens an example has: its longest list."""
    sizes = [
        len(v) for v in example.values() if not isinstance(v, Tensor) and hasattr(v, "__len__")
    ]
    sizes += [len(v) for v in example.values() if isinstance(v, Tensor) and v.ndim]
    return max(sizes, default=1)


def packed(lengths: Sequence[int], most: int | None) -> list[list[int]]:
    """Rows in passes of at most ``most`` tokens with their padding, each of rows of like length.

    Args:
        lengths: tokens of each row.
        most: None for one pass with all rows, in the order in which they came.

    Returns:
        The numbers of each pass's rows. A row longer than ``most`` has a pass to itself.
    """
    if most is None:
        return [list(range(len(lengths)))]
    passes: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[passes[-1][0]] if passes else 0
        if not passes or (len(passes[-1]) + 1) * longest > most:
            passes.append([])
        passes[-1].append(row)
    return passes


def padding_for(pad_token: int | None) -> Collate:
    """What makes a batch of examples by padding on the right, as Hugging Face's models take them.

    ``attention_mask`` is padded by 0, lists of ``labels`` by -100, ``input_ids`` by the pad token, and
    all else by 0.

    Args:
        pad_token: the model's; None for 0.
    """
    fills = {"labels": IGNORED, "input_ids": pad_token or 0}

    def collate(examples: Sequence[Example]) -> Batch:
        keys = examples[0].keys()
        if any(example.keys() != keys for example in examples):
            found = sorted({tuple(sorted(example)) for example in examples})
            raise ConfigError(
                f"examples of one batch have different fields: {found[:3]}; let all jobs have the same"
            )
        return {key: _stacked(key, [e[key] for e in examples], fills.get(key, 0)) for key in keys}

    return collate


def _stacked(key: str, values: Sequence[Any], fill: int) -> Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    if tensors[0].ndim == 1 and len({len(t) for t in tensors}) > 1:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
    try:
        return torch.stack(tensors)
    except RuntimeError as error:
        shapes = sorted({tuple(t.shape) for t in tensors})
        raise ConfigError(
            f"the examples' {key!r} have the shapes {shapes[:3]} and cannot be padded to one; give "
            "train_many a collate function"
        ) from error
