"""Models that are containers: the bank is a submodule, but never a layer."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import (
    assert_close,
    assert_far_apart,
    fill_vectors,
    hook_reference,
    vectors_of,
)

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
CONFIG = vera_fx.VeraConfig(r=4, target_modules=["0", "2"])


class Chain(nn.Module):
    """Counts, indexes and iterates over its modules, and is no container of torch's."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> nn.Module:
        return list(self.children())[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Stack(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Named(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = layer(x)
        return x


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)]


BUILD: dict[str, Any] = {
    "Sequential": lambda: nn.Sequential(*layers()),
    "ModuleList": lambda: Stack(layers()),
    "ModuleDict": lambda: Named({str(i): layer for i, layer in enumerate(layers())}),
    "own": lambda: Chain(*layers()),
}


@pytest.fixture(params=BUILD)
def base(request: pytest.FixtureRequest) -> nn.Module:
    return BUILD[request.param]()


@pytest.fixture
def model(base: nn.Module) -> nn.Module:
    model = vera_fx.adapt(copy.deepcopy(base), CONFIG)
    fill_vectors(model)
    return model


def test_the_bank_is_no_element(base: nn.Module, model: nn.Module) -> None:
    assert len(model) == 3
    assert [type(m) for m in model.children()] == [nn.Linear, nn.Tanh, nn.Linear]
    assert list(model._modules) == list(base._modules)
    if isinstance(model, nn.ModuleDict):
        assert list(model.keys()) == ["0", "1", "2"]
    else:
        assert isinstance(model[-1], nn.Linear)
        assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]


def test_outputs_and_gradients_are_right(base: nn.Module, model: nn.Module) -> None:
    oracle = hook_reference(base, model)

    assert_far_apart(model(X), base(X))
    assert_close(model(X), oracle(X))
    vectors = list(vectors_of(model).values())
    expected = torch.autograd.grad(oracle(X).square().sum(), vectors)
    for ours, value in zip(
        torch.autograd.grad(model(X).square().sum(), vectors), expected, strict=True
    ):
        assert_close(ours, value, factor=10)


def test_slices_are_plain_and_stay_adapted(model: nn.Module) -> None:
    if isinstance(model, nn.ModuleDict | Chain):
        pytest.skip("has no slices")
    head = model[:2]

    assert type(head) in {nn.Sequential, Stack}
    assert len(head) == 2
    assert_close(model[2](head(X)), model(X))


def test_changing_the_elements_counts_them_right(model: nn.Module) -> None:
    if isinstance(model, nn.ModuleDict):
        model["3"] = nn.ReLU()
    elif isinstance(model, Chain):
        model.add_module("3", nn.ReLU())
    else:
        model.append(nn.ReLU())

    assert list(model._modules) == ["0", "1", "2", "3"]
    assert model(X).min() >= 0
    if isinstance(model, nn.Sequential):
        del model[3]
        model.insert(1, nn.Identity())
        assert list(model._modules) == ["0", "1", "2", "3"]
        assert isinstance(model[-1], nn.Linear)


def test_parameters_and_buffers_are_found(model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]

    assert [n for n in names if not n.startswith("vera.")] == [
        "0.weight", "0.bias", "2.weight", "2.bias",
    ]  # fmt: skip
    assert len([n for n in names if n.startswith("vera.")]) == len(vectors_of(model)) == 4
    assert {id(p) for p in model.vera.parameters()} < {id(p) for p in model.parameters()}
    assert [n for n, _ in model.named_buffers()] == [
        "vera.projections.0.vera_A", "vera.projections.0.vera_B",
    ]  # fmt: skip
    assert model.get_submodule("vera") is model.vera
    assert model.vera in list(model.modules())
    outer = nn.ModuleDict({"inner": model})
    assert [n.removeprefix("inner.") for n, _ in outer.named_parameters()] == names
    assert len(list(nn.ModuleList([model, model]).modules())) == 1 + len(list(model.modules()))
    everything = list(nn.ModuleList([model, model]).named_modules(remove_duplicate=False))
    assert len(everything) == 1 + 2 * len(list(model.named_modules(remove_duplicate=False)))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_state_dicts_go_there_and_back(model: nn.Module, nested: bool, assign: bool) -> None:
    fresh = vera_fx.adapt(copy.deepcopy(vera_fx.unload(copy.deepcopy(model))), CONFIG)
    source, target = model, fresh
    if nested:
        source, target = nn.ModuleDict({"m": model}), nn.ModuleDict({"m": fresh})
    fresh(X)
    state = source.state_dict()
    result = target.load_state_dict(state, assign=assign)

    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_close(fresh(X), model(X))
    assert set(state) == {n for n, _ in source.named_parameters()} | {
        n for n, _ in source.named_buffers()
    }


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_that_does_not_fit_is_refused(model: nn.Module, nested: bool) -> None:
    outer: nn.Module = nn.ModuleDict({"m": model}) if nested else model
    prefix = "m.vera." if nested else "vera."
    vector = f"{prefix}adapters.default.vectors.0.vera_lambda_b"
    state = OrderedDict(outer.state_dict())
    lacking = OrderedDict((k, v) for k, v in state.items() if k != vector)
    with pytest.raises(RuntimeError, match=f'Missing key.*"{vector}"'):
        outer.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{prefix}other"'):
        outer.load_state_dict({**state, f"{prefix}other": X})
    with pytest.raises(RuntimeError, match="size mismatch"):
        outer.load_state_dict({**state, vector: torch.ones(7)})
    result = outer.load_state_dict({**lacking, f"{prefix}other": X}, strict=False)

    assert result.missing_keys == [vector]
    assert result.unexpected_keys == [f"{prefix}other"]


def test_casts_modes_and_gradients_reach_the_bank(model: nn.Module) -> None:
    expected = model(X)
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(X.double()).dtype == torch.float64
    assert_close(model.float()(X), expected)
    model.eval()
    assert not any(m.training for m in model.modules())
    model.train()
    assert all(m.training for m in model.modules())
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in vectors_of(model).values())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(requires_grad=False)
    assert not any(p.requires_grad for p in model.parameters())


def test_copies_and_pickles_have_a_bank_of_their_own(model: nn.Module) -> None:
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(twin) == 3
        assert twin.vera is not model.vera
        assert_close(twin(X), model(X))
        vera_fx.set_adapter(twin, ())
        assert_far_apart(twin(X), model(X))


def test_compiled_and_switched_without_compiling_again(model: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(X), model(X))
    vera_fx.add_adapter(model, "other", vera_fx.VeraConfig(r=7, target_modules=["0"]))
    vera_fx.set_adapter(model, "other")
    fill_vectors(model)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        assert_close(compiled(X), model(X))


def test_merged_exported_saved_and_unloaded(model: nn.Module, tmp_path: Any) -> None:
    expected, keys = model.eval()(X), list(model.state_dict())
    program = vera_fx.export_program(model, (X,))
    assert_close(program.module()(X), expected)
    vera_fx.save_adapter(model, tmp_path)
    vera_fx.merge(model)
    assert_close(model(X), expected, factor=4)
    vera_fx.unmerge(model)
    plain = vera_fx.unload(model)
    assert list(plain.state_dict()) == [key for key in keys if not key.startswith("vera.")]
    assert "vera" not in plain.__dict__
    assert_close(vera_fx.load_adapter(plain, tmp_path)(X), expected)


def test_a_batch_mixes_adapters(model: nn.Module) -> None:
    model.eval()
    mixed = model(X, adapter_names=["default", "__base__", "default"])

    assert_close(mixed[0], model(X)[0])
    with vera_fx.disable_adapters(model):
        assert_close(mixed[1], model(X)[1])


def test_a_model_that_runs_in_python_never_calls_the_bank() -> None:
    class Halting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(x)
                if x.sum() * 0 > 1:
                    break
            return x

    plain = Halting(*layers())
    model = vera_fx.adapt(copy.deepcopy(plain), CONFIG)
    fill_vectors(model)
    with pytest.warns(vera_fx.PartialCaptureWarning):
        assert_close(model(X), hook_reference(plain, model)(X))


def test_sentence_transformers(tmp_path: Any) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    torch.manual_seed(0)
    dense = modules.Dense(8, 5)
    model = SentenceTransformer(modules=[dense, modules.Normalize()], device="cpu")
    features = {"sentence_embedding": torch.randn(2, 8)}
    expected = model(dict(features))["sentence_embedding"]
    vera_fx.adapt(model, vera_fx.VeraConfig(r=3, target_modules=["linear"]))

    assert [type(m).__name__ for m in model] == ["Dense", "Normalize"]
    assert_close(model(dict(features))["sentence_embedding"], expected)
    fill_vectors(model)
    assert_far_apart(model(dict(features))["sentence_embedding"], expected)
    model.save(str(tmp_path), create_model_card=False)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["0_Dense", "1_Normalize"]
    vera_fx.unload(model)
    assert_close(model(dict(features))["sentence_embedding"], expected)
