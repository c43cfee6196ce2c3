"""Dtypes of vectors, projections, products and outputs, against PEFT 0.21.2."""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import adapter_vectors, assert_close, assert_far_apart, fill_adapters, loss_of
from tests.model.parity_training import DTYPES, TARGETS, X, both
from tests.models import MLP
from vera_fx.passes import PLANS


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return MLP()


class TestDtypes:
    """PEFT's ``autocast_adapter_dtype``, for the first adapter and for one that is added."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("autocast", [True, False])
    def test_vectors_projections_and_outputs(
        self, base: nn.Module, dtype: torch.dtype, autocast: bool
    ) -> None:
        theirs, ours = both(base.to(dtype).eval(), autocast=autocast, names=("a", "b"))
        fill_adapters(theirs), fill_adapters(ours)
        x, kept = X.to(dtype), torch.float32 if autocast else dtype

        assert {p.dtype for p in adapter_vectors(ours).values()} == {kept}
        assert {p.dtype for p in adapter_vectors(theirs).values()} == {kept}
        (pair,) = ours.vera.projections.values()
        assert torch.equal(pair.vera_A, theirs.base_model.vera_A["a"])
        assert torch.equal(pair.vera_B, theirs.base_model.vera_B["a"])
        for names in (["a"], ["b"], ["b", "a"]):
            theirs.base_model.set_adapter(names)
            vera_fx.set_adapter(ours, names)
            expected = theirs(x)
            assert expected.dtype == dtype
            assert torch.equal(ours(x), expected), names
            assert_far_apart(expected.float(), base(x).float())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("autocast", [True, False])
    def test_gradients(self, base: nn.Module, dtype: torch.dtype, autocast: bool) -> None:
        theirs, ours = both(base.to(dtype).eval(), autocast=autocast)
        fill_adapters(theirs), fill_adapters(ours)
        for model in (theirs, ours):
            loss_of(model(X.to(dtype)).float()).backward()
        for key, value in adapter_vectors(theirs).items():
            assert_close(adapter_vectors(ours)[key].grad, value.grad, factor=5, what=str(key))

    @pytest.mark.parametrize("casts", [(True, False), (False, True)])
    def test_adapters_of_different_dtypes_on_one_base(
        self, base: nn.Module, casts: tuple[bool, bool]
    ) -> None:
        """Each has projections of its own dtype, though their values are equal."""
        theirs, ours = both(base.bfloat16().eval(), autocast=casts, names=("a", "b"))
        fill_adapters(theirs), fill_adapters(ours)
        assert len(ours.vera.projections) == 2
        for names in (["a"], ["b"], ["a", "b"], ["b", "a"]):
            theirs.base_model.set_adapter(names)
            vera_fx.set_adapter(ours, names)
            assert torch.equal(ours(X.bfloat16()), theirs(X.bfloat16())), names

    def test_under_autocast_a_site_returns_what_its_linear_returns(self, base: nn.Module) -> None:
        """PEFT casts the result to the input's dtype, so that the model goes on in float32."""
        theirs, ours = both(base.eval())
        fill_adapters(theirs), fill_adapters(ours)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain, expected, actual = base(X), theirs(X), ours(X)
        assert (plain.dtype, actual.dtype) == (torch.bfloat16, torch.bfloat16)
        assert expected.dtype == torch.float32
        assert_close(actual, expected.bfloat16(), factor=1)

    @pytest.mark.parametrize("plan", ["auto", "factored"])
    def test_the_branch_of_a_half_base_runs_in_its_dtype(
        self, plan: str, base: nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What PEFT's ``disable_input_dtype_casting`` is for, and fails to do for VeRA."""
        theirs, _ = both(base.bfloat16().eval())
        with (
            pytest.raises(AttributeError, match="cast_input_dtype_enabled"),
            peft.helpers.disable_input_dtype_casting(theirs),
        ):
            theirs(X.bfloat16())
        monkeypatch.setattr("vera_fx.graphs.planning.multiplies_well", lambda *_: True)
        config = vera_fx.VeraConfig(r=4, target_modules=TARGETS, plan=plan)
        model = vera_fx.adapt(copy.deepcopy(base).bfloat16(), config)
        seen = dtypes_of_products(model, X.bfloat16())
        # Base, x @ A.T and h @ B.T of both targets; or the merged product and x @ A.T.
        count = 6 if plan == "factored" else 4
        assert len(seen) == count
        expected = {torch.bfloat16} | ({torch.float32} if plan == "factored" else set())
        assert set(seen) == expected

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    @pytest.mark.parametrize("plan", PLANS)
    def test_every_plan_runs_on_a_half_base(
        self, base: nn.Module, dtype: torch.dtype, plan: str
    ) -> None:
        outputs = []
        for chosen in (plan, "factored"):
            config = vera_fx.VeraConfig(r=4, target_modules=TARGETS, plan=chosen)
            model = vera_fx.adapt(copy.deepcopy(base).to(dtype).eval(), config)
            fill_adapters(model)
            outputs.append(model(X.to(dtype)))
            outputs[-1].float().sum().backward()
            assert all(p.grad.abs().sum() > 0 for p in adapter_vectors(model).values())
        assert_close(*outputs)

    def test_a_cast_after_the_first_call_leads_to_another_graph(self) -> None:
        """Token ids have no dtype that would tell; the captured float32 graph must not run."""

        class Words(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.lin = nn.Embedding(9, 6), nn.Linear(6, 4)

            def forward(self, ids: Tensor) -> Tensor:
                h = self.embed(ids)
                return self.lin(h * torch.rsqrt(h.float().square().mean(-1, True)).to(h.dtype))

        ids = torch.arange(9)
        model = Words().eval()
        config = vera_fx.VeraConfig(r=3, target_modules=["lin"], plan="factored")
        half = vera_fx.adapt(copy.deepcopy(model).bfloat16(), config, autocast_adapter_dtype=False)
        vera_fx.adapt(model, config)
        fill_adapters(model), fill_adapters(half)
        first = model(ids)
        for dtype, expected in ((torch.bfloat16, half(ids)), (torch.float32, first)):
            model.to(dtype)
            assert model(ids).dtype == dtype
            assert_close(model(ids).bfloat16(), expected.bfloat16())
        assert len(vera_fx.explain(model).graphs) == 2

    def test_pefts_helper_for_mixed_precision_works_on_ours(self, base: nn.Module) -> None:
        """It casts the frozen base and leaves what trains in float32, through ``.data``."""
        theirs, ours = both(base.eval())
        ours(X)
        for model in (theirs, ours):
            fill_adapters(model)
            peft.utils.other.cast_mixed_precision_params(model, torch.bfloat16)
        x = X.bfloat16()

        assert {p.dtype for p in adapter_vectors(ours).values()} == {torch.float32}
        assert torch.equal(ours(x), theirs(x))


def dtypes_of_products(model: nn.Module, x: Tensor) -> list[torch.dtype]:
    """The dtype of everything that the adapted graph multiplies with a matrix."""
    from vera_fx.branches.vera.functions import merged_linear
    from vera_fx.graphs.runtime import runtime_of

    model(x)
    (captures,) = runtime_of(model).kept.captures.values()
    (variants,) = captures[0].variants.values()
    (variant,) = variants.values()
    products = {torch.ops.aten.linear.default, merged_linear}
    nodes = [n for n in variant.graph.graph.nodes if n.target in products]
    return [node.args[0].meta["val"].dtype for node in nodes]
