"""``vera-fx chat`` from pipes and terminals: the same words as PEFT's model, and what is refused."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner, Result

import vera_fx
from tests.helpers import fill_vectors
from tests.recipes import tiny
from vera_fx.cli.app import app
from vera_fx.cli.chat import session
from vera_fx.cli.chat.conversation import Answering, Conversation
from vera_fx.cli.chat.models import load_speaker

NEW = 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model and two adapters, the second as a run leaves it."""
    root = tmp_path_factory.mktemp("chat")
    tiny.llama(root / "model")
    for scale, path in ((3.0, root / "one"), (2.0, root / "two" / "adapter")):
        vera = vera_fx.VeraConfig(r=6, target_modules=["q_proj", "down_proj"])
        adapted = vera_fx.adapt(AutoModelForCausalLM.from_pretrained(root / "model"), vera)
        fill_vectors(adapted, scale)
        vera_fx.save_adapter(adapted, path)
    return root


def run(root: Path, lines: list[str], *arguments: Any, adapters: tuple[str, ...] = ()) -> Result:
    given = [root / "model", *(root / name for name in adapters), *arguments]
    text = "".join(f"{line}\n" for line in lines)
    words = ["chat", *map(str, given), "--max-new-tokens", str(NEW), "--device", "cpu"]
    return CliRunner().invoke(app, words, input=text)


def turns(root: Path, lines: list[str], *arguments: Any, **given: Any) -> list[dict[str, Any]]:
    result = run(root, lines, *arguments, "--json", **given)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def theirs(root: Path, folder: Path | None, messages: list[dict[str, str]]) -> str:
    """What PEFT's model answers to a conversation."""
    model: Any = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder).eval()
    words = AutoTokenizer.from_pretrained(root / "model")
    text = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    given = words(text, add_special_tokens=False, return_tensors="pt")
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=2, pad_token_id=0)
    found = model.generate(**given, generation_config=config)
    return words.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def test_every_turn_is_pefts(root: Path) -> None:
    lines = ["hi", "/adapter two", "so?", "/adapter off", "and?", "/clear", "hi", "/exit", "never"]
    found = turns(root, lines, "--system", "be brief", adapters=("one", "two"))
    assert [turn["adapter"] for turn in found] == ["one", "two", None, None]
    assert [turn["user"] for turn in found] == ["hi", "so?", "and?", "hi"]
    said = [{"role": "system", "content": "be brief"}]
    folders = [root / "one", root / "two" / "adapter", None, None]
    for number, (turn, folder) in enumerate(zip(found, folders, strict=True)):
        said = said[:1] if number == 3 else said
        said.append({"role": "user", "content": turn["user"]})
        assert turn["assistant"] == theirs(root, folder, said)
        assert (turn["turn"], turn["new_tokens"], turn["ended_by"]) == (number + 1, NEW, "length")
        said.append({"role": "assistant", "content": turn["assistant"]})
    assert found[0]["assistant"] not in {found[1]["assistant"], found[3]["assistant"]}


def test_text_is_what_json_says_and_the_base_needs_no_adapter(root: Path) -> None:
    [turn] = turns(root, ["hi"])
    assert turn["assistant"] == theirs(root, None, [{"role": "user", "content": "hi"}])
    result = run(root, ["hi"])
    assert result.stdout == f"{turn['assistant']}\n"


def test_sampling_follows_the_seed(root: Path) -> None:
    def said(*flags: Any) -> str:
        [turn] = turns(root, ["hi"], *flags, adapters=("one",))
        return turn["assistant"]

    sampled = ("--temperature", 1.5, "--top-p", 0.9, "--seed")
    likeliest = said()
    assert said("--top-p", 1e-6, "--seed", 1) == likeliest  # nothing else is left to choose from
    first = said(*sampled, 1)
    assert first == said(*sampled, 1)
    assert first not in {likeliest, said(*sampled, 2)}


def test_bare_texts_have_no_template_and_no_history(root: Path) -> None:
    found = turns(root, ["ab", "ab"], "--raw")
    model = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    words = AutoTokenizer.from_pretrained(root / "model")
    given = words("ab", return_tensors="pt")
    expected = model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    text = words.decode(expected[0, 2:], skip_special_tokens=True)
    assert [turn["assistant"] for turn in found] == [text, text]
    assert [turn["prompt_tokens"] for turn in found] == [2, 2]


def test_a_static_cache_says_the_same(root: Path) -> None:
    lines = ["hi", "and?"]
    plain, static = (
        [turn["assistant"] for turn in turns(root, lines, *flags, adapters=("one",))]
        for flags in ((), ("--static-cache",))
    )
    assert static == plain


def conversation(root: Path, **how: Any) -> Conversation:
    speaker = load_speaker(root / "model", [str(root / "one")], device=CPU, dtype="auto")
    return Conversation(speaker, Answering(NEW, **how))


def test_compiled_says_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is the compiled model that answers."""
    calls: list[int] = []
    compiled = torch.nn.Module.compile

    def backend(graph: Any, inputs: Any) -> Any:
        del inputs
        calls.append(len(graph.graph.nodes))
        return graph.forward

    def counted(model: Any, **options: Any) -> None:
        compiled(model, **options, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    plain = turns(root, ["hi"], adapters=("one",))
    assert not calls
    found = turns(root, ["hi"], "--compile", adapters=("one",))
    assert found[0]["assistant"] == plain[0]["assistant"]
    assert max(calls) > 20


def test_answers_come_in_pieces_and_a_stopped_turn_is_not_kept(root: Path) -> None:
    talk = conversation(root)
    pieces: list[str] = []
    first = talk.say("hi", pieces.append)
    assert "".join(pieces) == first.assistant
    talk.clear()

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("something else", stop)
    again = talk.say("hi", pieces.append)
    assert (again.turn, again.assistant) == (2, first.assistant)


def test_an_end_token_ends(root: Path) -> None:
    """The model's own, beside the tokeniser's."""
    talk = conversation(root)
    speaker = talk._speaker
    ids = speaker.tokenizer("<user>hi<end>\n<assistant>", return_tensors="pt")["input_ids"]
    second = speaker.model.generate(ids, max_new_tokens=2, do_sample=False)[0, -1].item()
    speaker.model.generation_config.eos_token_id = [second, 5]
    found = talk.say("hi", lambda _: None)
    assert (found.new_tokens, found.ended_by) == (2, "end")


def test_room_ends_an_answer_and_then_the_conversation(root: Path) -> None:
    talk = conversation(root)
    talk._speaker.model.config.max_position_embeddings = 10
    found = talk.say("hi", lambda _: None)
    assert (found.prompt_tokens, found.new_tokens, found.ended_by) == (6, 4, "length")
    with pytest.raises(vera_fx.ConfigError, match=r"takes 10; /clear begins anew"):
        talk.say("more", lambda _: None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/odd", "there is no command '/odd'"),
        ("/adapter tow", "did you mean 'two'"),
    ],
)
def test_wrong_lines_of_a_pipe(root: Path, line: str, words: str) -> None:
    result = run(root, [line, "hi"], adapters=("one", "two"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert words in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{root}/model", "{root}/model"), "is no adapter"),
        (("{root}/model", "{root}/one", "one={root}/two"), "two adapters are called 'one'"),
        (("{root}/nowhere",), "is no model folder"),
        (("{root}/bert",), "is a BertModel; chat talks with causal"),
        (("{root}/plain",), "has no chat template"),
        (("{root}/model", "--raw", "--system", "be"), "--raw"),
        (("{root}/model", "--temperature", "0", "--top-p", "0.5"), "likeliest"),
        (("{root}/model", "--top-p", "0"), "above 0"),
        (("{root}/model", "--dtype", "int8"), "dtype must be one of"),
    ],
)
def test_errors_are_a_line(root: Path, arguments: tuple[str, ...], words: str) -> None:
    if not (root / "bert").exists():
        tiny.bert(root / "bert")
        (tiny.llama(root / "plain") / "chat_template.jinja").unlink()
    given = [word.format(root=root) for word in arguments]
    result = CliRunner().invoke(app, ["chat", *given], input="hi\n")
    assert result.exit_code == 1
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_a_template_that_refuses_is_an_error(root: Path) -> None:
    talk = conversation(root)
    talk._speaker.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(vera_fx.ConfigError, match="does not take"):
        talk.say("hi", lambda _: None)


def test_ctrl_c_stops_an_answer_on_a_terminal(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk, said = conversation(root), iter(["stop", "hi"])
    real = talk.say

    def say(text: str, write: Any) -> Any:
        if text == "stop":
            raise KeyboardInterrupt
        return real(text, write)

    def typed(_: str) -> str:
        line = next(said, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(talk, "say", say)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    session.talk(talk, as_json=False)
    out, err = capsys.readouterr()
    assert "this turn is not kept" in err
    expected = turns(root, ["hi"], adapters=("one",))[0]["assistant"]
    assert out == f"{expected}\n\n"


def test_a_terminal(root: Path) -> None:
    """A real one, with the installed command: errors are told, and one goes on."""
    mine, its = pty.openpty()
    code = "from vera_fx.cli.main import main; main()"
    command = [sys.executable, "-c", code, "chat", str(root / "model"), str(root / "one")]
    flags = ["--max-new-tokens", str(NEW), "--device", "cpu"]
    os.write(mine, b"/odd\nhi\n\x04")
    done = subprocess.run(
        [*command, *flags], stdin=its, capture_output=True, timeout=120, check=False
    )
    os.close(mine)
    os.close(its)
    assert done.returncode == 0, done.stderr
    assert b"there is no command '/odd'" in done.stderr
    expected = turns(root, ["hi"], adapters=("one",))[0]["assistant"]
    assert expected in done.stdout.decode(errors="replace").replace("\r\n", "\n")
