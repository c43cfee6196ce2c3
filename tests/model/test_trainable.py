"""What trains: adapters made or loaded in inference mode, and beside an active one."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import vera_fx
from tests.helpers import fill_vectors
from tests.models import MLP

X = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))
CONFIG = vera_fx.VeraConfig(
    r=4, target_modules=["lin0"], modules_to_save=["lin1"], bias="vera_only"
)


def _base() -> nn.Module:
    torch.manual_seed(0)
    return MLP().eval()


def _adapted(folder: Path) -> nn.Module:
    return vera_fx.adapt(_base(), CONFIG)


def _added(folder: Path) -> nn.Module:
    model = vera_fx.adapt(_base(), CONFIG, adapter_name="first")
    vera_fx.add_adapter(model, "default", CONFIG)
    vera_fx.set_adapter(model, "default")
    return model


def _loaded(folder: Path) -> nn.Module:
    return vera_fx.load_adapter(_base(), folder, trainable=True)


def _joined(folder: Path) -> nn.Module:
    model = vera_fx.adapt(_base(), CONFIG, adapter_name="first")
    vera_fx.load_adapter(model, folder, trainable=True)
    vera_fx.set_adapter(model, "default")
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = vera_fx.adapt(_base(), CONFIG)
    fill_vectors(model)
    return vera_fx.save_adapter(model, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("make", [_adapted, _added, _loaded, _joined])
def test_what_is_made_in_inference_mode_trains(
    make: Callable[[Path], nn.Module], saved: Path
) -> None:
    expected = make(saved)
    with torch.inference_mode():
        model = make(saved)
        assert torch.equal(model(X), expected(X))

    tensors = [*model.vera.parameters(), *model.vera.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)
    losses = []
    for each in (model, expected):
        each.train()
        trained = [p for p in each.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        torch.manual_seed(1)
        each(X).square().sum().backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(each.eval()(X))
    assert torch.equal(*losses)


def test_an_adapter_loaded_to_train_beside_an_active_one_requires_gradients(saved: Path) -> None:
    model = vera_fx.adapt(_base(), CONFIG, adapter_name="first")
    vera_fx.load_adapter(model, saved, adapter_name="second", trainable=True)
    second = list(model.vera.adapters["second"].parameters())
    before = copy.deepcopy(second)

    assert vera_fx.active_adapters(model) == ["first"]
    assert all(p.requires_grad for p in second)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    vera_fx.set_adapter(model, "second")
    model(X).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(second, before, strict=True))
    # From then on it goes with the active ones, as in PEFT.
    vera_fx.set_adapter(model, "first")
    assert not any(p.requires_grad for p in second)


def test_an_adapter_loaded_for_inference_requires_none(saved: Path) -> None:
    model = vera_fx.adapt(_base(), CONFIG, adapter_name="first")
    vera_fx.load_adapter(model, saved, adapter_name="second")
    vera_fx.set_adapter(model, "second")

    assert not any(p.requires_grad for p in model.vera.adapters["second"].parameters())


def test_a_saved_module_of_the_model_is_the_bases_and_the_copy_is_the_adapters() -> None:
    """``model.head.weight`` never means an adapter's tensor, whichever is active."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    before = base[1].weight.clone()
    config = vera_fx.VeraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    model = vera_fx.adapt(base, config)
    copied = model.vera.adapter("default").copies.by_path["1"]
    with torch.no_grad():
        copied.weight.add_(1)
    assert torch.equal(model[1].weight, before)
    x = torch.randn(2, 5)
    vectors = model.vera.adapter("default").vectors.by_path["0"].tensors
    assert not vectors["vera_lambda_b"].any()  # at first a branch adds nothing
    torch.testing.assert_close(model(x), base[0](x) @ (before + 1).T + base[1].bias)
