"""What a client may ask for, and how much of it."""

import os
from dataclasses import dataclass

import vera_fx

KEY = "VERA_FX_SERVER_KEY"
"""The environment variable with the key that uploads and deletes must bring."""

_SHORTEST = 16


@dataclass(frozen=True)
class Limits:
    """Bounds on what one client, and all of them together, can take.

    Attributes:
        text: most characters of a text.
        inputs: most texts of one request to an embedder.
        body: most bytes of a request's body.
        upload: most bytes of an upload's body.
        uploads: most uploads at a time.
        adapters: most adapters in the folder.
        names: most names in one list of an uploaded configuration.
        waiting: most texts that wait for a batch.
        connections: most open connections.
        per_client: most open connections of one address; behind a proxy that is all of them.
        head_seconds: seconds in which a request's head must arrive, the wait for it included.
        body_seconds: seconds in which its body must arrive.
        answer_seconds: seconds after which an answer is given up.
        rate: requests of one address per second; 0 for no bound.
        burst: requests that one address may make at once after a rest.
        changes: uploads and deletes of one address per second, right key or not; 0 for no bound.
    """

    text: int = 4000
    inputs: int = 64
    body: int = 64 << 10
    upload: int = 8 << 20
    uploads: int = 2
    adapters: int = 10_000
    names: int = 1_000
    waiting: int = 1024
    connections: int = 1024
    per_client: int = 256
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    answer_seconds: float = 30.0
    rate: float = 100.0
    burst: int = 200
    changes: float = 2.0


def key_for_changes() -> str | None:
    """The key that uploads and deletes must bring; None if there is none, and so no changes.

    Raises:
        ConfigError: it could be guessed.
    """
    key = os.environ.get(KEY)
    if key is not None and len(key) < _SHORTEST:
        raise vera_fx.ConfigError(
            f"the key in {KEY} has fewer than {_SHORTEST} characters; give a longer"
        )
    return key
