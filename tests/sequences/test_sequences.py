"""Sequences of calls: thirty seconds of them here, hours by ``make fuzz``; what they found stays below."""

import os

import pytest
from hypothesis import settings

from tests.sequences.machine import Machine

DEEP = os.environ.get("VERA_FX_HYPOTHESIS") == "deep"
Machine.TestCase.settings = settings(
    max_examples=2_000 if DEEP else 14, stateful_step_count=60 if DEEP else 40, derandomize=not DEEP
)
TestSequences = pytest.mark.filterwarnings("ignore:.*graphs of .* have been captured")(
    Machine.TestCase
)
