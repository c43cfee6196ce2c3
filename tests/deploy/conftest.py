"""A small cluster of Ray on this machine, for all tests of a session that need one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

KEY = "a key of the tests"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    # Replicas import `deploy` and `tests` from where the suite runs.
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="warning",
        runtime_env={"env_vars": {"PYTHONPATH": paths, "VERA_FX_SERVER_KEY": KEY}},
    )
    yield ray
    ray.shutdown()
