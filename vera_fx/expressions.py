"""Regular expressions. Those of a user are Python's; those of a file are matched in bounded time.

Python's matcher backtracks: ``(.*)*X`` in a file would hold the process for ever. `FileText` marks what
a file said, and goes through a matcher that follows all ways at once: the set of places where a match
may stand, a bit for each place of the text. It knows every construct but those that are no regular
language (back references, atomic groups), and counts its steps.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from re import _constants as ops  # type: ignore[attr-defined]  # the parser's names
from re import _parser as parser  # type: ignore[attr-defined]  # Python 3.11 to 3.14
from typing import Any

from vera_fx.errors import TargetError, shown

STEPS = 3_000_000
"""Steps that one expression may take over all texts together: some ten seconds at most."""

LONGEST = 100_000
"""Characters of an expression."""

_FLAGS = re.UNICODE | re.DOTALL | re.VERBOSE


class FileText(str):
    """Text that a file brought: no expression for Python's matcher."""

    __slots__ = ()


Match = Callable[[str], bool]


def full_match(expression: str) -> Match:
    """Whether an expression describes the whole of a text, as ``re.fullmatch`` does.

    Raises:
        TargetError: it is no expression; or it came from a file and is too long, not regular or
            costs too much. The last is raised by the result, too.
    """
    if isinstance(expression, FileText):
        return _Bounded(expression)
    pattern = compiled(expression)
    return lambda text: pattern.fullmatch(text) is not None


def compiled(expression: str) -> re.Pattern[str]:
    """A user's expression.

    Raises:
        TargetError: it is none.
    """
    return _parsed(re.compile, expression)


def _parsed(parse: Callable[[str], Any], expression: str) -> Any:
    try:
        return parse(expression)
    except (re.error, RecursionError, OverflowError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise TargetError(f"{shown(expression)} is not a regular expression ({reason})") from error


class _TooManyError(Exception):
    """The steps are used up."""


class _Count:
    """Steps so far, over all texts."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, cost: int = 1) -> None:
        self.steps += cost
        if self.steps > STEPS:
            raise _TooManyError


class _Text:
    """A text, with bits for its places: bit n is before character n."""

    def __init__(self, text: str, count: _Count) -> None:
        self.text, self.count = text, count
        self.all = (1 << len(text) + 1) - 1
        self.masks: dict[int | str, int] = {}

    def mask(self, key: int | str, places: Callable[[], Iterable[int]]) -> int:
        """Bits for some places, which are found once."""
        if key not in self.masks:
            self.count.step(len(self.text) + 1)
            self.masks[key] = sum(1 << place for place in set(places()))
        return self.masks[key]


_Ends = Callable[[_Text, int], int]
"""From the places where a part of the expression may begin to those where it may end."""


class _Bounded:
    """A matcher whose time is bounded by its steps."""

    def __init__(self, expression: str) -> None:
        if len(expression) > LONGEST:
            raise self._refusal(expression, f"it is longer than {LONGEST:,} characters")
        tree = _parsed(parser.parse, expression)
        if tree.state.flags & ~_FLAGS:
            raise self._refusal(expression, "it sets flags, such as (?i)")
        try:
            self._ends = _sequence(tree, dotall=bool(tree.state.flags & re.DOTALL))
        except (KeyError, RecursionError) as error:
            reason = f"it uses {error.args[0]}" if isinstance(error, KeyError) else "it is too deep"
            raise self._refusal(expression, reason) from error
        self._expression, self._count = expression, _Count()

    def __call__(self, text: str) -> bool:
        found = _Text(text, self._count)
        try:
            return bool(self._ends(found, 1) >> len(text) & 1)
        except _TooManyError:
            reason = f"it takes more than {STEPS:,} steps"
            raise self._refusal(self._expression, reason) from None

    def _refusal(self, expression: str, reason: str) -> TargetError:
        return TargetError(
            f"the expression {shown(str(expression))} from a file is not followed: {reason}; if "
            "you trust it, write target_modules there as a list of names"
        )


def _sequence(tree: Any, *, dotall: bool) -> _Ends:
    parts, word = list[_Ends](), ""
    for op, argument in tree:
        if op is ops.LITERAL:
            word += chr(argument)
            continue
        if word:
            parts.append(partial(_word, word))
            word = ""
        parts.append(_part(op, argument, dotall=dotall))
    if word:
        parts.append(partial(_word, word))
    return parts[0] if len(parts) == 1 else partial(_all, tuple(parts))


def _part(op: Any, argument: Any, *, dotall: bool) -> _Ends:
    inner = partial(_sequence, dotall=dotall)
    if op in {ops.MAX_REPEAT, ops.MIN_REPEAT}:  # the same texts, in another order
        low, high, item = argument
        return partial(_repeat, low, high, inner(item))
    if op is ops.BRANCH:
        words, others = _split(argument[1])
        parts = tuple(inner(tree) for tree in others)
        return partial(_any, (partial(_words, words, {len(w) for w in words}), *parts))
    if op is ops.SUBPATTERN and not argument[1] and not argument[2]:
        return inner(argument[3])
    if op in {ops.ASSERT, ops.ASSERT_NOT}:
        direction, tree = argument
        look = _behind if direction < 0 else _ahead
        return partial(look, inner(tree), op is ops.ASSERT)
    if op is ops.AT:
        return partial(_at, _PLACES[argument])
    return partial(_one, _test(op, argument, dotall=dotall))


def _all(parts: tuple[_Ends, ...], text: _Text, starts: int) -> int:
    for part in parts:
        starts = part(text, starts)
        if not starts:
            break
    return starts


def _any(parts: tuple[_Ends, ...], text: _Text, starts: int) -> int:
    ends = 0
    for part in parts:
        ends |= part(text, starts)
    return ends


def _split(branches: list[Any]) -> tuple[frozenset[str], list[Any]]:
    """The alternatives that are plain words, and the others. Some files list a thousand paths."""
    plain = [b for b in branches if all(op is ops.LITERAL for op, _ in b)]
    words = frozenset("".join(chr(code) for _, code in branch) for branch in plain)
    return words, [branch for branch in branches if branch not in plain]


def _words(words: frozenset[str], lengths: set[int], text: _Text, starts: int) -> int:
    ends = 0
    text.count.step(len(text.text) + 1)
    for place in _places(starts):
        for length in lengths:
            text.count.step()
            if text.text[place : place + length] in words:
                ends |= 1 << place + length
    return ends


def _places(mask: int) -> Iterator[int]:
    return (place for place in range(mask.bit_length()) if mask >> place & 1)


def _word(word: str, text: _Text, starts: int) -> int:
    text.count.step()
    return (text.mask(word, lambda: _found(word, text.text)) & starts) << len(word)


def _found(word: str, text: str) -> Iterator[int]:
    place = text.find(word)
    while place >= 0:
        yield place
        place = text.find(word, place + 1)


def _one(test: Callable[[str], bool], text: _Text, starts: int) -> int:
    text.count.step()
    found = text.mask(id(test), lambda: (n for n, char in enumerate(text.text) if test(char)))
    return (found & starts) << 1


def _repeat(low: int, high: int, item: _Ends, text: _Text, starts: int) -> int:
    for _ in range(low):
        text.count.step()
        before, starts = starts, item(text, starts)
        if starts in {0, before}:  # so it stays
            break
    ends = fresh = starts
    for _ in range(min(high - low, len(text.text) + 1)):
        text.count.step()
        if not fresh:
            break
        fresh = item(text, fresh) & ~ends
        ends |= fresh
    return ends


def _ahead(item: _Ends, wanted: bool, text: _Text, starts: int) -> int:
    text.count.step(len(text.text) + 1)
    return sum(1 << place for place in _places(starts) if bool(item(text, 1 << place)) is wanted)


def _behind(item: _Ends, wanted: bool, text: _Text, starts: int) -> int:
    text.count.step()
    ends = item(text, text.all)  # all of one length, or the parser would have refused
    return starts & (ends if wanted else ~ends)


def _at(places: Callable[[str], Iterator[int]], text: _Text, starts: int) -> int:
    text.count.step()
    return starts & text.mask(id(places), lambda: places(text.text))


def _test(op: Any, argument: Any, *, dotall: bool) -> Callable[[str], bool]:
    """Whether a character is one that a part of the expression takes."""
    if op is ops.LITERAL:
        return chr(argument).__eq__
    if op is ops.NOT_LITERAL:
        return chr(argument).__ne__
    if op is ops.ANY:
        return (lambda _: True) if dotall else "\n".__ne__
    if op is ops.RANGE:
        return lambda char: argument[0] <= ord(char) <= argument[1]
    if op is ops.CATEGORY:
        return _CATEGORIES[argument]
    if op is ops.IN:
        negated = argument[0][0] is ops.NEGATE
        tests = [_test(*entry, dotall=dotall) for entry in argument[negated:]]
        return lambda char: any(test(char) for test in tests) is not negated
    raise KeyError(str(op).lower().replace("_", " "))


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _edges(text: str, *, wanted: bool) -> Iterator[int]:
    words = [False, *map(_is_word, text), False]
    pairs = enumerate(itertools.pairwise(words))
    return (place for place, (a, b) in pairs if (a is not b) is wanted)


_PLACES: dict[Any, Callable[[str], Iterator[int]]] = {
    ops.AT_BEGINNING: lambda _: iter([0]),
    ops.AT_BEGINNING_STRING: lambda _: iter([0]),
    ops.AT_END: lambda text: iter([len(text), len(text) - text.endswith("\n")]),
    ops.AT_END_STRING: lambda text: iter([len(text)]),
    ops.AT_BOUNDARY: partial(_edges, wanted=True),
    ops.AT_NON_BOUNDARY: partial(_edges, wanted=False),
}
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    ops.CATEGORY_WORD: _is_word,
    ops.CATEGORY_NOT_WORD: lambda char: not _is_word(char),
}
