"""Policy of the suite: one thread per worker, verified passes, fixed seeds, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VERA_FX_VERIFY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "deep", parent=settings.get_profile("default"), max_examples=400, derandomize=False
)
settings.load_profile(os.environ.get("VERA_FX_HYPOTHESIS", "default"))


@pytest.fixture(autouse=True)
def _fixed_state() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """An empty compile cache before and after, and the counters of what happened between."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()
