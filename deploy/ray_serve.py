"""A classifier or an embedder and its adapters over HTTP by Ray Serve: many replicas, one folder of adapters.

    serve run deploy.ray_serve:app model=path/to/model store=path/to/adapters replicas=4

Every replica holds one base and reads adapters from the folder, which all of them see. What is asked and answered
is what ``vera-fx serve`` asks and answers, and so are the limits of a request; docs/serving.md says what differs.
"""

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers otherwise

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator
from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import vera_fx
from vera_fx.serving.limits import Limits

NAME = "vera_fx"
"""The deployment's name, for a configuration of Ray Serve that changes its options."""


class Options(BaseModel):
    """What an application is made of; ``name=value`` of ``serve run``, ``args`` of a configuration file.

    Attributes:
        model: the model's folder, at the same place on every machine.
        store: the folder with a folder for each adapter, the same one on every machine.
        replicas: processes, each with the base in its memory.
        cpus: of each replica, which also is how many threads torch has.
        gpus: of each replica; 0.5 lets two share one.
        device: where a replica computes; ``auto`` is the accelerator if there is one.
        capacity: adapters that a replica keeps in memory.
        length: most tokens of a text; None for 256, or what the model takes where that is less.
        pooling: of an embedder; None for what its folder says.
        max_batch: most texts in one call of the model, whatever adapters they ask for; None for 32, or the capacity.
        max_wait: seconds that a text waits for others.
        limits: what differs from `vera_fx.serving.limits.Limits`, by name; on a command line as JSON.
    """

    model_config = ConfigDict(extra="forbid")

    model: Path
    store: Path
    replicas: int = Field(2, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    device: str = "auto"
    capacity: int = Field(1024, ge=1)
    length: int | None = Field(None, ge=1)
    pooling: str | None = None
    max_batch: int | None = Field(None, ge=1)
    max_wait: float = Field(0.005, ge=0)
    limits: dict[str, int | float] = {}

    @field_validator("model", "store")
    @classmethod
    def _from_here(cls, value: Path) -> Path:
        return value.absolute()  # replicas run in other folders

    @field_validator("limits", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value

    @property
    def batch(self) -> int:
        """Most texts in one call of the model."""
        return self.max_batch or min(32, self.capacity)

    def bounds(self) -> Limits:
        """The limits.

        Raises:
            ConfigError: there is no limit of that name.
        """
        known = Limits.__dataclass_fields__
        if wrong := sorted(self.limits.keys() - known.keys()):
            raise vera_fx.ConfigError(f"there is no limit {wrong[0]!r}; known: {', '.join(known)}")
        return TypeAdapter(Limits).validate_python(self.limits)


def app(options: Options) -> serve.Application:
    """The application, to be run by ``serve run`` or ``ray.serve.run``.

    Raises:
        ConfigError: a limit is unknown.
    """
    limits = options.bounds()

    def replica() -> FastAPI:
        return in_replica(options, limits)

    deployed = serve.deployment(
        name=NAME,
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=4 * options.batch,  # enough to fill a batch while another runs
        max_queued_requests=limits.waiting,
        max_constructor_retry_count=3,
    )
    return deployed(serve.ingress(replica)()).bind()


def in_replica(options: Options, limits: Limits) -> FastAPI:
    """One replica's application: the model is loaded and its graphs are captured.

    Raises:
        VeraFxError: a folder holds something else, or a choice does not fit the model.
    """
    from vera_fx.cli.commands.serve import application
    from vera_fx.cli.devices import device_of, use_threads
    from vera_fx.serving.folders import open_served
    from vera_fx.serving.limits import key_for_changes

    use_threads(max(1, int(options.cpus)))
    choices = options.model_dump(include={"capacity", "length", "pooling"})
    device = device_of(options.device)
    served = open_served(options.model, options.store, device=device, shared=True, **choices)
    batches = {"max_batch": options.batch, "max_wait": options.max_wait}
    made = application(served, key=key_for_changes(), limits=limits, **batches)
    made.add_middleware(Held, store=served.store)
    return made


class Held:
    """What Ray and its users want to know of a replica; around everything else that a request passes.

    A request whose header ``serve_multiplexed_model_id`` names an adapter goes to a replica that has it in memory, if
    one has and is not full: Ray's router is told here which replica has what. Which adapter answers, the body says; the
    header only chooses among replicas. Answers say in ``x-replica`` who gave them, counters of ``/metrics`` among them.
    """

    def __init__(self, app: ASGIApp, store: vera_fx.AdapterStore) -> None:
        self.app, self.store = app, store
        self.replica = serve.get_replica_context().replica_id.unique_id.encode()

        @serve.multiplexed(max_num_models_per_replica=store.capacity)
        async def held(name: str) -> str:
            return name  # the batcher reads it, and reads it again when its files change

        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = serve.get_multiplexed_model_id()
        if name and name in self.store:
            await self.held(name)

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-replica", self.replica)],
                }
            await send(message)

        await self.app(_without_prefix(scope), receive, signed)


def _without_prefix(scope: Scope) -> Scope:
    """Paths as the application knows them, under whatever ``route_prefix`` it runs."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return {**scope, "path": path or "/", "root_path": ""}
