"""The harness itself: whatever happens to one process is one clear failure, and the next case runs."""

import os
import signal
import time

import pytest
import torch
from torch import distributed as dist

from tests.distributed import pair as harness
from tests.distributed.pair import two_processes


@two_processes
def test_two_processes_talk() -> None:
    value = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(value)
    assert value.item() == 3.0


@two_processes
def _fails_on_one() -> None:
    assert dist.get_rank() == 0, "the other one is wrong"


@two_processes
def _dies_on_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


@two_processes
def _hangs_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_a_wrong_rank_is_a_failure() -> None:
    with pytest.raises(AssertionError, match=r"in rank 1: (?s:.*)the other one is wrong"):
        _fails_on_one()
    test_two_processes_talk()


def test_a_crash_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="in rank 1: the process died with exit code -11"):
        _dies_on_one()
    test_two_processes_talk()


def test_a_rank_that_hangs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    test_two_processes_talk()  # the start of the processes takes longer
    monkeypatch.setattr(harness, "SECONDS", 1.0)
    with pytest.raises(AssertionError, match=r"rank \[1\] did not end within 1 seconds"):
        _hangs_on_one()
