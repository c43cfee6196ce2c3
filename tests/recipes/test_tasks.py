"""Which tokens are learned, what figures say, and that resumed runs plan as the one before."""

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import vera_fx
from tests.helpers import fill_vectors
from tests.recipes import tiny
from vera_fx.errors import ConfigError
from vera_fx.recipes.tasks.chat import IGNORED, Chat
from vera_fx.recipes.tasks.embeddings import Embeddings
from vera_fx.recipes.tasks.labels import figures
from vera_fx.recipes.tasks.padding import Padding
from vera_fx.recipes.trainer import replay, shape_of

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "ok"},
]


def learned(row: dict[str, Any], *, turns: str = "all", length: int = 99, **changes: Any) -> str:
    """The text of a row's tokens, with those that are not learned in brackets."""
    words = tiny.tokenizer()
    for name, value in changes.items():
        setattr(words, name, value)
    ids, labels = Chat(words, length, turns).tokens(row)
    assert [label for label in labels if label != IGNORED] == [
        token for token, label in zip(ids, labels, strict=True) if label != IGNORED
    ]
    parts = [
        f"({words.decode([token])})" if label == IGNORED else words.decode([token])
        for token, label in zip(ids, labels, strict=True)
    ]
    return "".join(parts).replace(")(", "")


def test_the_assistant_alone_is_learned() -> None:
    whole = "(<user>hi<end>\n<assistant>)yo<end>\n(<user>so?<end>\n<assistant>)ok<end>\n"
    last = "(<user>hi<end>\n<assistant>yo<end>\n<user>so?<end>\n<assistant>)ok<end>\n"
    assert learned({"messages": TALK}) == whole
    assert learned({"messages": TALK}, turns="last") == last
    assert learned({"messages": TALK}, length=7) == "(<user>hi<end>\n<assistant>)y"


def test_prompts_and_texts() -> None:
    assert learned({"prompt": "ab", "completion": " cd"}) == "(ab) cd</s>"
    # Nothing comes before the first token that could say it.
    assert learned({"text": "abc"}) == "(a)bc</s>"


def test_conversations_that_cannot_be_learned() -> None:
    shrinks = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' else '' }}"
        "<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(ConfigError, match="turns: last"):
        learned({"messages": TALK}, chat_template=shrinks)
    assert learned({"messages": TALK}, chat_template=shrinks, turns="last").endswith(">)ok<end>\n")
    with pytest.raises(ConfigError, match="no chat template"):
        learned({"messages": TALK}, chat_template=None)
    with pytest.raises(ConfigError, match="nobody is the 'assistant'"):
        learned({"messages": TALK[:1]})
    with pytest.raises(ConfigError, match="does not take"):
        learned({"messages": TALK}, chat_template="{{ raise_exception('no') }}")
    with pytest.raises(ConfigError, match="list of"):
        learned({"messages": "hi"})


def test_questions() -> None:
    chat = Chat(tiny.tokenizer(), 99, "all")
    decode = tiny.tokenizer().decode
    expected = "<user>hi<end>\n<assistant>yo<end>\n<user>so?<end>\n<assistant>"
    assert decode(chat.question({"messages": TALK})) == expected
    assert decode(chat.question({"prompt": "ab"})) == "ab"
    assert decode(Chat(tiny.tokenizer(), 2, "all").question({"text": "abc"})) == "bc"


def test_batches_have_few_lengths() -> None:
    padding = Padding(tiny.tokenizer(adds=True), 1000)
    assert len({padding.padded(n) for n in range(1, 1001)}) <= 64
    assert all(n <= padding.padded(n) <= 1000 for n in range(1, 1001))
    batch = padding(["abc", "a"])
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(1).tolist() == [5, 3]


def test_figures_of_classes() -> None:
    """Against the definition, class by class."""
    predicted, label = torch.tensor([0, 0, 1, 1, 2, 0]), torch.tensor([0, 1, 1, 1, 0, 0])
    shares: list[float] = []
    for c in range(3):  # the fourth class neither occurs nor is predicted
        hits = ((predicted == c) & (label == c)).sum()
        shares.append((2 * hits / ((predicted == c).sum() + (label == c).sum())).item())
    found = figures({"loss": torch.arange(6.0), "predicted": predicted, "label": label}, 4)
    assert found["f1"] == pytest.approx(sum(shares) / 3)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["loss"] == 2.5


def test_figures_of_retrieval(tmp_path: Any) -> None:
    """Ranks 1, 3 and, by a tie, 2."""
    recipe = tiny.recipe(task="embeddings", model="m", data="d", temperature=1.0)
    task = Embeddings(recipe, Padding(None, 8), "mean")
    anchors = torch.eye(3)
    positives = torch.tensor([[0.9, 0.5, 0.0], [0.1, 0.3, 0.8], [0.2, 0.6, 0.8]])
    found = task.score({"anchor": anchors, "positive": positives})
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    own = torch.tensor([0.9, 0.3, 0.8])
    expected = (torch.logsumexp(positives.T, 1) - own).mean().item()
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


def wide() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=256, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    adapter = vera_fx.VeraConfig(r=64, target_modules=["query", "value"])
    model = vera_fx.adapt(BertModel(config), adapter).train()
    fill_vectors(model)
    return model


def test_a_replayed_run_computes_as_the_one_before() -> None:
    """Which plan a batch gets depends on the graphs that others left; replaying them is what helps."""

    def batch(length: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(8 * length).reshape(8, length) % 20
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def states(model: Any, *lengths: int) -> torch.Tensor:
        return [model(**batch(length)).last_hidden_state for length in lengths][-1]

    task: Any = Embeddings(
        tiny.recipe(task="embeddings", model="m", data="d"), Padding(None, 8), ""
    )
    before = states(wide(), 8, 16)
    fresh, resumed = wide(), wide()
    replay(resumed, task, [shape_of(batch(8)), shape_of(batch(16))])
    assert not torch.equal(states(fresh, 32, 16), before), "nothing depends on the past"
    assert torch.equal(states(resumed, 32, 16), before)
