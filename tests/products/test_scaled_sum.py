"""The branch beside a called module: its hand-made gradients, differentiated again and by torch.func."""

import pytest
import torch
from torch import Tensor

from vera_fx.branches.vera.scaled import scaled_sum


def values() -> tuple[Tensor, ...]:
    """``total, z, d, b, B`` of three different sizes, in double precision."""
    torch.manual_seed(0)
    sizes = ((2, 3, 5), (2, 3, 4), (4,), (5,))
    made = (torch.randn(size, dtype=torch.double).requires_grad_() for size in sizes)
    return (*made, torch.randn(5, 4, dtype=torch.double))


def ours(*of: Tensor) -> Tensor:
    total, z, d, b, B = of
    return scaled_sum(total, z, B, d, b)


def by_hand(*of: Tensor) -> Tensor:
    """PEFT's order of operations."""
    total, z, d, b, B = of
    return total + ((z * d) @ B.T) * b


def test_first_and_second_derivatives() -> None:
    *trained, B = values()
    assert torch.autograd.gradcheck(lambda *of: ours(*of, B), trained)
    assert torch.autograd.gradgradcheck(lambda *of: ours(*of, B), trained)


def test_the_penalty_on_a_gradient_is_the_references() -> None:
    *trained, B = values()
    found = []
    for call in (ours, by_hand):
        first = torch.autograd.grad(call(*trained, B).sin().sum(), trained, create_graph=True)
        penalty = sum((grad**2).sum() for grad in first)
        assert isinstance(penalty, Tensor)
        found.append(torch.autograd.grad(penalty, trained))
    for one, other in zip(*found, strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other)


def test_gradients_by_torch_func_alone_and_one_by_one() -> None:
    *trained, B = values()
    trained = [value.detach() for value in trained]
    found = []
    for call in (ours, by_hand):
        grad = torch.func.grad(lambda *of, c=call: c(*of, B).sin().sum(), (0, 1, 2, 3))
        rows = torch.vmap(grad, (0, 0, None, None))(*trained)
        found.append((*grad(*trained), *rows))
    for one, other in zip(*found, strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other)


def test_forward_mode_is_refused() -> None:
    *trained, B = values()
    trained = [value.detach() for value in trained]
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda *of: ours(*of, B), tuple(trained), tuple(trained))
