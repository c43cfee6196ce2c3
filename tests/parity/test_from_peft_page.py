"""docs/from_peft.md keeps its word: the tests that it names exist, its example runs."""

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from_peft.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE[PAGE.index("## The table") :].splitlines() if line.startswith("| ")]


def named_tests(path: Path) -> set[str]:
    """``name`` and ``Class::name`` of every test in a file."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


def test_every_row_names_tests_that_exist() -> None:
    rows = [row for row in ROWS if not row.startswith("| PEFT |")]
    assert len(rows) > 70
    for row in rows:
        theirs, ours, tests = row.strip("| ").split(" | ")
        assert theirs
        assert ours
        named = re.findall(r"`(tests/\S+?\.py)::(\S+?)`", tests)
        assert named, f"no test proves: {row}"
        for file, name in named:
            assert name in named_tests(ROOT / file), f"{file}::{name} does not exist: {row}"


def test_every_hole_is_on_the_page() -> None:
    holes = named_tests(ROOT / "tests" / "parity" / "test_peft_holes.py")
    assert len(holes) > 20
    assert [name for name in holes if f"test_peft_holes.py::{name}`" not in PAGE] == []


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "from_peft.md", "exec"), names)

    assert (
        sorted(p.name for p in (tmp_path / "adapters").rglob("*.safetensors"))
        == ["adapter_model.safetensors"] * 2
    )
    assert type(names["merged"]) is torch.nn.Sequential
    assert names["plain"].shape == (1, 2)


def test_every_public_function_of_pefts_kind_is_in_the_recipe() -> None:
    import vera_fx

    others = {
        "AdapterStore", "StoreCounts", "calibrate", "capture", "capture_cache", "export_aoti", "export_executorch",
        "export_executorch_data", "export_onnx", "export_program", "load_program",
        "lora_errors", "program_sites", "refresh", "program_vectors", "replace_adapter",
        "save_program", "ParameterSummary", "PaperMemory", "RowLosses", "TrainResults", "TrainSettings",
        "memory_on_paper", "register_base_product", "row_losses", "train_adapters", "train_many",
    }  # fmt: skip
    functions = {
        name for name in vera_fx.__all__ if not name.endswith(("Error", "Warning"))
    } - others
    recipe = PAGE[: PAGE.index("## The table")]
    assert [name for name in sorted(functions) if f"vera_fx.{name}" not in recipe] == []
