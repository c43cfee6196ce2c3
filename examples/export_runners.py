"""Interpreters that run one exported file each, in turns, and know nothing of vera_fx."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np

# Each loads its program, says how long that took, and runs all calls once per line it is sent.
HEAD = """
import json, pickle, sys, time
program, calls, results = sys.argv[1:]
calls = pickle.load(open(calls, "rb"))
"""

TORCH = """
import torch
torch.set_num_threads(1)
torch.set_grad_enabled(False)
tensors = lambda x: {k: tensors(v) for k, v in x.items()} if isinstance(x, dict) else torch.from_numpy(x)
calls = [tensors(call) for call in calls]
start = time.perf_counter()
program = LOAD
loaded = time.perf_counter() - start
run = lambda call: program(**call)["logits"].numpy()
unwanted = {"vera_fx", "transformers", "peft"}
"""

ONNX = """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
start = time.perf_counter()
session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
loaded = time.perf_counter() - start
run = lambda call: session.run(None, call)[0]
calls = [{**call.pop("vectors", {}), **call} for call in calls]
unwanted = {"vera_fx", "transformers", "peft", "torch"}
"""

TAIL = """
print(json.dumps(loaded), flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    logits = [run(call) for call in calls]
    print(json.dumps(time.perf_counter() - start), flush=True)
pickle.dump(logits, open(results, "wb"))
assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
"""

CODE = {
    "torch": HEAD + TORCH.replace("LOAD", "torch.export.load(program).module()") + TAIL,
    "AOTInductor": HEAD
    + TORCH.replace("LOAD", "torch._inductor.aoti_load_package(program)") + TAIL,
    "onnxruntime": HEAD + ONNX + TAIL,
}  # fmt: skip


class Runner:
    """One interpreter with one program.

    Attributes:
        loaded: seconds that loading the program took.
    """

    def __init__(self, runtime: str, program: Path, calls: list[dict]) -> None:
        self._results = program.with_suffix(".logits")
        inputs = program.with_suffix(".calls")
        inputs.write_bytes(pickle.dumps(calls))
        command = [sys.executable, "-I", "-c", CODE[runtime], program, inputs, self._results]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loaded = self._read()

    def __call__(self) -> float:
        """Run all calls once; returns the seconds."""
        print(file=self._process.stdin, flush=True)
        return self._read()

    def logits(self) -> np.ndarray:
        """End the interpreter; returns what the last run gave, ``(sentences, classes)``."""
        self._process.communicate()
        if self._process.returncode:
            raise OSError(f"the interpreter for {self._results.stem} failed")
        return np.concatenate(pickle.loads(self._results.read_bytes()))

    def _read(self) -> float:
        line = self._process.stdout.readline()
        if not line:
            raise OSError(f"the interpreter for {self._results.stem} failed")
        return json.loads(line)
