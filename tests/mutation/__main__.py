"""Mutation testing: ``python -m tests.mutation [file ...] [--sample n] [--seconds n]``, or ``make mutation``.

Every mutant of a file runs the tests named for it below, in a process of its own with a copy of the
repository. A mutant is killed by a test that fails, or by one that does not end; survivors are listed.
"""

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.mutation.operators import Mutant, mutants

ROOT = Path(__file__).parents[2]
EXAMPLES = "tests/passes"
PLANS = {
    "passes/plans/choose.py": ["tests/passes/plans"],
    "passes/plans/plan.py": ["tests/passes/plans", EXAMPLES],
    "passes/insert_branches.py": [EXAMPLES, "tests/parity/test_teeth.py"],
    "passes/lower_branch.py": [EXAMPLES, "tests/parity/test_teeth.py"],
    "passes/merge_weight.py": [EXAMPLES, "tests/parity/test_teeth.py"],
    "passes/scale_branch.py": [EXAMPLES, "tests/parity/test_teeth.py"],
    "passes/share_projection.py": [EXAMPLES],
    "passes/redirect_parameters.py": [EXAMPLES],
    "passes/fold_weights.py": [EXAMPLES, "tests/export/test_export.py"],
    "passes/zero_masked_rows.py": [EXAMPLES, "tests/mixing/test_mixed.py"],
    "passes/row_vectors.py": [EXAMPLES, "tests/passes/rows", "tests/mixing/test_mixed.py"],
    "passes/rows/math.py": ["tests/passes/rows"],
    "passes/rows/moves.py": ["tests/passes/rows"],
    "passes/rows/facts.py": ["tests/passes/rows"],
    "vera_fx/branches/vera/functions.py": ["tests/branches/vera"],
    "vera_fx/branches/vera/costs.py": ["tests/passes/plans"],
    "vera_fx/branches/dvora/functions.py": ["tests/branches"],
    "vera_fx/checkpoint/packing.py": ["tests/checkpoint/test_checkpoint.py"],
    "vera_fx/checkpoint/lora_rank.py": ["tests/checkpoint/test_lora.py"],
}


def run(copy: Path, tests: list[str], limit: float) -> str | None:
    """How the tests end: None if they pass, else what killed."""
    log = copy / "log"
    child = os.fork()  # the libraries are loaded already, which takes longer than most tests
    if not child:
        _run_tests(copy, tests, log)
    end = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "no end"
        time.sleep(0.1)
    if status == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return (failed or lines[-1:] or ["crashed"])[0]


def _run_tests(copy: Path, tests: list[str], log: Path) -> None:
    """In the child: run the copy's tests on the copy, and end."""
    code = 1
    try:
        os.chdir(copy)
        sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        for name in [n for n in sys.modules if n.partition(".")[0] in {"tests", "vera_fx"}]:
            del sys.modules[name]
        with log.open("w", encoding="utf-8") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            code = int(
                pytest.main(
                    ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
                )
            )
            sys.stdout.flush()
    finally:
        os._exit(code)


def copied(folder: Path) -> Path:
    """A copy of what the tests need; ``vera_fx.passes`` is found by a link."""
    for name in ("vera_fx", "passes", "tests", "docs", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "Makefile"):
        shutil.copy(ROOT / name, folder / name)
    if not (folder / "vera_fx" / "passes").exists():
        (folder / "vera_fx" / "passes").symlink_to(folder / "passes")
    return folder


def survivors(copy: Path, file: str, chosen: list[Mutant], end: float) -> tuple[int, list[Mutant]]:
    """How many mutants ran, and which of them no test noticed."""
    path, ran, alive = copy / file, 0, []
    source = path.read_text(encoding="utf-8")
    start = time.monotonic()
    if (failure := run(copy, PLANS[file], 900)) is not None:
        sys.exit(f"the tests of {file} fail without a mutation: {failure}")
    limit = 60 + 5 * (time.monotonic() - start)
    for mutant in chosen:
        if time.monotonic() > end:
            break
        path.write_text(mutant.source, encoding="utf-8")
        killed = run(copy, PLANS[file], limit)
        ran += 1
        print(f"{file}:{mutant.line}: {mutant.what}: {killed or 'SURVIVED'}"[:200], flush=True)
        if killed is None:
            alive.append(mutant)
    path.write_text(source, encoding="utf-8")
    return ran, alive


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("files", nargs="*", default=list(PLANS), help="files of the table above")
    parser.add_argument("--sample", type=int, default=0, help="so many mutants of each file")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    chosen = parser.parse_args()
    sys.dont_write_bytecode = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("torch._dynamo", "torch.export", "transformers", "peft", "hypothesis"):
        importlib.import_module(name)
    end = time.monotonic() + chosen.seconds
    total, alive = 0, []
    for file in chosen.files:
        found = list(mutants((ROOT / file).read_text(encoding="utf-8")))
        if chosen.sample and chosen.sample < len(found):
            found = random.Random(0).sample(found, chosen.sample)
        if time.monotonic() > end:
            break
        with tempfile.TemporaryDirectory() as folder:
            ran, left = survivors(copied(Path(folder)), file, found, end)
        total += ran
        alive += [f"{file}:{m.line}: {m.what}" for m in left]
        print(f"== {file}: {ran - len(left)} of {ran} killed, {len(found)} chosen", flush=True)
    print(f"{total - len(alive)} of {total} killed; survivors:", *alive, sep="\n  ")


if __name__ == "__main__":
    main()
