"""Rows of a causal language model as tokens, and which of these are to be learned.

A row is a conversation (``messages``), a ``prompt`` with its ``completion``, or plain ``text``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vera_fx.errors import ConfigError, listing, shown
from vera_fx.recipes.tasks.protocol import Row

IGNORED = -100
"""The label of a token that is not to be learned, as everywhere in torch."""

FORMS = (("messages",), ("prompt", "completion"), ("text",))
Span = tuple[int, int]


def form_of(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of the form that some data has.

    Raises:
        ConfigError: it has none.
    """
    found = next((form for form in FORMS if set(form) <= set(columns)), None)
    if found is None:
        raise ConfigError(
            "a causal language model learns from a column 'messages', from 'prompt' and 'completion', "
            f"or from 'text'; the data has {listing(columns)}; say what one is called: --column text=..."
        )
    return found


@dataclass(frozen=True)
class Chat:
    """Turns rows into tokens.

    Attributes:
        tokenizer: a fast tokeniser.
        length: the longest row; the rest of longer ones is cut off.
        turns: ``"all"`` or ``"last"``: which of the assistant's turns are learned.
    """

    tokenizer: Any
    length: int
    turns: str

    def tokens(self, row: Row) -> tuple[list[int], list[int]]:
        """Token ids and labels of a row.

        Raises:
            ConfigError: a conversation that the model's template does not take.
        """
        if "messages" in row:
            text, spans, special = *self._conversation(row["messages"]), False
        elif "prompt" in row:
            prompt, text = str(row["prompt"]), f"{row['prompt']}{row['completion']}"
            spans, special = [(len(prompt), len(text))], True
        else:
            text, special = str(row["text"]), True
            spans = [(0, len(text))]
        found = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids = list(found["input_ids"])
        labels = [
            token if _overlap(span, spans) else IGNORED
            for token, span in zip(ids, found["offset_mapping"], strict=True)
        ]
        if special:
            self._end(ids, labels)
        # Nothing comes before the first token that could say it.
        return ids[: self.length], [IGNORED, *labels[1 : self.length]]

    def _end(self, ids: list[int], labels: list[int]) -> None:
        """Let the end be learned as well: what generation stops at."""
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
            labels.append(end)

    def _conversation(self, messages: Any) -> tuple[str, list[Span]]:
        """A conversation's text, and where in it the assistant speaks."""
        turns = _turns(messages)
        spoken = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not spoken:
            raise ConfigError(f"in a conversation nobody is the 'assistant': {shown(messages)}")
        whole = self.render(turns)
        return whole, list(
            self._spans(turns, spoken[-1:] if self.turns == "last" else spoken, whole)
        )

    def _spans(
        self, turns: list[dict[str, str]], spoken: Sequence[int], whole: str
    ) -> Iterator[Span]:
        for number in spoken:
            before = self.render(turns[:number], answer=True)
            through = whole if number == len(turns) - 1 else self.render(turns[: number + 1])
            if not (through.startswith(before) and whole.startswith(through)):
                raise ConfigError(
                    "the model's chat template writes a turn otherwise once others follow, so that where "
                    "the assistant speaks cannot be told; learn the last turn alone (turns: last), which "
                    "must end the conversation"
                )
            yield len(before), len(through)

    def render(self, turns: Sequence[Mapping[str, str]], *, answer: bool = False) -> str:
        """A conversation by the model's template; with ``answer``, up to where the assistant begins.

        Raises:
            ConfigError: the tokeniser has no template, or the template refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the tokeniser has no chat template, so it cannot write 'messages'; give 'prompt' and "
                "'completion', or set tokenizer.chat_template and save it"
            )
        if not turns:
            return ""
        try:
            return self.tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # whatever a template raises
            raise ConfigError(f"the chat template does not take {shown(turns)}: {error}") from error

    def question(self, row: Row) -> list[int]:
        """The token ids after which a model is to go on: its last ``length`` ones."""
        if "messages" in row:
            turns = _turns(row["messages"])
            while turns and turns[-1]["role"] == "assistant":
                turns.pop()
            ids = self.tokenizer(self.render(turns, answer=True), add_special_tokens=False)
        else:
            ids = self.tokenizer(str(row["prompt" if "prompt" in row else "text"]))
        found = list(ids["input_ids"])
        end = self.tokenizer.eos_token_id
        return (found[:-1] if len(found) > 1 and found[-1] == end else found)[-self.length :]


def _turns(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in messages
    ):
        raise ConfigError(f"messages must be a list of {{role, content}}, got {shown(messages)}")
    return [{key: value for key, value in turn.items() if value is not None} for turn in messages]


def _overlap(token: Span, spans: Sequence[Span]) -> bool:
    return any(token[0] < end and token[1] > start for start, end in spans)
