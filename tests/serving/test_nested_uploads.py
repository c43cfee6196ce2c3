"""Uploads that are made to be slow to read are refused before they are read."""

import base64
import json

import pytest

pytest.importorskip("fastapi")
from fastapi import HTTPException

from vera_fx.serving import uploads
from vera_fx.serving.uploads import parts

WEIGHTS = base64.b64encode(bytes(range(250))).decode()
"""Holds every character that base64 has but for one."""

NESTED = {
    "lists": b"[" * 750_000 + b"]" * 750_000,
    "objects": b'{"a":' * 300_000 + b"1" + b"}" * 300_000,
    "empty lists side by side": b"[" + b"[]," * 500_000 + b"1]",
    "groups below Python's limit": b"[" + (b"[" * 900 + b"]" * 900 + b",") * 800 + b"1]",
}


def upload(config: bytes) -> bytes:
    return b'{"config": {"r": 4, "x": ' + config + b'}, "weights": "' + WEIGHTS.encode() + b'"}'


@pytest.mark.parametrize("case", NESTED)
def test_bodies_full_of_brackets_are_not_parsed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    monkeypatch.setattr(uploads.json, "loads", lambda body: parsed.append(len(body)))

    with pytest.raises(HTTPException, match="at most 1000 brackets") as raised:
        parts(upload(NESTED[case]), 5)

    assert raised.value.status_code == 422
    assert parsed == []


def test_as_many_as_a_configuration_may_have_are_read() -> None:
    most = b"[" + b"[]," * 997 + b"1]"  # two objects and the outer list are the other three
    config, weights = parts(upload(most), 5)

    assert config == {"r": 4, "x": json.loads(most)}
    assert weights == bytes(range(250))
    with pytest.raises(HTTPException, match="brackets"):
        parts(upload(b"[" + b"[]," * 998 + b"1]"), 5)
