"""The chooser's rules, without a graph: what it may take, and when a merged weight is folded again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vera_fx.branches.vera.costs import VeraCosts
from vera_fx.passes import PLANS, ReadWeight, SiteGroup, Target, Workload, allowed, choose_plans

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
