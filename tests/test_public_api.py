"""The public surface: names, docstrings, layers and imports."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import vera_fx
from vera_fx import passes

ROOT = Path(__file__).parent.parent


def test_all_is_exact_and_documented() -> None:
    for module in (vera_fx, passes):
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert inspect.getdoc(value), f"{name} has no docstring"


def test_design_names_exist() -> None:
    names = [
        "VeraConfig",
        "adapt",
        "capture",
        "explain",
        "add_adapter",
        "delete_adapter",
        "set_adapter",
        "active_adapters",
        "adapter_names",
        "disable_adapters",
        "adapter_state_dict",
        "load_adapter_state_dict",
        "save_adapter",
        "load_adapter",
        "merge",
        "unmerge",
        "unload",
        "parameter_summary",
    ]

    assert set(names) <= set(vera_fx.__all__)


def test_import_does_not_import_transformers() -> None:
    code = "import sys, vera_fx; sys.exit('transformers' in sys.modules or 'peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


def test_passes_know_only_torch() -> None:
    allowed = {"torch", *sys.stdlib_module_names}
    for path in (ROOT / "passes").rglob("*.py"):
        found = {name for name in imports(path) if not name.startswith("vera_fx.passes")}
        outside = {name for name in found if name.partition(".")[0] not in allowed}
        assert not outside, f"{path.name} imports {outside}"


def test_no_symbolic_trace_and_no_module_replacement() -> None:
    for path in (*(ROOT / "passes").rglob("*.py"), *(ROOT / "vera_fx").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert "symbolic_trace(" not in text, path.name
        assert "set_submodule" not in text, path.name


def test_files_stay_small() -> None:
    for path in (*(ROOT / "passes").rglob("*.py"), *(ROOT / "vera_fx").rglob("*.py")):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 320, f"{path.name} is crowded"
