"""Rows are cut to what a model has positions for, whatever its tokeniser and the recipe's length say."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel
from typer.testing import CliRunner

from tests.recipes import tiny
from vera_fx.cli.app import app
from vera_fx.recipes.tasks.lengths import folder_room, length_of

ROOM = 40
LONG = "abcd " * 60


def roberta(folder: Path) -> Path:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = RobertaConfig(
        vocab_size=263,
        num_attention_heads=2,
        max_position_embeddings=ROOM + 1,
        pad_token_id=0,
        **sizes,
    )
    return tiny.saved(RobertaModel(config), folder, tiny.tokenizer(adds=True))


def gpt2(folder: Path) -> Path:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=263,
        n_embd=24,
        n_layer=2,
        n_head=2,
        n_positions=ROOM,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tiny.saved(GPT2LMHeadModel(config), folder, tiny.tokenizer())


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def trained(folder: Path, kind: str, task: str, rows: list[dict[str, Any]]) -> list[Any]:
    model = {"roberta": roberta, "gpt2": gpt2}[kind](folder / "model")
    data = tiny.jsonl(folder / "rows.jsonl", rows)
    flags = ("--rank", 6, "--steps", 2, "--batch-size", 2, "--held-out", 2, "--device", "cpu")
    target = "query" if kind == "roberta" else "c_attn"
    flags += ("--target", target, "--no-tensorboard", "--task", task, "--model", model)
    result = run("train", folder / "run", "--data", data, *flags)
    assert result.exit_code == 0, result.output
    return [folder / "run"]


def test_folders_say_how_many_tokens_they_take(tmp_path: Path) -> None:
    one, two, three = roberta(tmp_path / "a"), gpt2(tmp_path / "b"), tiny.llama(tmp_path / "c")
    assert folder_room(one, 256) == folder_room(two, 256) == ROOM
    assert folder_room(three, 1 << 20) is None
    assert length_of(tiny.recipe(task="classification", model=one, data=one, length=256)) == ROOM
    assert length_of(tiny.recipe(task="classification", model=one, data=one, length=9)) == 9


def test_long_rows_are_cut_in_training_evaluation_and_prediction(tmp_path: Path) -> None:
    rows = [{"text": row["text"] + LONG, "label": row["label"]} for row in tiny.sentences(8)]
    [folder] = trained(tmp_path, "roberta", "classification", rows)
    found = run("predict", folder, "--text", LONG, "--text", LONG[: ROOM - 2] + "zz")
    assert found.exit_code == 0, found.output
    first, second = (json.loads(line) for line in found.stdout.splitlines())
    assert first == second  # <s>, 38 letters and </s>: what comes after is not read
    shorter = run("predict", folder, "--text", LONG[: ROOM - 3])
    assert json.loads(shorter.stdout)["scores"] != first["scores"]


def test_a_language_model_reads_the_end_of_a_question_and_leaves_room(tmp_path: Path) -> None:
    rows = [{"prompt": "say", "completion": " yes" + LONG} for _ in range(6)]
    [folder] = trained(tmp_path, "gpt2", "causal-lm", rows)
    asked = ("predict", folder, "--new-tokens", 9, "--text")
    found, cut = run(*asked, "z" + LONG), run(*asked, LONG[-(ROOM - 9) :])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == json.loads(cut.stdout)
    refused = run("predict", folder, "--new-tokens", ROOM, "--text", "a")
    assert refused.exit_code == 1
    assert f"has positions for {ROOM}" in " ".join(refused.output.split())
