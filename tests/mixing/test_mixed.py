"""Batches that mix adapters: every row as if its adapter had served it alone."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import vera_fx
from tests.helpers import assert_close, assert_far_apart, main_output
from tests.models import BY_NAME, FAMILIES, param_names
from tests.strategies import Case, cases

BASE = "__base__"


def fill_all(model: nn.Module) -> None:
    """Every adapter gets values of its own, trained copies included."""
    for number, name in enumerate(model.vera.adapters):
        generator = torch.Generator().manual_seed(number + 1)
        for parameter in model.vera.adapters[name].parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
            parameter.data.add_(noise.to(parameter.dtype))


def adapted(name: str) -> tuple[nn.Module, dict[str, Any]]:
    family = BY_NAME[name]
    torch.manual_seed(0)
    config = {"target_modules": "all-linear", **family.config, "plan": "factored"}
    model = vera_fx.adapt(
        family.build().eval(), vera_fx.VeraConfig(r=4, **config), adapter_name="a"
    )
    vera_fx.add_adapter(model, "b")
    vera_fx.add_adapter(model, "c", vera_fx.VeraConfig(r=3, projection_prng_key=7, **config))
    fill_all(model)
    inputs = {k: v for k, v in family.inputs().items() if k != "labels"}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model, inputs


def alone(model: nn.Module, name: str, inputs: dict[str, Any]) -> Tensor:
    """The whole batch by one adapter."""
    if name == BASE:
        with vera_fx.disable_adapters(model):
            return main_output(model(**inputs))
    vera_fx.set_adapter(model, name)
    return main_output(model(**inputs))


@pytest.mark.parametrize("name", param_names("mlp", "bert", "llama", "gpt2", "vit"))
def test_every_row_is_its_adapters(name: str) -> None:
    """Any rows of the input, in any order and number, under any adapters."""
    model, inputs = adapted(name)
    rows, names = next(iter(inputs.values())).shape[0], ("a", "b", "c", BASE)
    with torch.no_grad():
        results = {n: alone(model, n, inputs) for n in names}
    assert_far_apart(results["a"], results["b"])
    row = st.tuples(st.integers(0, rows - 1), st.sampled_from(names))

    @given(picked=st.lists(row, min_size=2, max_size=6))
    @example(picked=[(0, "a"), (1, BASE), (0, "b"), (1, "c"), (1, "a")])
    @settings(max_examples=12)
    def check(picked: list[tuple[int, str]]) -> None:
        index, asked = [number for number, _ in picked], [who for _, who in picked]
        batch = {key: value[index] for key, value in inputs.items()}
        with torch.no_grad():
            mixed = main_output(model(**batch, adapter_names=asked))
        for at, (number, who) in enumerate(picked):
            assert_close(mixed[at], results[who][number], what=f"{name}, row {number}, {who}")

    check()


@pytest.mark.parametrize("name", param_names("llama", among=[f for f in FAMILIES if f.generates]))
def test_generate_and_beam_search(name: str) -> None:
    model, inputs = adapted(name)
    inputs.pop("decoder_input_ids", None)
    names = ["a", BASE, "c"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        mixed = model.generate(**inputs, **options, **beams, adapter_names=names)
        each = mixed.shape[0] // len(names)
        different = 0
        for row, who in enumerate(names):
            vera_fx.set_adapter(model, "a" if who == BASE else who)
            model.vera.disabled = int(who == BASE)
            model.vera.bind()
            expected = model.generate(**inputs, **options, **beams)
            model.vera.disabled = 0
            model.vera.bind()
            here = slice(row * each, (row + 1) * each)
            assert torch.equal(mixed[here], expected[here])
            different += not torch.equal(mixed, expected)
        assert different  # the adapters do lead to other tokens


@given(case=cases(min_size=2, plans=("factored",)), data=st.data())
@settings(max_examples=25)
def test_random_models_row_by_row(case: Case, data: st.DataObject) -> None:
    if case.x.ndim < 2:
        return
    model = vera_fx.adapt(case.model.eval(), case.config, adapter_name="a")
    vera_fx.add_adapter(model, "b")
    fill_all(model)
    names = data.draw(
        st.lists(st.sampled_from(["a", "b", BASE]), min_size=len(case.x), max_size=len(case.x))
    )
    with torch.no_grad():
        mixed = model(case.x, adapter_names=names)
        for row, name in enumerate(names):
            assert_close(mixed[row], alone(model, name, {"x": case.x})[row], what=str(names))


def test_one_row() -> None:
    model, inputs = adapted("llama")
    single = {k: v[:1] for k, v in inputs.items()}
    with torch.no_grad():
        for name in ("a", "c", BASE):
            mixed = main_output(model(**single, adapter_names=[name]))
            assert_close(mixed, alone(model, name, single))


def test_no_recompile_for_any_mixture() -> None:
    """Whatever ranks, projections and targets are in it; also when adapters come and go."""
    model, inputs = adapted("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(**inputs, adapter_names=["a", "b", BASE])
        captures = len(list(model._vera_runtime.all_captures()))
        with torch.compiler.set_stance("fail_on_recompile"):
            for names in (["b", "b", "b"], [BASE, "a", "a"], ["c", "c", "c"], ["a", BASE, "c"]):
                mixed = compiled(**inputs, adapter_names=names).logits
                assert_close(mixed, model(**inputs, adapter_names=names).logits)
            vera_fx.add_adapter(model, "later")
            fill_all(model)
            late = compiled(**inputs, adapter_names=["later", "a", "b"]).logits
            vera_fx.delete_adapter(model, "b")
            compiled(**inputs, adapter_names=["later", "a", "c"])
    assert len(list(model._vera_runtime.all_captures())) == captures
    assert_close(late[0], alone(model, "later", inputs)[0].detach())


class Counted:
    """A small model under torch.compile that serves mixtures, each row checked."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.counter = CompileCounterWithBackend("aot_eager")
        module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).eval()
        self.model = vera_fx.adapt(module, self.config(), adapter_name="a")
        # Open sizes from the start, so that what is counted is graphs and not batch sizes.
        options = {"fullgraph": True, "dynamic": True, "backend": self.counter}
        self.compiled = torch.compile(self.model, **options)

    @staticmethod
    def config(**options: Any) -> vera_fx.VeraConfig:
        return vera_fx.VeraConfig(
            **{"r": 11, "target_modules": ["0"], "plan": "factored", **options}
        )

    def add(self, name: str, **options: Any) -> None:
        vera_fx.add_adapter(self.model, name, self.config(**options))
        fill_all(self.model)

    def check(self, *names: str) -> None:
        x = torch.randn(len(names), 4)
        with torch.no_grad():
            mixed = self.compiled(x, adapter_names=list(names))
            for row, name in enumerate(names):
                assert_close(mixed[row], alone(self.model, name, {"input": x})[row], what=name)

    def expect(self, graphs: int, *mixtures: str) -> None:
        """The mixtures, each a list of names, compile so many graphs in all."""
        before = self.counter.frame_count
        with torch.compiler.set_stance("default" if graphs else "fail_on_recompile"):
            for names in mixtures:
                self.check(*names.split())
        assert self.counter.frame_count - before == graphs


def test_a_graph_for_every_growth_of_the_bank_and_none_else() -> None:
    model = Counted()
    model.add("b")
    model.expect(1, "a b __base__", "b b a")
    model.add("head", modules_to_save=["2"])
    model.expect(1, "a head", "head head b a", "__base__ a b")
    model.add("bias", bias="all", r=13)
    model.expect(1, "a bias", "bias head b __base__ a", "head bias")
    model.add("wide", target_modules=["0", "2"])
    model.expect(1, "wide a", "head wide bias __base__", "bias a b")
    for name in ("wide", "head", "b"):
        vera_fx.delete_adapter(model.model, name)
        model.expect(0, "a bias", "__base__ bias a a")
    model.add("head", modules_to_save=["2"])
    model.add("wide", target_modules=["0", "2"])
    model.expect(0, "a bias head wide", "wide head", "a a")
    vera_fx.delete_adapter(model.model, "wide")
    model.add("seeded", projection_prng_key=3)
    model.expect(1, "a seeded", "seeded head bias", "a a")
    assert len(model.model.vera.structure.groups) == 3  # nothing is left of "wide"


def test_batches_of_any_size_with_heads_share_a_graph() -> None:
    model = Counted()
    model.add("head", modules_to_save=["2"])
    model.expect(1, "a head", "a head a")
    model.expect(0, "head a a head", "a head", "head __base__ a a a a head")
    graphs = vera_fx.explain(model.model).graphs
    mixed = [
        g
        for g in graphs
        if "rows have adapters of their own" in {str(why) for _, _, why in g.plans}
    ]
    assert len(mixed) == 1


def test_copies_and_biases_that_overlap_and_copies_of_what_others_target() -> None:
    model = Counted()
    model.add("head", modules_to_save=["2"])
    model.add("biases", bias="all")
    model.add("both", target_modules=["0", "2"], bias="vera_only")
    model.check("head", "biases", "both", "a", BASE, "both", "head")


class Flips(nn.Module):
    """Turns the batch around before the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).flip(0))


class SharedInput(nn.Module):
    """A target whose input is the same for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.lin = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lin(self.places).sum()


def test_mixtures_follow_casts_and_new_projections() -> None:
    model = Counted()
    model.add("b", projection_prng_key=3)
    model.check("a", "b", BASE)
    pair = model.model.vera.shared.pair("0")
    pair.vera_A = pair.vera_A * -2
    model.check("a", "b", BASE)
    plain = model.model.double()
    x, names = torch.randn(3, 4, dtype=torch.float64), ["a", BASE, "b"]
    with torch.no_grad():
        mixed = plain(x, adapter_names=names)
        for row, name in enumerate(names):
            assert_close(mixed[row], alone(plain, name, {"input": x})[row], what=name)


class Embeds(nn.Module):
    """An embedding that adapters may train, and a layer that they target."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lin = nn.Embedding(7, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.embed(x))


def test_an_adapter_that_cannot_be_mixed_disturbs_no_other() -> None:
    options = {"r": 2, "plan": "factored"}
    plain = vera_fx.VeraConfig(target_modules=["lin"], **options)
    x = torch.randint(0, 7, (3, 6))
    model = vera_fx.adapt(Embeds().eval(), plain, adapter_name="a")
    trained = vera_fx.VeraConfig(target_modules=["lin"], modules_to_save=["embed"], **options)
    vera_fx.add_adapter(model, "embeds", trained)
    vera_fx.add_adapter(model, "b")
    fill_all(model)
    with torch.no_grad():
        mixed = model(x, adapter_names=["a", BASE, "b"])
        for row, name in enumerate(["a", BASE, "b"]):
            assert_close(mixed[row], alone(model, name, {"x": x})[row], what=name)
        for _ in range(2):
            with pytest.raises(
                vera_fx.TargetError,
                match=r"adapter_names\[1\] is 'embeds', whose 'embed.weight'.*alone",
            ):
                model(x, adapter_names=["a", "embeds", "b"])
        alone(model, "embeds", {"x": x})
        assert_close(model(x[:1], adapter_names=["embeds"]), alone(model, "embeds", {"x": x[:1]}))


def test_rows_lost_behind_some_sites_leave_the_others() -> None:
    model = vera_fx.adapt(
        Flips().eval(), vera_fx.VeraConfig(r=2, target_modules=["first"]), adapter_name="a"
    )
    vera_fx.add_adapter(model, "b", vera_fx.VeraConfig(r=2, target_modules=["first", "second"]))
    fill_all(model)
    x = torch.randn(3, 4)
    mixed = model(x, adapter_names=["a", BASE, "a"])
    for row, name in enumerate(["a", BASE, "a"]):
        assert_close(mixed[2 - row], alone(model, name, {"x": x})[2 - row])
    with pytest.raises(vera_fx.TargetError, match=r"adapter_names\[2\] is 'b', whose 'second'"):
        model(x, adapter_names=["a", BASE, "b"])


@pytest.mark.parametrize(
    ("module", "targets", "reason"),
    [(Flips, ["second"], "across the rows"), (SharedInput, ["lin"], "same for every row")],
)
def test_rows_that_cannot_be_told_apart_are_refused(module: Any, targets: Any, reason: str) -> None:
    model = vera_fx.adapt(module().eval(), vera_fx.VeraConfig(r=2, target_modules=targets))
    with pytest.raises(vera_fx.TargetError, match=reason):
        model(torch.randn(3, 4), adapter_names=["default", BASE, "default"])
    assert model(torch.randn(3, 4)).shape[0] == 3


def test_bad_names() -> None:
    model, inputs = adapted("llama")
    with pytest.raises(vera_fx.AdapterError, match=r"adapter_names\[1\] is 'bb'.*did you mean 'b'"):
        model(**inputs, adapter_names=["a", "bb", "a"])
    with pytest.raises(vera_fx.AdapterError, match="4 adapter_names.*no input has 4 rows"):
        model(**inputs, adapter_names=["a"] * 4)
    for wrong in ("a", [], 3):
        with pytest.raises(vera_fx.AdapterError, match="one adapter's name per row"):
            model(**inputs, adapter_names=wrong)
    with pytest.raises(vera_fx.AdapterError, match=r"\[1\] is 'b', which may train.*train mode"):
        model.train()(**inputs, adapter_names=["a", "b", "a"])
    vera_fx.set_adapter(model.eval(), "a")
    vera_fx.merge(model)
    with pytest.raises(vera_fx.AdapterError, match="merged"):
        model(**inputs, adapter_names=["a", "b", "a"])
    vera_fx.unmerge(model)
    vera_fx.delete_adapter(model, "b")
    with pytest.raises(vera_fx.AdapterError, match="'b'"):
        model(**inputs, adapter_names=["a", "b", "a"])


@pytest.mark.parametrize("ranks", [(4, 1), (1, 5)])
def test_another_rank_under_the_same_names_is_another_graph(ranks: tuple[int, int]) -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 9)).eval()
    x, names = torch.randn(3, 4), ["a", BASE, "a"]
    first, second = (vera_fx.VeraConfig(r=r, target_modules=["0"], plan="factored") for r in ranks)
    model = vera_fx.adapt(module, first, adapter_name="a")
    fill_all(model)
    with torch.no_grad():
        model(x, adapter_names=names)
        vera_fx.delete_adapter(model, "a")
        vera_fx.add_adapter(model, "a", second)
        fill_all(model)
        assert_close(model(x, adapter_names=names)[0], alone(model, "a", {"input": x})[0])
        wider = vera_fx.VeraConfig(r=2, target_modules=["1"], plan="factored")
        vera_fx.add_adapter(model, "wider", wider)
        fill_all(model)
        mixed = model(x, adapter_names=["a", "wider", BASE])
        for row, name in enumerate(["a", "wider", BASE]):
            assert_close(mixed[row], alone(model, name, {"input": x})[row], what=name)


def test_explain_shows_mixtures_and_the_encoders_graph() -> None:
    model, inputs = adapted("t5")
    inputs.pop("decoder_input_ids")
    model.generate(**inputs, adapter_names=["a", BASE, "b"], max_new_tokens=3, pad_token_id=0)

    graphs = vera_fx.explain(model).graphs
    assert all("RowVectors" in str(graph.report) for graph in graphs)
    sites = [site for graph in graphs for site in graph.sites]
    assert any(site.startswith("encoder.") for site in sites)
    assert any(site.startswith("decoder.") for site in sites)
    reasons = {(plan, str(why)) for graph in graphs for _, plan, why in graph.plans}
    assert reasons == {("factored", "rows have adapters of their own")}
