"""Expressions from files: what Python's matcher says, in bounded time."""

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import vera_fx
from tests.models import MLP
from vera_fx.base.targets import resolve_targets
from vera_fx.expressions import LONGEST, FileText, full_match

LEAVES = st.sampled_from(
    ["a", "b", "1", r"\.", ".", r"\d", r"\w", r"\W", r"\s", r"\D", r"\S", "[ab]", "[^a]", "[a-c1]", "ab", "",
     "^", "$", r"\b", r"\B", r"\A", r"\Z", "(?s:.)", "b1", "a{2}", "[^\\W1]"]
)  # fmt: skip
QUANTIFIERS = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "*?", "+?", "??", "{0}"])
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{})|{}".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("(?:{}){}".format, inner, QUANTIFIERS),
        st.builds("({})".format, inner),
        st.builds("(?P<n>{})".format, inner),
        st.builds("(?={}){}".format, inner, inner),
        st.builds("(?!{}){}".format, inner, inner),
        st.builds("{}(?<=a){}".format, inner, inner),
        st.builds("{}(?<!b){}".format, inner, inner),
    ),
    max_leaves=8,
)
TEXTS = st.text(alphabet="ab1.\n _", max_size=8)


@given(EXPRESSIONS, st.lists(TEXTS, min_size=1, max_size=6))
@example("(?:a|b){2}", ["ab", "a"])
@example("a$", ["a", "a\n", "a\n\n"])
@example("(?:^a)*", ["", "a", "aa"])
def test_it_says_what_pythons_matcher_says(expression: str, texts: list[str]) -> None:
    try:
        pattern = re.compile(expression)
    except re.error:  # a name twice
        with pytest.raises(vera_fx.TargetError, match="not a regular expression"):
            full_match(FileText(expression))
        return
    match = full_match(FileText(expression))
    for text in texts:
        assert match(text) == (pattern.fullmatch(text) is not None), text


SLOW = [
    "(.*)*(.*)*X",
    "(a+)+$",
    "(a|a)*b",
    "(?:a?){50}a{50}b",
    "(.*?,){11}P",
    "((a*)*)*b",
    "(?:.*.*.*.*.*.*){9}x",
    "(?=(a+)+$)b",
]


@pytest.mark.parametrize("expression", SLOW)
def test_what_holds_pythons_matcher_for_ever(expression: str) -> None:
    start = time.process_time()
    match = full_match(FileText(expression))
    for length in (60, 200):
        assert not match("a" * length + "!")
    assert time.process_time() - start < 5


REFUSED = [
    (r"(a)\1", "uses groupref"),
    ("(?i)a", "sets flags"),
    ("(?>a)b", "uses atomic group"),
    ("a*+b", "uses possessive repeat"),
    ("(a)?(?(1)b|c)", "uses groupref exists"),
    ("(?i:a)", "uses subpattern"),
    ("x" * (LONGEST + 1), "longer than 100,000 characters"),
    ("(", "not a regular expression"),
    ("(" * 3000, "not a regular expression"),
    ("a{99999999999999}", "not a regular expression"),
]


@pytest.mark.parametrize(("expression", "reason"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_followed(expression: str, reason: str) -> None:
    with pytest.raises(vera_fx.TargetError, match=reason) as found:
        full_match(FileText(expression))
    assert len(str(found.value)) < 1_000


EXPENSIVE = [
    "(?:" * 20 + "a" + "){0,900}" * 20,
    "(?:" * 20 + "ab?" + "){0,900}" * 20,
    r"(?:\ba?" * 20 + ")*" * 20,
    "(?:(?=a)a?" * 20 + ")*" * 20,
    "(?:(?<!b)a|b|ab|aaa" * 20 + ")*" * 20,
]


@pytest.mark.parametrize("expression", EXPENSIVE, ids=range(len(EXPENSIVE)))
def test_steps_are_counted_over_all_texts(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a step is a step: a hundredth of them takes some tenths of a second."""
    monkeypatch.setattr("vera_fx.expressions.STEPS", 30_000)
    match, start = full_match(FileText(expression)), time.process_time()
    with pytest.raises(vera_fx.TargetError, match="takes more than 30,000 steps"):
        all(match("a" * n + "!") is not None for n in range(100, 10_000))
    assert time.process_time() - start < 2


def test_a_users_own_are_pythons() -> None:
    assert full_match("(?i)LIN[01]")("lin0")
    config = vera_fx.VeraConfig(r=2, target_modules=r"(l)in(\d)")
    assert list(resolve_targets(MLP(), config)) == ["lin0", "lin1"]
    with pytest.raises(vera_fx.TargetError, match="not a regular expression"):
        resolve_targets(MLP(), vera_fx.VeraConfig(r=2, target_modules="("))


def test_a_thousand_paths_and_names_are_read_at_once() -> None:
    paths = [f"model.layers.{n}.q_proj" for n in range(1_000)]
    match = full_match(FileText("|".join(map(re.escape, paths))))
    start = time.process_time()
    assert all(map(match, paths))
    assert not match("model.layers.1000.q_proj")
    assert time.process_time() - start < 5
    config = vera_fx.VeraConfig(r=2, target_modules=[f"n{n}" for n in range(100_000)] + ["lin0"])
    start = time.process_time()
    assert list(resolve_targets(MLP(), config, strict=False)) == ["lin0"]
    assert time.process_time() - start < 5


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(3, 3) for _ in range(30))})
        self.encoder["more"] = nn.ModuleDict({"n" * 40: nn.Sequential(nn.Linear(3, 3))})


@pytest.mark.parametrize("name", ["layers", "encoder.layers", "more", "lay.*", "[a-z]+"])
def test_layers_are_counted_below_the_same_lists(name: str) -> None:
    """By a file's pattern as by a user's."""
    found = []
    for pattern in (name, FileText(name)):
        config = vera_fx.VeraConfig(
            r=2, target_modules="all-linear", layers_to_transform=[0, 7], layers_pattern=pattern
        )
        try:
            found.append(list(resolve_targets(Deep(), config)))
        except vera_fx.TargetError:
            found.append([])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["(.*)*(.*)*X", "(n+)+$", "(.*)*(.*)*...X"])
def test_patterns_of_layers_cannot_hang(name: str) -> None:
    config = vera_fx.VeraConfig(
        r=2, target_modules="all-linear", layers_to_transform=[0], layers_pattern=[FileText(name)]
    )
    start = time.process_time()
    with pytest.raises(vera_fx.TargetError):
        resolve_targets(Deep(), config)
    assert time.process_time() - start < 5


def test_names_are_no_expressions() -> None:
    start = time.process_time()
    with pytest.raises(vera_fx.VeraFxError):
        vera_fx.adapt(
            MLP(),
            vera_fx.VeraConfig(
                r=2, target_modules=["lin0"], modules_to_save=["(.*)*(.*)*X", "l.n1"]
            ),
        )
    assert time.process_time() - start < 5
