"""Damage: bytes, JSON, safetensors headers and zip archives, changed as accidents and attackers do."""

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Iterator
from random import Random
from typing import Any

NUMBERS = (
    0, -1, 1, 2, 3, 255, 2**15, 2**31, 2**31 - 1, 2**32, 2**40, 2**53, 2**62, 2**63, 2**64, -(2**63),
    10**18, 10**400, 0.5, -0.0, 1e39, 1e308, float("nan"), float("inf"), True, False,
)  # fmt: skip
TEXTS = (
    "", " ", "a", ".", "..", "/", "*", ".*", "(.*)*(.*)*X", "(a+)+$", "(" * 3000, "[", "\\", "\\1", "x" * 9999,
    "\0", "\ud800", "é", "🤖", "None", "null", "vera_A", "base_model.vera_A", "lin0", "lin1", "all-linear",
    "VERA", "LORA", "DVORA", "F32", "BF16", "C64", "I64", "BOOL", "__metadata__", "pt", "__import__('os')",
    "s0", "9**9**9", "torch.os.system", "torch.ops.aten.add.Tensor", "L['x'].size()[0] == 1", "float64",
    "merged", "constant", "input", "rows", "_orig_mod", "..\\..", "con", "\n", "'", '"',
)  # fmt: skip


def of_bytes(random: Random, data: bytes) -> bytes:
    """One change somewhere; where files say most, at the beginning, more often."""
    place = random.randrange(len(data) + 1) if random.random() < 0.5 else random.randrange(300)
    place = min(place, len(data))
    end = place + random.randrange(64)
    number = struct.pack("<Q", random.choice((0, 1, 2**31, 2**32, 2**63, len(data), 2**64 - 1)))
    changes = (
        lambda: data[:place],
        lambda: data[:place] + bytes([random.randrange(256)]) + data[place + 1 :],
        lambda: (
            data[:place]
            + bytes(b ^ 1 << random.randrange(8) for b in data[place : place + 1])
            + data[place + 1 :]
        ),
        lambda: data[:place] + random.randbytes(random.randrange(9)) + data[place:],
        lambda: data[:place] + data[max(0, place - random.randrange(99)) :],
        lambda: data[:place] + number + data[place + 8 :],
        lambda: data[:place] + bytes(len(data[place:end])) + data[end:],
        lambda: data[:place] + data[end:],
    )
    return random.choice(changes)()


def of_json(random: Random, values: Any) -> Any:
    """One change somewhere in a tree of JSON; the tree itself is changed."""
    places = list(_places(values))
    if not places:
        return _value(random, values)
    holder, key = random.choice(places)
    match random.randrange(7):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[random.choice((*TEXTS, *holder))] = holder.pop(key)
        case 2 if isinstance(holder, list):
            holder.extend([holder[key]] * random.choice((1, 2, 1000)))
        case 3:
            other, name = random.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = json.loads(json.dumps(other[name]))
        case _:
            holder[key] = _value(random, holder[key])
    return values


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree of JSON, as the container and the key in it.

    With a stack: generators within generators take a time that grows with the square of the depth.
    """
    stack = [values]
    while stack:
        holder = stack.pop()
        if isinstance(holder, dict | list):
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            for key in keys:
                yield holder, key
                stack.append(holder[key])


def _value(random: Random, old: Any) -> Any:
    if isinstance(old, bool | int) and random.random() < 0.5:
        return old + random.choice((-1, 1, 7, 100))
    if isinstance(old, str) and old and random.random() < 0.4:
        place = random.randrange(len(old))
        return old[:place] + random.choice(TEXTS) + old[place + random.randrange(2) :]
    nested: Any = random.choice(TEXTS)
    for _ in range(random.choice((1, 2, 500))):
        nested = [nested] if random.random() < 0.5 else {"a": nested}
    choices = (
        random.choice(NUMBERS),
        random.choice(TEXTS),
        None,
        [],
        {},
        nested,
        [old],
        {"a": old},
    )
    return random.choice(choices)


def json_text(random: Random, text: bytes, times: int = 1) -> bytes:
    """JSON changed as a tree, or as bytes; sometimes with a key twice."""
    if random.random() < 0.2:
        return of_bytes(random, text)
    try:
        values = json.loads(text)
        for _ in range(times):
            values = of_json(random, values)
        changed = json.dumps(values)
    except (ValueError, RecursionError):
        return of_bytes(random, text)
    if random.random() < 0.05 and changed.startswith("{") and len(changed) > 2:
        changed = f"{changed[:-1]}, {changed[1:]}"
    return changed.encode("utf-8", "surrogatepass")


def safetensors(random: Random, data: bytes, times: int = 1) -> bytes:
    """A safetensors file with a changed header, or changed anywhere."""
    if random.random() < 0.4:
        return of_bytes(random, data)
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    header = json_text(random, header, times)
    if random.random() < 0.2:
        body = of_bytes(random, body)
    if random.random() < 0.5:  # the length that it says is the length that it has
        length = len(header)
    return length.to_bytes(8, "little") + header + body


def archive(random: Random, data: bytes, times: int = 1) -> bytes:
    """A zip file with changed, missing, renamed, further or packed members, or changed anywhere."""
    if random.random() < 0.25:
        return of_bytes(random, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            contents = [(name, old.read(name)) for name in old.namelist()]
    except Exception:  # of the corpus, and damaged already
        return of_bytes(random, data)
    for _ in range(times):
        _member(random, contents)
    buffer, packing = (
        io.BytesIO(),
        random.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,)),
    )
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", packing) as new:
        warnings.simplefilter("ignore")
        for name, member in contents:
            new.writestr(name, member)
    return buffer.getvalue()


def _member(random: Random, contents: list[tuple[str, bytes]]) -> None:
    if not contents:
        return
    texts = [n for n, (name, _) in enumerate(contents) if name.endswith(".json")]
    place = (
        random.choice(texts) if texts and random.random() < 0.7 else random.randrange(len(contents))
    )
    name, member = contents[place]
    match random.randrange(12):
        case 0:
            del contents[place]
        case 1:
            contents.append((name, of_bytes(random, member)))
        case 2:
            ends = (
                "x",
                "data/aotinductor/model/a.so",
                "data/weights/model.pt",
                "extra/x",
                "models/b.json",
            )
            contents.append((f"archive/{random.choice(ends)}", member))
        case 3:
            contents[place] = (name.replace("archive", random.choice(("", "..", "b"))), member)
        case 4:
            contents[place] = (name, random.choice(contents)[1])
        case _ if name.endswith(".json"):
            contents[place] = (name, json_text(random, member))
        case _:
            contents[place] = (name, of_bytes(random, member))
