"""A conversation: what was said, what the model is asked, and what it answers, piece by piece."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from vera_fx.cli.chat.models import Speaker
from vera_fx.errors import ConfigError, listing, nearest
from vera_fx.model.adapters import disable_adapters, set_adapter
from vera_fx.recipes.tasks.chat import Chat

_ALL = 1 << 30  # tokens: nothing is cut


@dataclass(frozen=True)
class Answering:
    """How answers are made.

    Attributes:
        new_tokens: the most that an answer has.
        temperature: of sampling; None with ``top_p`` of None for the likeliest tokens.
        top_p: share of the probability that is sampled from.
        static: keep a static cache.
        raw: ask with the text itself, without a template; nothing said before goes along.
    """

    new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    static: bool = False
    raw: bool = False


@dataclass(frozen=True)
class Turn:
    """One question and its answer, as a line of JSON says it."""

    turn: int
    user: str
    assistant: str
    adapter: str | None
    prompt_tokens: int
    new_tokens: int
    ended_by: str
    seconds: float


class Pieces(TextStreamer):
    """Hands words to a function as soon as they are whole."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of the answer."""
        del stream_end
        if text:
            self._write(text)


class Conversation:
    """Turns of a user and a model.

    Attributes:
        adapter: the name of the adapter that answers; None for the base alone.
    """

    def __init__(self, speaker: Speaker, how: Answering, system: str | None = None) -> None:
        """Begin.

        Raises:
            ConfigError: the model's tokeniser has no chat template, and it is not asked without.
        """
        self._speaker, self._how = speaker, how
        self._chat = Chat(speaker.tokenizer, _ALL, "all")
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []
        self._count = 0
        self.adapter = next(iter(speaker.adapters), None)
        if how.raw and system is not None:
            raise ConfigError("without a chat template (--raw) there is nothing to put --system in")
        if not how.raw and not speaker.tokenizer.chat_template:
            raise ConfigError(
                f"the tokeniser of this {type(speaker.model).__name__} has no chat template, so nothing "
                "says how a conversation is written; set tokenizer.chat_template and save it in the "
                "model's folder, or ask with bare texts: --raw"
            )

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters."""
        return self._speaker.adapters

    def clear(self) -> None:
        """Forget what was said; the system's text stays."""
        self._turns.clear()

    def switch(self, name: str) -> None:
        """Let another adapter answer from here on; ``"off"`` for the base alone.

        Raises:
            ConfigError: there is no adapter of that name.
        """
        if name != "off" and name not in self.adapters:
            known = (*self.adapters, "off")
            raise ConfigError(
                f"there is no adapter {name!r}{nearest(name, known)}; there are {listing(known)}"
            )
        self.adapter = None if name == "off" else name
        if self.adapter is not None:
            set_adapter(self._speaker.model, self.adapter)

    def say(self, text: str, write: Callable[[str], object]) -> Turn:
        """Ask, and keep question and answer.

        Args:
            text: what the user says.
            write: is called with the pieces of the answer.

        Raises:
            ConfigError: the template does not take the conversation, or it is too long for the model.
        """
        asked = {"role": "user", "content": text}
        row: Any = {"text": text} if self._how.raw else {"messages": self._messages(asked)}
        ids = self._chat.question(row)
        start = time.monotonic()
        new = self._generate(ids, Pieces(self._speaker.tokenizer, write))
        answer = self._speaker.tokenizer.decode(new, skip_special_tokens=True)
        if not self._how.raw:
            self._turns += [asked, {"role": "assistant", "content": answer}]
        self._count += 1
        ended = "end" if new and new[-1] in self._ends() else "length"
        seconds = round(time.monotonic() - start, 3)
        return Turn(self._count, text, answer, self.adapter, len(ids), len(new), ended, seconds)

    def _messages(self, asked: dict[str, str]) -> list[dict[str, str]]:
        return [*self._system, *self._turns, asked]

    def _generate(self, ids: list[int], streamer: Pieces) -> list[int]:
        """The new tokens."""
        model = self._speaker.model
        config = self._config(self._room(len(ids)))
        given = torch.tensor([ids], device=model.device)
        off = bool(self.adapters) and self.adapter is None
        with disable_adapters(model) if off else contextlib.nullcontext():
            found = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                generation_config=config,
                streamer=streamer,
            )
        return found[0, len(ids) :].tolist()

    def _room(self, asked: int) -> int:
        """The most tokens that the answer to so many may have."""
        most = getattr(
            self._speaker.model.config.get_text_config(), "max_position_embeddings", None
        )
        if most is None:
            return self._how.new_tokens
        if asked >= most:
            raise ConfigError(
                f"the conversation has {asked} tokens, and {type(self._speaker.model).__name__} takes "
                f"{most}; /clear begins anew"
            )
        return min(self._how.new_tokens, most - asked)

    def _config(self, new_tokens: int) -> GenerationConfig:
        how = self._how
        samples = how.temperature is not None or how.top_p is not None
        chances = {"temperature": how.temperature or 1.0, "top_p": how.top_p or 1.0, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=samples,
            eos_token_id=self._ends() or None,
            pad_token_id=self._speaker.tokenizer.pad_token_id,
            cache_implementation="static" if how.static else None,
            disable_compile=True,  # transformers compiles by itself on some devices; here --compile does
            **(chances if samples else {}),
        )

    def _ends(self) -> list[int]:
        """Tokens that end an answer: the model's, and the tokeniser's, which templates end turns with."""
        own = self._speaker.model.generation_config.eos_token_id
        ends = own if isinstance(own, list) else [own]
        return [
            e for e in dict.fromkeys((*ends, self._speaker.tokenizer.eos_token_id)) if e is not None
        ]
