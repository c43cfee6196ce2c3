"""Small models that move the rows of a batch about, as real ones do, with linear layers in between.

Every step takes and gives ``(B, T, W)``; in between, positions of all rows are reshaped, moved,
repeated or joined, and a linear layer that adapters may target runs there.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, TOKENS = 4, 6

Linear = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Linear], Tensor]


def plain(x: Tensor, linear: Linear) -> Tensor:
    return linear(x).tanh()


def heads(x: Tensor, linear: Linear) -> Tensor:
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (x, linear(x), x.sin()))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def linear_in_heads(x: Tensor, linear: Linear) -> Tensor:
    """A layer that runs on ``(B, heads, T, W)``."""
    y = linear(torch.stack([x, x.cos(), x.sin()], 1))
    return (y.softmax(-2) * y).sum(1)


def flat_tokens(x: Tensor, linear: Linear) -> Tensor:
    return linear(x.reshape(-1, WIDTH)).reshape(x.shape).sin()


def tokens_first(x: Tensor, linear: Linear) -> Tensor:
    return linear(x.transpose(0, 1)).transpose(0, 1).tanh()


def flat_tokens_first(x: Tensor, linear: Linear) -> Tensor:
    """Flattened with the rows as the faster index, as sequence-first models do."""
    flat = linear(x.transpose(0, 1).reshape(-1, WIDTH))
    return flat.view(x.shape[1], x.shape[0], WIDTH).transpose(0, 1)


def beams(x: Tensor, linear: Linear) -> Tensor:
    """Every row several times in place, as beam search has it."""
    return linear(x.repeat_interleave(3, 0)).view(-1, 3, TOKENS, WIDTH).amax(1)


def expanded(x: Tensor, linear: Linear) -> Tensor:
    y = linear(x.unsqueeze(1).expand(-1, 2, -1, -1).reshape(-1, TOKENS, WIDTH))
    return y.unflatten(0, (-1, 2)).mean(1)


def tiled(x: Tensor, linear: Linear) -> Tensor:
    """All rows over and over."""
    return linear(x.repeat(2, 1, 1)).view(2, -1, TOKENS, WIDTH).sum(0).tanh()


def class_token(x: Tensor, linear: Linear) -> Tensor:
    first = torch.ones(1, 1, WIDTH, dtype=x.dtype).expand(x.shape[0], -1, -1)
    return linear(torch.cat([first, x], 1))[:, 1:] + linear(x[:, 0]).unsqueeze(1)


def patches(x: Tensor, linear: Linear) -> Tensor:
    """Tokens cut into patches through an image, as vision models do."""
    image = x.transpose(1, 2).reshape(-1, WIDTH, 2, TOKENS // 2)
    return linear(image.flatten(2).transpose(1, 2)).sin()


def windows(x: Tensor, linear: Linear) -> Tensor:
    """Windows of tokens as a batch of their own, as Swin has it."""
    rows, half = x.shape[0], x.shape[1] // 2
    cut = x.view(rows, 2, half, WIDTH).flatten(0, 1)
    mixed = linear(cut).softmax(1) * cut
    return mixed.view(rows, 2, half, WIDTH).reshape(rows, 2 * half, WIDTH)


def cross(x: Tensor, linear: Linear) -> Tensor:
    """Attention from what is the same for all rows to what is not, as a decoder's first step."""
    queries = torch.linspace(-1, 1, TOKENS * WIDTH, dtype=x.dtype).view(1, TOKENS, WIDTH)
    scores = queries @ linear(x).transpose(1, 2)
    return scores.softmax(-1) @ x


def pooled(x: Tensor, linear: Linear) -> Tensor:
    return x * linear(x.mean(1)).sigmoid().unsqueeze(1)


def split(x: Tensor, linear: Linear) -> Tensor:
    a, b = linear(x).chunk(2, -1)
    return torch.cat([a * b.sigmoid(), b], -1)


def shifted(x: Tensor, linear: Linear) -> Tensor:
    return linear(F.pad(x, (0, 0, 1, 0))[:, :-1]) + x.roll(1, 1).cumsum(1) * x.flip(1)


def grouped(x: Tensor, linear: Linear) -> Tensor:
    """Channels in groups, as UNet and wav2vec2 have them; with tokens behind them and without."""
    scale = torch.linspace(0.5, 2, WIDTH, dtype=x.dtype)
    y = F.group_norm(linear(x).transpose(1, 2), 2, scale, scale.sin()).transpose(1, 2)
    return y + F.group_norm(linear(x[:, 0]), 2).unsqueeze(1)


def sorted_tokens(x: Tensor, linear: Linear) -> Tensor:
    order = x.sum(-1, keepdim=True).argsort(1).expand(-1, -1, WIDTH)
    return linear(x.gather(1, order)).tanh()


def last_token(x: Tensor, linear: Linear) -> Tensor:
    """The token picked by number in every row, as sequence classifiers do."""
    picked = x[torch.arange(x.shape[0]), x.sum(-1).argmax(-1)]
    return x + linear(picked).unsqueeze(1)


KEEPING: dict[str, Step] = {
    step.__name__: step
    for step in (
        plain, heads, linear_in_heads, flat_tokens, tokens_first, flat_tokens_first, beams, expanded, tiled,
        class_token, patches, windows, cross, pooled, split, shifted, grouped, sorted_tokens, last_token,
    )
}  # fmt: skip
"""Steps that keep every position with one row."""


def turned(x: Tensor, linear: Linear) -> Tensor:
    return linear(x.flip(0)).flip(0)


def centred(x: Tensor, linear: Linear) -> Tensor:
    return linear(x - x.mean(0))


def paired(x: Tensor, linear: Linear) -> Tensor:
    """Neighbouring rows as one."""
    both = torch.cat([x, x[:1]])[1:]
    return linear(x + both)


def attends_to_rows(x: Tensor, linear: Linear) -> Tensor:
    y = x.transpose(0, 1)
    return linear(F.scaled_dot_product_attention(y, y, y).transpose(0, 1))


def grouped_rows(x: Tensor, linear: Linear) -> Tensor:
    """The rows where group_norm takes channels."""
    return linear(F.group_norm(x.transpose(0, 1), 2).transpose(0, 1))


def untold(x: Tensor, linear: Linear) -> Tensor:
    """Reshaped so that no dimension holds the rows any more."""
    return linear(x.reshape(2, -1, WIDTH).cumsum(1)).reshape(x.shape)


LOSING: dict[str, Step] = {
    step.__name__: step for step in (turned, centred, paired, attends_to_rows, grouped_rows, untold)
}
"""Steps whose layer reads positions that depend on several rows, or on no row that can be told."""


class Program(nn.Module):
    """Runs its steps in order, each with a layer of its own."""

    def __init__(self, steps: Sequence[str]) -> None:
        super().__init__()
        self.steps = tuple(steps)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in steps)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in zip(self.steps, self.layers, strict=True):
            x = (KEEPING | LOSING)[name](x, layer)
        return x
