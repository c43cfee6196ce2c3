"""The weight that is computed again in backward is the one that was kept, and so are its gradients."""

import torch

from vera_fx.branches.dvora.functions import dvora_weight, dvora_weight_again


def test_the_weight_and_its_gradients_are_those_of_the_one_that_is_kept() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"weight": (7, 5), "A": (3, 5), "B": (7, 3), "d": (3,), "b": (7,), "m": (7,)}
    given = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    up = torch.randn(7, 5, generator=generator)

    found = []
    for weight_of in (dvora_weight, dvora_weight_again):
        trained = {key: given[key].clone().requires_grad_() for key in "dbm"}
        weight = weight_of(*{**given, **trained}.values())
        (weight * up).sum().backward()
        found.append([weight.detach(), *(trained[key].grad for key in "dbm")])

    for kept, again in zip(*found, strict=True):
        assert kept.abs().min() > 0
        torch.testing.assert_close(again, kept)
