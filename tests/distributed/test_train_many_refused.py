"""`train_many` in two processes that differ, or of which one fails: all of them end, and say why."""

import re
from typing import Any

import pytest
import torch
from torch import distributed as dist

import vera_fx
from tests.distributed.pair import two_processes
from tests.distributed.test_train_many import run
from tests.training.jobs import classifier, config, examples
from tests.training.test_many import JOBS
from vera_fx import AdapterError, ConfigError, TrainSettings
from vera_fx.processes.checksums import checksums

PLAIN = {"plain": JOBS["plain"]}


def on(rank: int, here: Any, elsewhere: Any) -> Any:
    return here if dist.get_rank() == rank else elsewhere


def refused(kind: type[Exception], message: str, chosen: Any = None, **options: Any) -> None:
    with pytest.raises(kind, match=message):
        run(options.pop("model", None) or classifier(), chosen or PLAIN, held_out={}, **options)
    dist.barrier()  # nobody is left in a collective


@two_processes
def test_other_settings_data_or_weights() -> None:
    other = (config(), examples(20, 1), TrainSettings(steps=8, batch_size=3, lr=0.5))
    refused(ConfigError, "job 'plain': process 0 has .* process 1", on(1, {"plain": other}, PLAIN))
    fewer = (JOBS["plain"][0], examples(19, 1), JOBS["plain"][2])
    refused(ConfigError, "job 'plain': process 0 has", on(0, {"plain": fewer}, PLAIN))
    refused(AdapterError, "is at .*job .*and process . at .*job ", on(1, {"other": other}, PLAIN))
    model = classifier()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.classifier.weight[1, 2] += 0.01
    refused(ConfigError, r"weights differ .*'classifier\.weight'.*manual_seed", model=model)


@two_processes
def test_vectors_that_differ() -> None:
    model = vera_fx.adapt(classifier(), config(), adapter_name="plain")
    if dist.get_rank() == 0:
        with torch.no_grad():
            next(model.vera.adapter("plain").parameters())[1] += 0.01
    refused(ConfigError, "job 'plain': process 0 has", model=model)


@two_processes
def test_one_process_fails() -> None:
    """Its own error there, and where it was in the other."""
    broken = [*examples(20, 1)]
    broken[3:] = [{"input_ids": [1, 2]}] * 17
    jobs = {"plain": (config(), broken, JOBS["plain"][2])}
    mine = on(
        0,
        "need 'labels'|different fields",
        "process 0 of 2 failed in a step of plain .0.*ConfigError",
    )
    refused(on(0, ConfigError, AdapterError), mine, on(0, jobs, PLAIN))

    def fails(many: Any) -> None:
        if many.jobs["plain"].progress.step == 3 and dist.get_rank() == 1:
            raise KeyError("mine")

    kind, message = on(
        1, (KeyError, "mine"), (AdapterError, "process 1 of 2 failed in train_many: Key")
    )
    refused(kind, message, on_step=fails)


@two_processes
def test_jobs_that_are_stopped_by_one_alone() -> None:
    def stop(many: Any) -> None:
        if many.jobs["plain"].progress.step == 3 and dist.get_rank() == 1:
            many.stop("plain")

    refused(AdapterError, re.escape("the end"), on_step=stop)


def test_a_launcher_without_a_group_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.warns(UserWarning, match="started 2 processes, but no process group"):
        vera_fx.train_many(classifier(), PLAIN, progress=False)


def test_checksums_see_every_element() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64):
        tensor = torch.zeros(4, 5, dtype=dtype)
        for at in range(20):
            other = tensor.clone()
            other.view(-1)[at] = 1
            assert checksums({"a": tensor}) != checksums({"a": other})
        assert checksums({"a": tensor}) == checksums({"a": tensor.clone()})
        assert checksums({"a": tensor}) != checksums({"a": tensor[:3]})
