"""What is fuzzed: files go in; a success comes out, or an error of the library that changed nothing."""

import asyncio
import base64
import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import torch
from torch import nn

import vera_fx
from tests.fuzz import mutators
from tests.helpers import fill_vectors
from tests.models import MLP
from vera_fx.serving.app import create_app
from vera_fx.serving.limits import Limits

CONFIG, WEIGHTS, PROGRAM = "adapter_config.json", "adapter_model.safetensors", "p.pt2"
Files = dict[str, bytes]


def fields(number: int) -> dict[str, Any]:
    """Configurations of several kinds of files."""
    more: list[dict[str, Any]] = [
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0", "lin1"], "bias": "all"},
        {"target_modules": r"lin[01]", "save_projection": False},
        {"target_modules": ["lin0", "lin1"], "layers_to_transform": None, "vera_dropout": 0.1},
    ]
    return {"r": 2, **more[number % len(more)]}


class Probe:
    """A model, and whether it is what it was to the last bit."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before, tensors = self._now()
        self.values = [tensor.detach().clone() for tensor in tensors]

    def _now(self) -> tuple[Any, list[torch.Tensor]]:
        """What stands where, and the tensors, by one walk over the modules."""
        model, modules, tensors = self.model, list[Any](), list[torch.Tensor]()
        for name, module in model.named_modules():
            own = {**module._parameters, **module._buffers}
            found = {n: t for n, t in own.items() if t is not None}
            marks = [(n, id(t), t._version, t.requires_grad) for n, t in found.items()]
            modules.append((name, id(module), len(module._forward_hooks), module.training, marks))
            tensors += found.values()
        bank = model._modules.get("vera")
        state = (bank.active, bank.merged, list(bank.adapters), bank.enabled) if bank else None
        return (type(model), modules, sorted(model.__dict__), state), tensors

    def is_unchanged(self) -> bool:
        state, now = self._now()
        return state == self.before and all(map(torch.equal, now, self.values))


@dataclass
class Fault:
    """What should not be: an exception of another kind, or a model that was changed."""

    target: str
    files: Files
    reason: str


class Adapters:
    """`load_adapter` onto a plain model and onto an adapted one, and `AdapterStore.add`."""

    name = "adapters"

    def __init__(self, folder: Path) -> None:
        self.folder, self.seeds, self.count = folder / "adapter", list[Files](), 0
        for number in range(4):
            torch.manual_seed(number)
            model = vera_fx.adapt(MLP(), vera_fx.VeraConfig(**fields(number)))
            fill_vectors(model)
            path = vera_fx.save_adapter(model, folder / f"seed{number}")
            self.seeds.append({name: (path / name).read_bytes() for name in (CONFIG, WEIGHTS)})
        old = {n: b.replace(b"vera_fx.", b"other__.") for n, b in self.seeds[0].items()}
        self.seeds.append(old)  # as PEFT writes them: nothing of ours in the metadata
        torch.manual_seed(0)
        self.plain = MLP()
        self.adapted = vera_fx.adapt(
            MLP(), vera_fx.VeraConfig(**fields(0)), adapter_name="home"
        ).eval()
        self.store = vera_fx.AdapterStore(self.adapted, folder / "store")

    def mutate(self, random: Random, files: Files, times: int) -> Files:
        changed = dict(files)
        for _ in range(times):
            name = random.choice(list(changed) or [CONFIG])
            data = changed.get(name, b"")
            if random.random() < 0.02:
                changed.pop(name, None)
            elif name == CONFIG:
                changed[name] = mutators.json_text(random, data)
            else:
                changed[name] = mutators.safetensors(random, data)
        return changed

    def run(self, files: Files) -> Fault | None:
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            if path.name not in files:
                path.unlink()
        for name, data in files.items():
            (self.folder / name).write_bytes(data)
        self.count += 1
        for step in (self._fresh, self._beside, self._stored)[: 2 + (self.count % 4 == 0)]:
            reason = step()
            if reason is not None:
                return Fault(self.name, files, f"{step.__name__}: {reason}")
        return None

    def _fresh(self) -> str | None:
        probe = Probe(self.plain)
        reason, done = attempt(lambda: vera_fx.load_adapter(self.plain, self.folder))
        if done:
            if self.count % 64 == 0:  # it costs as much as a hundred loads
                self.plain(torch.zeros(2, 10))
            vera_fx.unload(self.plain).train()
        elif not probe.is_unchanged():
            return f"the plain model was changed ({reason})"
        return None if done or reason is None else reason

    def _beside(self) -> str | None:
        probe = Probe(self.adapted)
        reason, done = attempt(
            lambda: vera_fx.load_adapter(self.adapted, self.folder, adapter_name="new")
        )
        if done:
            vera_fx.delete_adapter(self.adapted, "new")
        elif not probe.is_unchanged():
            return f"the adapted model was changed ({reason})"
        return reason

    def _stored(self) -> str | None:
        before = sorted(path.name for path in self.store.folder.iterdir())
        reason, done = attempt(lambda: self.store.add("new", self.folder))
        if done:
            self.store.delete("new")
        if sorted(path.name for path in self.store.folder.iterdir()) != before:
            return f"the store was changed ({reason})"
        return reason


class Programs:
    """`load_program`, and what is done with a program that was read."""

    name = "programs"

    def __init__(self, folder: Path) -> None:
        self.folder, self.seeds = folder, list[Files]()
        torch.manual_seed(0)
        model = vera_fx.adapt(MLP().eval(), vera_fx.VeraConfig(**fields(1)))
        fill_vectors(model)
        self.adapter = vera_fx.save_adapter(model, folder / "other")
        x = torch.randn(3, 10)
        for form in ("constant", "rows", "merged"):
            program = vera_fx.export_program(model, (x,), form=form)
            path = vera_fx.save_program(program, folder / PROGRAM, projections=form != "rows")
            self.seeds.append({PROGRAM: path.read_bytes()})
        self.model = model

    def mutate(self, random: Random, files: Files, times: int) -> Files:
        return {name: mutators.archive(random, data, times) for name, data in files.items()}

    def run(self, files: Files) -> Fault | None:
        path = self.folder / PROGRAM
        path.write_bytes(files[PROGRAM])
        found: list[Any] = []
        reason, done = attempt(lambda: found.append(vera_fx.load_program(path)))
        if done:
            reason = self._use(found[0])
        return None if reason is None else Fault(self.name, files, reason)

    def _use(self, program: Any) -> str | None:
        steps = (
            lambda: vera_fx.program_sites(program),
            lambda: vera_fx.program_vectors(self.model, program=program),
            lambda: vera_fx.replace_adapter(program, self.adapter),
        )
        return next((reason for step in steps if (reason := attempt(step)[0]) is not None), None)


def attempt(step: Any) -> tuple[str | None, bool]:
    """What is wrong about how it ended, and whether it succeeded."""
    with quiet():
        try:
            step()
        except vera_fx.VeraFxError as error:
            return ("the message is long" if len(str(error)) > 10_000 else None), False
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}", False
    return None, True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Requests:
    """Bodies of requests to the example server: its answers are 4xx at worst."""

    name = "requests"

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = vera_fx.adapt(MLP().eval(), vera_fx.VeraConfig(**fields(1)))
        fill_vectors(model)
        path = vera_fx.save_adapter(model, folder / "adapter")
        self.store = vera_fx.AdapterStore(model, folder / "store")
        weights = base64.b64encode((path / WEIGHTS).read_bytes()).decode()
        upload = {"config": json.loads((path / CONFIG).read_bytes()), "weights": weights}
        question = {"text": "a text", "adapter": "known"}
        self.seeds = [{"upload": json.dumps(upload).encode()}]
        self.seeds += [{"question": json.dumps(question).encode()}]
        self.store.add("known", path)
        limits = Limits(rate=0, changes=0)
        self.app = create_app(self._classify, self.store, ["a", "b"], key="key", limits=limits)
        self.portal = asyncio.new_event_loop()
        self.lifespan = self.app.router.lifespan_context(self.app)
        self.portal.run_until_complete(self.lifespan.__aenter__())

    def _classify(self, texts: Any, names: Any) -> list[list[float]]:
        """Encodes the texts as a tokenizer does, and answers without the model."""
        return [[float(len(text.encode())), 0.0] for text in texts]

    def mutate(self, random: Random, files: Files, times: int) -> Files:
        return {name: mutators.json_text(random, data, times) for name, data in files.items()}

    def run(self, files: Files) -> Fault | None:
        ((name, data),) = files.items()
        method, path = {"upload": ("PUT", "/adapters/new"), "question": ("POST", "/classify")}[name]
        with quiet():
            answer = self.portal.run_until_complete(self._ask(method, path, data))
        if answer.status_code == 201:
            self.store.delete("new")
        if answer.status_code < 500 and self.store.names() == ["known"]:
            return None
        return Fault(self.name, files, f"{answer.status_code}: {answer.text[:300]}")

    async def _ask(self, method: str, path: str, data: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        headers = {"authorization": "Bearer key", "content-type": "application/json"}
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, content=data, headers=headers)


TARGETS: dict[str, Any] = {target.name: target for target in (Adapters, Programs, Requests)}
