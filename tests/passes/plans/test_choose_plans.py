"""The chooser's rules, without a graph: what it may take, and when a merged weight is folded again."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vera_fx
from tests.models import Attention
from vera_fx.branches.vera.costs import VeraCosts
from vera_fx.graphs.runtime import runtime_of
from vera_fx.passes import (
    PLANS,
    Assignment,
    ReadWeight,
    Reason,
    SiteGroup,
    Target,
    Why,
    Workload,
    allowed,
    choose_plans,
    site_groups,
)

COSTS = VeraCosts()
SIZES = st.integers(1, 5000)
BYTES = st.sampled_from([2, 4])


def target(I: int, O: int) -> Target:  # noqa: E741
    return Target("site", I, O, ReadWeight(), ("site.weight",))


def plan_of(T: int, I: int, O: int, work: Workload) -> str:  # noqa: E741
    group = SiteGroup((("site", target(I, O)),), (T,))
    return choose_plans([group], [T], work, COSTS).assignment.plan_of("site")


@pytest.mark.parametrize(
    ("work", "plans"),
    [
        (Workload((4,), trains=True), PLANS),
        (Workload((4,), trains=True, itemsize=2), PLANS),
        (Workload((4,), trains=True, narrow=True), ("scaled",)),
        (Workload((4,), trains=True, narrow=True, slow_half=True), ("factored",)),
        (Workload((4,), trains=True, slow_half=True), ("factored",)),
        (Workload((4,), trains=True, restricted="dropout"), ("factored",)),
        (Workload((4, 5), trains=True), ("factored",)),
    ],
    ids=["fp32", "bf16", "fp16", "slow fp16", "slow bf16", "restricted", "several"],
)
def test_what_may_be_chosen(work: Workload, plans: tuple[str, ...]) -> None:
    assert allowed(work) == plans
    assert plan_of(100_000, 64, 64, work) in plans


@given(sizes=st.tuples(SIZES, SIZES, SIZES), R=SIZES, trains=st.booleans(), itemsize=BYTES)
def test_the_cheapest_is_chosen(
    sizes: tuple[int, ...], R: int, trains: bool, itemsize: int
) -> None:
    work = Workload((R,), trains=trains, itemsize=itemsize)
    T, *features = sizes
    costs = COSTS(T, target(*features), work, 1)
    assert costs[plan_of(T, *features, work)] == min(costs[plan] for plan in PLANS)


SQUARE, WIDE = (768, 768), (768, 2048)


@pytest.mark.parametrize(
    ("T", "R", "shape", "sharing", "itemsize", "again"),
    [
        (2047, 256, SQUARE, 1, 4, False),  # below eight tokens per rank
        (2048, 256, SQUARE, 1, 4, True),  # 2.25 MiB against a quarter of 8 MiB
        (2048, 256, SQUARE, 1, 2, False),  # half of that
        (2400, 256, SQUARE, 1, 4, False),  # against 2.34 MiB of a site that is alone,
        (2400, 256, SQUARE, 3, 4, True),  # and 1.95 of one that shares z with two others
        (3000, 256, WIDE, 1, 4, False),  # 6 MiB against a quarter of 26: the output is wide,
        (3000, 256, WIDE[::-1], 1, 4, True),  # and here narrow, against a quarter of 12
        (8191, 256, SQUARE, 1, 4, False),  # a sixteenth of what PEFT keeps
        (8192, 256, SQUARE, 1, 4, True),  # as cheap as it gets
        (2048, 1024, SQUARE, 1, 2, False),
    ],
)
def test_when_a_merged_weight_is_folded_again(
    T: int, R: int, shape: tuple[int, int], sharing: int, itemsize: int, again: bool
) -> None:
    work = Workload((R,), trains=True, itemsize=itemsize)
    assert COSTS.folds_again(T, target(*shape), work, sharing) is again
    served = Workload((R,), trains=False, itemsize=itemsize)
    assert not COSTS.folds_again(T, target(*shape), served, sharing)


@pytest.mark.parametrize("plan", ["merged", "dense"])
def test_the_second_fold_counts(plan: str) -> None:
    R, shape = 256, WIDE
    work = Workload((R,), trains=True)
    before, after = (COSTS(T, target(*shape), work, 1)[plan] for T in (8191, 8192))
    fold = 2 * R * shape[0] * shape[1] / work.device.rate(work.itemsize)
    assert 0.99 * fold < after - before < 1.01 * fold


class Prices:
    """Costs by plan: for each row of the input, shared among the sites of a group."""

    def __init__(self, again: tuple[str, ...] = (), **prices: float) -> None:
        self.again, self.prices = again, prices
        self.asked: list[tuple[int, str, int]] = []

    def __call__(self, T: int, target: Target, work: Workload, sharing: int) -> Mapping[str, float]:
        self.asked.append((T, target.path, sharing))
        return {name: T * price for name, price in self.prices.items()}

    def kept(self, T: int, target: Target, work: Workload, sharing: int) -> Mapping[str, float]:
        return dict.fromkeys(PLANS, 1.0)

    def folds_again(self, T: int, target: Target, work: Workload, sharing: int) -> bool:
        return target.path in self.again and sharing == 1


FREE = Workload((4,), trains=True)
PRICES = {"factored": 10.0, "merged": 8.0, "dense": 9.0, "scaled": 12.0, "base": 100.0}


def site(name: str) -> tuple[str, Target]:
    return name, Target(name, 4, 4, ReadWeight(), (f"{name}.weight",))


GROUPS = [SiteGroup((site("a"), site("b")), (2,)), SiteGroup((site("c"),), (3,))]


def test_costs_are_asked_with_rows_and_sharing_and_add_up() -> None:
    prices = Prices(again=("a", "c"), **PRICES)
    choice = choose_plans(GROUPS, [2, 3], FREE, prices)

    assert prices.asked == [(2, "a", 2), (2, "b", 2), (3, "c", 1)]
    assert (choice.cost, choice.base_cost) == (7 * 8.0, 7 * 100.0)
    assert choice.assignment == Assignment(
        merged=frozenset("abc"), folds_again=frozenset("c"), exact=False
    )
    shares = tuple((plan, PRICES[plan] / 10.0) for plan in PLANS)
    assert choice.reasons["c"] == Why(Reason.CHEAPEST, 3, shares)


def test_tokens_are_given_for_every_group() -> None:
    with pytest.raises(ValueError, match="zip"):
        choose_plans(GROUPS, [2], FREE, Prices(**PRICES))


@pytest.mark.parametrize(
    ("more", "kept"), [(0.0, True), (5.0, True), (5.1, False), (-3.0, True), (80.0, False)]
)
def test_a_known_graph_is_kept_for_a_twentieth_of_the_base(more: float, kept: bool) -> None:
    prices = Prices(again=("c",), **{**PRICES, "scaled": 8.0 + more})
    known = Assignment(scaled=frozenset("abc"))
    choice = choose_plans(GROUPS, [2, 3], FREE, prices, [known])

    assert (choice.assignment == known) is (kept or more < 0)
    if kept:
        assert choice.cost == 7 * (8.0 + more)


def test_a_known_graph_keeps_what_it_folds_again() -> None:
    known = Assignment(merged=frozenset("abc"), folds_again=frozenset("b"))
    choice = choose_plans(GROUPS, [2, 3], FREE, Prices(again=("c",), **PRICES), [known])

    assert choice.assignment == known


def test_the_first_known_graph_that_will_do_is_kept() -> None:
    far, near = Assignment(dense=frozenset("abc")), Assignment(merged=frozenset("abc"))
    prices = Prices(**{**PRICES, "dense": 60.0})
    assert choose_plans(GROUPS, [2, 3], FREE, prices, [far, near]).assignment == near


def test_a_restricted_workload_keeps_no_graph() -> None:
    work = Workload((4,), trains=True, restricted=Reason.DROPOUT)
    known = Assignment(merged=frozenset("abc"))
    choice = choose_plans(GROUPS, [2, 3], work, Prices(**PRICES), [known])

    assert choice.assignment == Assignment()
    assert choice.reasons["a"] == Why(Reason.DROPOUT)


@pytest.mark.parametrize(
    ("work", "exact", "reason"),
    [
        (Workload((4,), trains=True, request="factored"), True, Reason.ASKED_FOR),
        (Workload((4,), trains=True, request="merged"), False, Reason.ASKED_FOR),
        (Workload((4,), trains=True, slow_half=True), True, Reason.SLOW_HALF),
        (Workload((4,), trains=True, slow_half=True, request="merged"), False, Reason.ASKED_FOR),
        (Workload((4,), trains=True, narrow=True), False, Reason.NARROW),
        (Workload((4, 5), trains=True), False, Reason.SEVERAL_ACTIVE),
        (Workload((4, 5), trains=True, narrow=True), True, Reason.SEVERAL_ACTIVE),
        (Workload((4,), trains=True, request="timed"), False, Reason.TIMED),
    ],
)
def test_why_and_in_which_precision(work: Workload, exact: bool, reason: Reason) -> None:
    choice = choose_plans(GROUPS, [2, 3], work, Prices(**PRICES))

    assert choice.assignment.exact is exact
    assert {why.reason for why in choice.reasons.values()} == {reason}


def test_sites_that_read_one_input_are_a_group() -> None:
    model = vera_fx.adapt(
        Attention(), vera_fx.VeraConfig(r=3, target_modules=["query", "key", "out"])
    )
    model(torch.randn(2, 6, 12))
    (capture,) = runtime_of(model).all_captures()
    targets = model.vera.structure.targets

    shared, alone = site_groups(capture.graph, list(targets.values()))

    assert shared.sites == (("query", targets["query"]), ("key", targets["key"]))
    assert alone.sites == (("out", targets["out"]),)
    (value,) = capture.values
    assert shared.leading == tuple(value.shape[:2])
    assert len(alone.leading) == 2
