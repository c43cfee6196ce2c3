"""The terminal's side of a conversation: lines in, commands, answers out."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator

from vera_fx.cli.chat.conversation import Conversation, Turn
from vera_fx.errors import ConfigError, VeraFxError, listing, nearest

COMMANDS = {
    "/adapter": "NAME or off: who answers from here on; without a name: who there is",
    "/clear": "forget what was said",
    "/exit": "end (so does the end of the input)",
    "/help": "this",
}


def talk(conversation: Conversation, *, as_json: bool) -> None:
    """Answer line by line until the input ends.

    On a terminal an error is a line, and one goes on; of a file or a pipe it ends the command.

    Raises:
        VeraFxError: a line of a file or a pipe cannot be answered.
    """
    live = sys.stdin.isatty()
    if live:
        note("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends")
    for line in lines(live=live):
        try:
            if not turn(conversation, line, as_json=as_json):
                return
        except VeraFxError as error:
            if not live:
                raise
            note(f"error: {error}")
        except KeyboardInterrupt:
            if not live:
                raise
            note("\nstopped; this turn is not kept")


def lines(*, live: bool) -> Iterator[str]:
    """What the user says, without empty lines."""
    if not live:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # editing and history of lines
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        if line:
            yield line


def turn(conversation: Conversation, line: str, *, as_json: bool) -> bool:
    """Answer one line, or do what it commands; False if that is to end.

    Raises:
        VeraFxError: it cannot be answered, or there is no such command.
    """
    if line.startswith("/"):
        return command(conversation, *line.split())
    if as_json:
        answer(conversation.say(line, lambda _: None))
        return True
    conversation.say(line, _write)
    _write("\n")
    return True


def command(conversation: Conversation, name: str, *words: str) -> bool:
    """Do what a line with a slash says; False if that is to end.

    Raises:
        ConfigError: there is no such command.
    """
    if name == "/exit":
        return False
    if name == "/clear":
        conversation.clear()
        note("begun anew")
    elif name == "/adapter":
        adapter(conversation, " ".join(words))
    elif name == "/help":
        note("\n".join(f"{known:10}{text}" for known, text in COMMANDS.items()))
    else:
        raise ConfigError(
            f"there is no command {name!r}{nearest(name, COMMANDS)}; there are {listing(COMMANDS)}"
        )
    return True


def adapter(conversation: Conversation, name: str) -> None:
    """Switch, or say who there is."""
    if name:
        conversation.switch(name)
    others = listing(conversation.adapters) if conversation.adapters else "none"
    note(f"answers: {conversation.adapter or 'the base alone'}; adapters: {others}")


def answer(given: Turn) -> None:
    """A line of JSON."""
    _write(f"{json.dumps(dataclasses.asdict(given), ensure_ascii=False)}\n")


def note(text: str) -> None:
    """A line that belongs to no answer."""
    sys.stderr.write(f"{text}\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
