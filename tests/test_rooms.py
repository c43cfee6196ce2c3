"""The law of the rooms: who imports whom is what docs/architecture.md says, no more and no less."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from vera_fx.branches.kinds import KINDS

ROOT = Path(__file__).parents[1]
CROWDED = 12
LONG = 300
LONG_FUNCTION = 40


def modules(root: Path) -> dict[str, Path]:
    """Every module by its dotted name; ``passes/`` is ``vera_fx.passes``."""
    found: dict[str, Path] = {}
    for folder, prefix in ((root / "vera_fx", "vera_fx"), (root / "passes", "vera_fx.passes")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((prefix, *(part for part in parts if part != "__init__")))
            found[name] = path
    return found


def room_of(module: str, known: dict[str, Path]) -> str:
    """The room that a module stands in: its outermost folder, or two of ``passes``."""
    if module == "vera_fx":
        return "face"
    parts = module.split(".")[1:]
    is_room = [
        known[f"vera_fx.{'.'.join(parts[:n])}"].name == "__init__.py" for n in (1, 2)[: len(parts)]
    ]
    if not is_room[0]:
        return "ground"
    if parts[0] == "passes" and len(is_room) > 1 and is_room[1]:
        return ".".join(parts[:2])
    return parts[0]


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module


def arrows(root: Path) -> dict[str, set[str]]:
    """For each room, the rooms that it imports from."""
    known = modules(root)
    found: dict[str, set[str]] = {room_of(name, known): set() for name in known}
    for name, path in known.items():
        room = room_of(name, known)
        found[room] |= {room_of(other, known) for other in imported(path, known)} - {room}
    return found


def law() -> dict[str, set[str]]:
    """The table of docs/architecture.md, top down."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| .*? \|([^|\n]*)\|$", page, re.MULTILINE)
    return {room: set(re.findall(r"`([\w.]+)`", allowed)) for room, allowed in rows}


def violations(root: Path) -> list[str]:
    allowed = law()
    return sorted(
        f"{room} imports {other}"
        for room, others in arrows(root).items()
        for other in others - allowed.get(room, set())
    )


def test_rooms_import_what_the_table_says() -> None:
    assert arrows(ROOT) == law()


def test_every_room_imports_downwards_only() -> None:
    order = list(law())
    for room, others in law().items():
        assert all(order.index(other) > order.index(room) for other in others), room


def test_a_violation_is_found(tmp_path: Path) -> None:
    for folder in ("vera_fx", "passes"):
        for path in (ROOT / folder).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    assert violations(tmp_path) == []
    bank, sites = tmp_path / "vera_fx/bank/slots.py", tmp_path / "passes/sites/find.py"
    bank.write_text(bank.read_text() + "\nfrom vera_fx.model.adapt import adapt\n")
    sites.write_text(sites.read_text() + "\nimport vera_fx.errors\n")

    assert violations(tmp_path) == ["bank imports model", "passes.sites imports ground"]


def test_passes_know_torch_alone() -> None:
    for path in (ROOT / "passes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [a.name for a in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                )
                for name in names:
                    assert name.partition(".")[0] not in {"transformers", "peft", "safetensors"}, (
                        path
                    )
                    assert not name.startswith("vera_fx") or name.startswith("vera_fx.passes"), path


def test_kinds_are_known_by_their_lists_alone() -> None:
    """A new kind of branch or base product is a folder or a file, and a line in its list."""
    known = modules(ROOT)
    inside = re.compile(r"vera_fx\.(branches\.\w+\.|products\.(?!kinds|protocol|opaque))")
    for name, path in known.items():
        room = room_of(name, known)
        if room not in {"branches", "products", "face"}:
            found = [other for other in imported(path, known) if inside.match(f"{other}.")]
            allowed = {"vera_fx.branches.kinds", "vera_fx.branches.protocol"}
            assert set(found) <= allowed, f"{name} knows one kind: {found}"


def test_no_kind_is_named_outside_of_its_folder() -> None:
    names = {n for kind in KINDS for n in (*kind.parameters.shared, *kind.parameters.own)}
    words = re.compile("|".join((r"lambda_[db]\b", *names)))
    for name, path in modules(ROOT).items():
        if ".branches." not in name:
            lines = path.read_text(encoding="utf-8").splitlines()
            # Golden graphs in the docstrings of passes are VeRA's.
            found = [
                line for line in lines if words.search(line) and not line.startswith("        %")
            ]
            assert found == [], path


def test_rooms_say_what_they_hold() -> None:
    for path in modules(ROOT).values():
        if path.name != "__init__.py" or path.parent.name == "passes":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        if path.parent.name != "vera_fx":
            others = [
                n for n in tree.body if not isinstance(n, ast.Expr | ast.ImportFrom | ast.Assign)
            ]
            assert not others, f"{path} holds code"


def test_rooms_are_not_crowded() -> None:
    for folder in {path.parent for path in modules(ROOT).values()} - {ROOT / "passes"}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= CROWDED, f"{folder} has {len(files)} files"


def test_files_and_functions_are_small() -> None:
    sizes: list[int] = []
    for path in modules(ROOT).values():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= LONG, f"{path} is long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                sizes.append((node.end_lineno or node.lineno) - node.lineno + 1)
                assert sizes[-1] <= LONG_FUNCTION, f"{path}:{node.lineno} {node.name} is long"
    sizes.sort()
    assert sizes[int(len(sizes) * 0.9)] < 20


def test_every_room_is_packaged() -> None:
    listed = set(
        re.findall(r'^  "(vera_fx[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    )
    rooms = {name for name, path in modules(ROOT).items() if path.name == "__init__.py"}

    assert listed == rooms
