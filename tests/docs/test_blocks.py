"""Every Python block of the documentation runs, in order, and prints what its page says."""

import contextlib
import functools
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.docs.given import GIVEN, START
from tests.docs.pages import DOCS, ROOT, Fence, fences, name_of, pages
from vera_fx.branches import kinds as branches
from vera_fx.products import kinds as products

ELSEWHERE = {
    "docs/quantised.md": "tests/quantised/test_recipes.py",
    "docs/from_peft.md": "tests/parity/test_from_peft_page.py",
}
"""Pages with a test of their own, which needs more than is installed here or looks at more."""

BESIDE = {"docs/recipes.md": "base"}
"""What pages find that a command writes, so that no info string can say it."""

PAGES = [
    page
    for page in pages()
    if name_of(page) not in ELSEWHERE and any(f.language == "python" for f in fences(page))
]


def run(page: list[Fence], folder: Path) -> int:
    """Run a page's blocks in one namespace; returns how many ran."""
    space: dict[str, Any] = dict(START)
    if page and page[0].page in BESIDE:
        space |= GIVEN[BESIDE[page[0].page]](folder)
    printed, ran = "", 0
    for fence in page:
        if "prints" in fence.options:
            assert printed.strip() == fence.code.strip(), f"{fence} prints something else"
        if fence.language != "python" or "skip" in fence.options:
            continue
        for name in filter(None, fence.options.get("given", "").split(", ")):
            space |= GIVEN[name](folder)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * fence.line + fence.code, fence.page, "exec"), space)
        printed, ran = out.getvalue(), ran + 1
    return ran


@pytest.fixture
def _dynamo_alone(monkeypatch: pytest.MonkeyPatch):
    """Compiled blocks are traced and guarded as ever, but Inductor, which is slow, is left out.

    What blocks set for the whole process is put back.
    """
    torch._dynamo.reset()
    for rooms in (branches, products):
        monkeypatch.setattr(rooms, "KINDS", rooms.KINDS)
    quicker = {"VERA_FX_VERIFY": "0"}  # passes are verified by the tests of the passes
    monkeypatch.setattr(os, "environ", {**os.environ, **quicker})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_dynamo_alone")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    todo = [f for f in fences(page) if f.language == "python" and "skip" not in f.options]
    assert run(fences(page), tmp_path) == len(todo)


@pytest.mark.slow  # `make docs` runs it as Jupyter does
@pytest.mark.usefixtures("_dynamo_alone")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "five_minutes.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    space: dict[str, Any] = {}
    for number, source in enumerate(code):
        exec(compile(source, f"cell {number}", "exec"), space)


def test_the_notebook_has_no_outputs() -> None:
    cells = json.loads((DOCS / "five_minutes.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_pages_with_tests_of_their_own_have_them() -> None:
    for page, test in ELSEWHERE.items():
        assert page.rpartition("/")[2] in (ROOT / test).read_text(encoding="utf-8")


class TestTheRunner:
    """A block that fails, or prints something else, is seen."""

    def fence(self, code: str, language: str = "python", **options: str) -> Fence:
        return Fence("page.md", 1, language, options, code)

    def test_a_failing_block_fails(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError):
            run([self.fence("1 / 0")], tmp_path)

    def test_another_output_fails(self, tmp_path: Path) -> None:
        said = self.fence("5\n", "text", prints="")
        assert run([self.fence("print(2 + 3)"), said], tmp_path) == 1
        with pytest.raises(AssertionError, match="page.md:1 prints something else"):
            run([self.fence("print(2 + 2)"), said], tmp_path)

    def test_names_stay_within_a_page(self, tmp_path: Path) -> None:
        run([self.fence("name = 1"), self.fence("name")], tmp_path)
        with pytest.raises(NameError):
            run([self.fence("name")], tmp_path)
