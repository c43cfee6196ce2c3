"""What trains, from which values and with which dropout, against PEFT 0.21.2."""

import copy
import itertools
import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import adapter_vectors, assert_close, fill_adapters
from tests.model.parity_training import DTYPES, TARGETS, X, both
from tests.models import MLP


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return MLP()


class TestFirstValues:
    def test_random_vectors_are_drawn_in_pefts_order(self, base: nn.Module) -> None:
        torch.manual_seed(7)
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.VeraConfig(r=4, target_modules=TARGETS, init_weights=False)
        )
        after = torch.rand(3)
        torch.manual_seed(7)
        config = vera_fx.VeraConfig(r=4, target_modules=TARGETS, init_weights=False)
        ours = vera_fx.adapt(copy.deepcopy(base), config)

        assert torch.equal(torch.rand(3), after)
        expected = adapter_vectors(theirs)
        assert len(expected) == 4
        for key, value in adapter_vectors(ours).items():
            assert torch.equal(value, expected[key]), key

    def test_first_vectors_are_pefts(self, base: nn.Module) -> None:
        theirs, ours = both(base, d_initial=0.3)
        for key, value in adapter_vectors(ours).items():
            assert torch.equal(value, adapter_vectors(theirs)[key]), key

    def test_adapting_leaves_the_global_generator_alone(self, base: nn.Module) -> None:
        """PEFT draws vectors and throws them away, so that it shifts every later random number."""
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        vera_fx.adapt(base, vera_fx.VeraConfig(r=4, target_modules=TARGETS))
        assert torch.equal(torch.rand(3), expected)


class TestDropout:
    """``vera_dropout``: each branch of each site drops elements of its own copy of the input."""

    def test_masks_are_pefts_for_several_active_adapters(self, base: nn.Module) -> None:
        theirs, ours = both(base, names=("a", "b"), vera_dropout=0.4)
        fill_adapters(theirs), fill_adapters(ours)
        theirs.base_model.set_adapter(["b", "a"])
        vera_fx.set_adapter(ours, ["b", "a"])
        for mode in (True, False):
            theirs.train(mode), ours.train(mode)
            torch.manual_seed(2)
            expected = theirs(X)
            torch.manual_seed(2)
            assert torch.equal(ours(X), expected)

    @pytest.fixture
    def identities(self) -> nn.Module:
        """Two sites side by side and two adapters, whose branch is the input times 1 or 1000.

        A and B are identities, so that the output tells what each branch kept of its input.
        """

        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = (nn.Linear(50, 50, bias=False) for _ in range(2))

            def forward(self, x: Tensor) -> Tensor:
                return torch.stack([self.left(x), self.right(x)])

        model = Two()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        config = vera_fx.VeraConfig(r=50, target_modules=["left", "right"], vera_dropout=0.3)
        vera_fx.adapt(model, config, adapter_name="one")
        vera_fx.add_adapter(model, "thousand")
        (pair,) = model.vera.projections.values()
        with torch.no_grad():
            pair.vera_A.copy_(torch.eye(50)), pair.vera_B.copy_(torch.eye(50))
            for (adapter, _, _), vector in adapter_vectors(model).items():
                vector.fill_(1.0 if adapter == "one" else math.sqrt(1000))
        vera_fx.set_adapter(model, ["one", "thousand"])
        return model.train()

    def masks(self, model: nn.Module, rows: int) -> Tensor:
        """``(adapters, sites, rows, 50)``: which elements were kept."""
        total = (model(torch.ones(rows, 50)).detach() * 0.7).round()
        assert set(total.unique().tolist()) <= {0.0, 1.0, 1000.0, 1001.0}
        return torch.stack([total % 1000, total // 1000]).bool()

    def check_independent(self, masks: Tensor) -> None:
        """Every mask keeps 70 %, and every two agree as often as independent ones do."""
        flat = masks.flatten(0, 1).flatten(1).float()
        count = flat.shape[1]
        slack = 4.5 / math.sqrt(count)  # standard deviations below 0.5 each
        assert ((flat.mean(1) - 0.7).abs() < slack * 0.46).all()
        for first, second in itertools.combinations(flat, 2):
            agree = (first == second).float().mean()
            assert abs(agree - (0.7**2 + 0.3**2)) < slack * 0.5
        rows = masks[0, 0].float()
        assert abs((rows[0::2] == rows[1::2]).float().mean() - 0.58) < slack * math.sqrt(2) * 0.5

    def test_masks_are_independent(self, identities: nn.Module) -> None:
        torch.manual_seed(11)
        first = self.masks(identities, 400)
        self.check_independent(first)
        assert not torch.equal(self.masks(identities, 400), first)
        torch.manual_seed(11)
        assert torch.equal(self.masks(identities, 400), first)
        identities.eval()
        assert (identities(torch.ones(2, 50)).round() == 1001).all()

    def test_compiled_masks_are_independent_and_repeat_by_seed(
        self, identities: nn.Module, fresh_dynamo: Any
    ) -> None:
        compiled = torch.compile(identities, fullgraph=True)
        torch.manual_seed(11)
        first = self.masks(compiled, 400)
        self.check_independent(first)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert not torch.equal(self.masks(compiled, 400), first)
            torch.manual_seed(11)
            assert torch.equal(self.masks(compiled, 400), first)

    def test_compiled_gradients_use_the_masks_of_the_forward(
        self, identities: nn.Module, fresh_dynamo: Any
    ) -> None:
        """``lambda_b``'s gradient counts what its branch kept: the mask is drawn once per call."""
        vera_fx.set_adapter(identities, "one")
        compiled = torch.compile(identities, fullgraph=True, backend="aot_eager")
        y = compiled(torch.ones(40, 50))
        y.sum().backward()
        for site, output in zip(("left", "right"), y.detach(), strict=True):
            grad = adapter_vectors(identities)["one", site, "b"].grad
            assert_close(grad, output.sum(0), factor=5)


class TestCounts:
    def test_pefts_numbers(self) -> None:
        """PEFT's own test expects 532 of 752 (tests/test_tuners_utils.py)."""

        class Small(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin0, self.lin1 = nn.Linear(10, 10), nn.Linear(10, 10)

            def forward(self, x: Tensor) -> Tensor:
                return self.lin1(self.lin0(x))

        model = vera_fx.adapt(Small(), vera_fx.VeraConfig(target_modules=TARGETS))
        summary = vera_fx.parameter_summary(model)
        assert (summary.trainable, summary.total) == (532, 752)
        line = "trainable params: 532 || all params: 752 || trainable%: 70.7447"
        assert str(summary) == line

    @pytest.mark.parametrize(
        ("kind", "sizes", "fields", "millions"),
        [
            ("Roberta", (768, 3072, 12), {"r": 1024}, "0.043"),
            ("Roberta", (1024, 4096, 24), {"r": 256}, "0.061"),
            ("GPT2", (1024, 4096, 24), {"r": 1024}, "0.098"),
            ("Llama", (4096, 11008, 32), {"r": 256, "target_modules": "all-linear"}, "1.417"),
            ("Llama", (4096, 11008, 32), {"r": 1024, "target_modules": "all-linear"}, "1.589"),
            ("Llama", (5120, 13824, 40), {"r": 1024, "target_modules": "all-linear"}, "2.417"),
        ],
    )
    def test_the_papers_numbers(
        self, kind: str, sizes: tuple[int, int, int], fields: dict, millions: str
    ) -> None:
        """arXiv 2310.11454: 0.043M and 0.061M (GLUE), 0.098M (E2E), 1.4M, 1.6M and 2.4M (Llama)."""
        model = on_meta(kind, *sizes)
        vera_fx.adapt(model, vera_fx.VeraConfig(**fields))
        assert f"{vera_fx.parameter_summary(model).trainable / 1e6:.3f}" == millions

    def test_a_meta_model_counts_as_in_peft(self) -> None:
        fields = {"r": 1024, "target_modules": "all-linear"}
        theirs = peft.get_peft_model(on_meta("Llama", 4096, 11008, 2), peft.VeraConfig(**fields))
        ours = vera_fx.adapt(on_meta("Llama", 4096, 11008, 2), vera_fx.VeraConfig(**fields))
        summary = vera_fx.parameter_summary(ours)
        assert (summary.trainable, summary.total) == theirs.get_nb_trainable_parameters()


def on_meta(kind: str, width: int, inner: int, layers: int) -> nn.Module:
    """A transformers model of these sizes without any values."""
    import transformers

    values = {
        "Roberta": {
            "hidden_size": width,
            "num_attention_heads": 16,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
        },
        "Llama": {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers},
        "GPT2": {"n_embd": width, "n_inner": inner, "n_layer": layers, "n_head": 16},
    }
    config = getattr(transformers, f"{kind}Config")(**values[kind])
    endings = {"Roberta": "Model", "Llama": "ForCausalLM", "GPT2": "LMHeadModel"}
    with torch.device("meta"):
        return getattr(transformers, f"{kind}{endings[kind]}")(config)


class TestWhatTrains:
    """Only active adapters that may train do, through every switch."""

    def training(self, model: nn.Module) -> set[str]:
        return {key[0] for key, p in adapter_vectors(model).items() if p.requires_grad}

    def test_added_adapters_are_frozen_until_they_are_active(self, base: nn.Module) -> None:
        theirs, ours = both(base, names=("a", "b"))
        assert self.training(ours) == self.training(theirs) == {"a"}
        theirs.set_adapter("b"), vera_fx.set_adapter(ours, "b")
        assert self.training(ours) == self.training(theirs) == {"b"}
        theirs.base_model.set_adapter(["a", "b"]), vera_fx.set_adapter(ours, ["a", "b"])
        assert self.training(ours) == self.training(theirs) == {"a", "b"}
        assert not any(p.requires_grad for n, p in ours.named_parameters() if "vera." not in n)

    def test_set_trainable(self, base: nn.Module) -> None:
        theirs, ours = both(base, names=("a", "b"))
        theirs.set_requires_grad("a", False), vera_fx.set_trainable(ours, "a", trainable=False)
        assert self.training(ours) == self.training(theirs) == set()
        vera_fx.set_adapter(ours, ["a", "b"])
        assert self.training(ours) == {"b"}  # it stays so, which PEFT forgets with every switch
        with vera_fx.disable_adapters(ours):
            pass
        assert self.training(ours) == {"b"}
        vera_fx.set_trainable(ours, ["a", "b"])
        assert self.training(ours) == {"a", "b"}
        with pytest.raises(vera_fx.AdapterError, match="called 'c'"):
            vera_fx.set_trainable(ours, ["a", "c"], trainable=False)
        assert self.training(ours) == {"a", "b"}

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_only_the_active_adapter_changes_in_a_step(
        self, base: nn.Module, dtype: torch.dtype
    ) -> None:
        _, ours = both(base.to(dtype), names=("a", "b"))
        fill_adapters(ours)
        before = {name: p.detach().clone() for name, p in ours.named_parameters()}
        optimizer = torch.optim.SGD((p for p in ours.parameters() if p.requires_grad), lr=0.1)
        ours(X.to(dtype)).float().square().sum().backward()
        optimizer.step()
        changed = {n for n, p in ours.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in before if n.startswith("vera.adapters.a.")}
