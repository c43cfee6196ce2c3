"""What a configuration chooses, against PEFT 0.21.2: targets, saved modules, heads, biases."""

import copy
import dataclasses
import re
import types
import warnings
from collections.abc import Iterable
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import vera_fx
from tests.models import BY_NAME, MLP, VOCABULARY
from vera_fx.base.default_targets import DEFAULT_TARGETS
from vera_fx.base.targets import resolve_targets


def tree(paths: Iterable[str]) -> nn.Module:
    """A model with a linear module at each path, and one that nothing can mean."""
    root = nn.Module()
    for path in [*paths, "unrelated_to_everything"]:
        *parents, name = path.split(".")
        parent = root
        for segment in parents:
            if segment not in parent._modules:
                parent.add_module(segment, nn.Module())
            parent = parent._modules[segment]
        if name not in parent._modules:
            parent.add_module(name, nn.Linear(2, 3))
    return root


def ours(model: nn.Module, **fields: Any) -> set[str] | str:
    """The paths that our configuration targets; none if nothing matches; or the reason why not."""
    config = vera_fx.VeraConfig(r=2, **fields)
    try:
        return set(resolve_targets(model, config, strict=False))
    except vera_fx.TargetError as error:
        nothing = re.search("no module of this model matches|are excluded", str(error))
        return set() if nothing else str(error)


def theirs(model: nn.Module, **fields: Any) -> set[str]:
    """The paths that PEFT's own matching function chooses for the same fields."""
    fields = {"exclude_modules": None, "modules_to_save": None, "target_parameters": None} | fields
    config = types.SimpleNamespace(**fields)
    return {n for n, _ in model.named_modules() if n and check_target_module_exists(config, n)}


def compare(model: nn.Module, **fields: Any) -> set[str]:
    """Both choose the same modules, or we refuse a choice of PEFT's that is not linear."""
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    expected, actual = theirs(model, **fields), ours(model, **fields)
    if expected <= linear:
        assert actual == expected, fields
    else:  # PEFT refuses such a match as well, later
        assert "only nn.Linear" in actual
    return expected


# The table of PEFT's own tests (tests/test_tuners_utils.py, REGEX_TEST_CASES): path, targets,
# layers_to_transform, layers_pattern. PEFT's function gives the expected answer.
CASES = [
    ("foo", ["foo"], None, None),
    ("foo", ["bar"], None, None),
    ("foo", ["foo", "bar"], None, None),
    ("foo", "foo", None, None),
    ("foo", ".*oo", None, None),
    ("foo", "fo.*", None, None),
    ("foo", "fo", None, None),
    ("foo", ".*bar.*", None, None),
    ("foobar", ".*oba.*", None, None),
    ("foo.bar.1.baz", ["baz"], [1], ["bar"]),
    ("foo.bar.1.baz", ["baz"], [0], ["bar"]),
    ("foo.bar.1.baz", ["baz"], [2], ["bar"]),
    ("foo.bar.1.baz", ["baz"], 1, "bar"),
    ("foo.bar.10.baz", ["baz"], [0], ["bar"]),
    ("foo.bar.10.baz", ["baz"], [1], ["bar"]),
    ("foo.bar.1.baz", ["baz"], [0, 1, 2], ["bar"]),
    ("foo.bar.1.baz", ["baz", "spam"], [1], ["bar"]),
    ("foo.bar.1.baz", ["foo.bar.1.baz"], [7], ["bar"]),
    ("foo.bar.0.baz", ["baz"], 0, None),
    ("foo.bar.1.baz", ["baz"], [], None),
    ("foo.whatever.1.baz", ["baz"], [1], []),
    ("foo.whatever.1.baz", ["baz"], [0], []),
    ("foo.whatever.1.baz", ["baz"], [1], ""),
    ("foo.whatever.1.baz", ["baz"], [0], ""),
    ("foo.whatever.1.baz", ["baz"], [1], None),
    ("foo.whatever.1.baz", ["baz"], [0], None),
    ("whatever.baz", ["baz"], [0], None),
    ("transformer.h.1.attn.attention.q_proj.foo", ["q_proj"], None, None),
    ("transformer.h.1.attn.attention.q_proj", ["q_proj"], None, None),
    ("transformer.h.1.attn.attention.q_proj", ["q_proj", "v_proj"], None, None),
    ("transformer.h.1.attn.attention.resid_dropout", ["q_proj", "v_proj"], None, None),
    ("transformer.h.1.attn.attention.q_proj", ["q_proj"], [1], ["h"]),
    ("transformer.h.1.attn.attention.q_proj", ["q_proj"], [0], ["h"]),
    ("transformer.h.1.attn.attention.q_proj", ["q_proj"], [2], ["h"]),
    ("transformer.h.1.attn.attention.q_proj", ["q_proj"], [0, 1, 2], ["h"]),
    ("foo.bar.1.baz", ["baz"], [1], ["foo"]),
    ("foo.bar.1.baz", ["baz"], [1], ["baz"]),
    ("foo.bar.1.baz", ["baz"], [1], ["nothing", "bar"]),
    ("bar.1.baz", ["baz"], [1], ["bar"]),
    ("foo.bar.001.baz", ["baz"], [1], ["bar"]),
    ("foo.bar.1.spam.2.baz", ["baz"], [1], ["bar"]),
    ("foo.bar.2.spam.1.baz", ["baz"], [1], ["bar"]),
    ("model.layers.1.experts.0.w1", ["w1"], [1], None),
    ("model.layers.1.experts.0.w1", ["w1"], [0], None),
    ("blocks.1.weight_", ["weight_"], [1], ["blocks"]),
    ("mlp.blocks.1.weight_", ["weight_"], [1], ["blocks"]),
    ("mlp.blocks.1.bias_", ["weight_"], [1], ["blocks"]),
]


def test_the_table_of_pefts_own_tests() -> None:
    found: list[bool] = []
    for path, targets, layers, pattern in CASES:
        fields = {
            "target_modules": targets,
            "layers_to_transform": layers,
            "layers_pattern": pattern,
        }
        expected = compare(tree([path]), **fields)
        found.append(path in expected)
    assert sum(found) > 15
    assert len(found) - sum(found) > 15


segments = st.sampled_from(["layers", "h", "attn", "q", "v", "q2", "aq", "0", "1", "10"])
paths = st.lists(segments, min_size=1, max_size=5).map(".".join)
patterns = st.sampled_from([".*q", "layers\\.0\\..*", ".*\\.(q|v)", "q|h.*", ".*1.*", "[qv]2?"])
entries = st.lists(st.one_of(segments, paths), min_size=1, max_size=3)


@given(
    st.lists(paths, min_size=1, max_size=8),
    st.one_of(entries, patterns),
    st.one_of(st.none(), entries, patterns),
    st.one_of(st.none(), entries),
    st.one_of(st.none(), st.integers(0, 10), st.lists(st.integers(0, 10), max_size=2)),
    st.one_of(st.none(), st.sampled_from(["layers", "h", "[lh].*"]), st.just(["attn", "layers"])),
)
def test_any_targets_match_as_in_peft(
    paths: list[str], targets: Any, exclude: Any, saved: Any, layers: Any, pattern: Any
) -> None:
    if isinstance(targets, str):
        layers = pattern = None  # PEFT ignores them without a word, here they are an error
    if layers is None:
        pattern = None
    fields = {
        "target_modules": targets,
        "exclude_modules": exclude,
        "modules_to_save": saved,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    compare(tree(paths), **fields)


def test_defaults_are_pefts() -> None:
    for kind, targets in TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING.items():
        known = DEFAULT_TARGETS[kind]
        assert known == targets if isinstance(targets, str) else set(known) == set(targets), kind


def adapted_paths(model: nn.Module) -> set[str]:
    """The adapted modules of PEFT's model or of ours."""
    if isinstance(model, peft.PeftModel):
        return set(model.base_model.targeted_module_names)
    return set(model.vera.adapter("default").vectors.by_path)


def both(base: nn.Module, **fields: Any) -> tuple[peft.PeftModel, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=2, **fields))
    return theirs, vera_fx.adapt(copy.deepcopy(base), vera_fx.VeraConfig(r=2, **fields))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "t5"])
@pytest.mark.parametrize("targets", [None, "all-linear", "ALL-linear"])
def test_default_and_all_linear_on_transformers(name: str, targets: str | None) -> None:
    theirs, ours = both(BY_NAME[name].build(), target_modules=targets)
    assert adapted_paths(ours) == adapted_paths(theirs)
    assert not any(path.endswith("lm_head") for path in adapted_paths(ours))


class Headed(MLP):
    """No transformers model, though it has an output embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(7, 2)
        self.conv = Conv1D(4, 7)

    def get_output_embeddings(self) -> nn.Module:
        return self.lin1

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(super().forward(x)) + self.classifier(super().forward(x)).sum()


def test_all_linear_of_a_plain_module_has_no_exception() -> None:
    theirs, ours = both(Headed(), target_modules="all-linear")
    assert adapted_paths(ours) == adapted_paths(theirs) == {"lin0", "lin1", "classifier", "conv"}
    theirs, ours = both(Headed(), target_modules="all-linear", modules_to_save=["classifier"])
    assert adapted_paths(ours) == adapted_paths(theirs) == {"lin0", "lin1", "conv"}


WRAPPERS = re.compile(
    r"base_model\.model\.|\.base_layer|\.modules_to_save\.default|\.default$"
    r"|vera\.adapters\.default\.(vectors|copies)\."
)


def trained(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of what trains, by its path in the base model."""
    named = model.named_parameters()
    return {WRAPPERS.sub("", name): p.shape for name, p in named if p.requires_grad}


def tiny_bert(kind: str) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return getattr(transformers, kind)(config)


@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [
        ("BertForSequenceClassification", "SEQ_CLS", "classifier"),
        ("BertForTokenClassification", "TOKEN_CLS", "classifier"),
        ("BertForQuestionAnswering", "QUESTION_ANS", "qa_outputs"),
        ("BertModel", "FEATURE_EXTRACTION", None),
    ],
)
class TestTaskTypes:
    def test_they_add_their_heads(self, kind: str, task: str, head: str | None) -> None:
        theirs, ours = both(tiny_bert(kind), task_type=task, target_modules=["query", "value"])
        assert trained(ours) == trained(theirs)
        assert (f"{head}.weight" in trained(ours)) == (head is not None)
        assert adapted_paths(ours) == adapted_paths(theirs)

    def test_with_all_linear(self, kind: str, task: str, head: str | None) -> None:
        """PEFT first adapts the heads of two tasks and then cannot train them in full."""
        fields = {"task_type": task, "target_modules": "all-linear"}
        base = tiny_bert(kind)
        if task in {"TOKEN_CLS", "QUESTION_ANS"}:
            with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
                peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=2, **fields))
            fields["modules_to_save"] = [head]  # named by the user, PEFT leaves it out in time
        theirs, ours = both(base, **fields)
        assert trained(ours) == trained(theirs)
        assert adapted_paths(ours) == adapted_paths(theirs)
        assert head not in adapted_paths(ours)


class Suffixes(nn.Module):
    """Modules whose names end in each other."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Sequential(nn.Linear(4, 2))
        self.overhead = nn.Linear(4, 2)
        self.header = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y) + self.overhead(y) + self.header(y)


@pytest.mark.parametrize("saved", [["head"], ["overhead"], ["ad", "header"], ["head.0"]])
def test_modules_to_save_match_by_the_end_of_their_path(saved: list[str]) -> None:
    theirs, ours = both(Suffixes(), target_modules=["body"], modules_to_save=saved)
    assert trained(ours) == trained(theirs)
    assert len(trained(ours)) > 2


@pytest.mark.parametrize("bias", ["none", "all", "vera_only"])
@pytest.mark.parametrize("saved", [None, ["lin1"]])
def test_biases(bias: str, saved: list[str] | None) -> None:
    class Normed(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(7)
            self.plain = nn.Linear(7, 3, bias=False)

    fields = {"target_modules": ["lin0", "plain"], "bias": bias, "modules_to_save": saved}
    theirs, ours = both(Normed(), **fields)
    assert trained(ours) == trained(theirs)
    assert ("lin0.bias" in trained(ours)) == (bias != "none")
    assert ("norm.bias" in trained(ours)) == (bias == "all")


def test_the_bias_of_the_model_itself_is_refused() -> None:
    class Root(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(7))

    config = vera_fx.VeraConfig(r=2, target_modules=["lin0"], bias="all")
    with pytest.raises(vera_fx.TargetError, match="'bias' of the Root itself"):
        vera_fx.adapt(Root(), config)


class Mixed(nn.Module):
    """A linear layer and a Conv1D, whose weight is stored the other way round."""

    def __init__(self, first: str) -> None:
        super().__init__()
        linear, conv = nn.Linear(5, 6), Conv1D(6, 5)
        nn.init.normal_(conv.weight)
        self.a, self.b = (linear, conv) if first == "linear" else (conv, linear)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x)) * self.b(x))


@pytest.mark.parametrize("first", ["linear", "conv"])
@pytest.mark.parametrize("flag", [True, False])
def test_fan_in_fan_out_is_decided_per_module(first: str, flag: bool) -> None:
    """PEFT flips the flag of the user's configuration at every module of the other kind."""
    from tests.helpers import fill_vectors

    base = Mixed(first).eval()
    fields = {"r": 3, "target_modules": ["a", "b", "out"], "fan_in_fan_out": flag}
    mine, x = vera_fx.VeraConfig(**fields, plan="factored"), torch.randn(7, 5)
    before = dataclasses.replace(mine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(**fields))
    ours = vera_fx.adapt(copy.deepcopy(base), mine)
    fill_vectors(theirs), fill_vectors(ours)

    assert mine == before
    expected = theirs(x)
    assert torch.equal(ours(x), expected)
    merged = theirs.merge_and_unload()
    vera_fx.merge(ours)
    for name in ("a", "b", "out"):
        torch.testing.assert_close(
            ours.get_submodule(name).weight, merged.get_submodule(name).weight, rtol=1e-6, atol=1e-6
        )
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
