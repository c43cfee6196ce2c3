"""Every block of code is one that runs or says why not; commands, links and the reference lead somewhere."""

import re
import shlex
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest

import vera_fx
from tests.docs.pages import DOCS, ROOT, Fence, anchors, fences, name_of, pages, prose, text_of

PAGES = pages()
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
LANGUAGES = {"", "python", "bash", "text", "mermaid", "yaml", "json"}
OURS = r"^(pip|make|python|vera-fx|torchrun|accelerate) "
FENCES = [fence for page in PAGES for fence in fences(page)]
SHELL = [
    fence
    for fence in FENCES
    if fence.language == "bash" or (fence.language == "" and re.match(OURS, fence.code))
]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_blocks_say_what_they_are() -> None:
    """Without a language a block is commands, if it begins so, or text; code is named, so that it runs."""
    for fence in FENCES:
        assert fence.language in LANGUAGES, fence
        assert fence.options.keys() <= {"given", "skip", "prints"}, fence
        assert "skip" not in fence.options or len(fence.options["skip"]) > 10, fence
        looks = re.search(r"^(import \w|from \w+ import |model = )", fence.code, re.MULTILINE)
        assert not (fence.language == "" and looks), f"{fence} looks like code: {looks}"


def test_reasons_for_not_running_name_tests_that_exist() -> None:
    for fence in FENCES:
        for file in re.findall(r"tests/[\w/]+\.py", fence.options.get("skip", "")):
            assert (ROOT / file).is_file(), fence


def test_most_blocks_run() -> None:
    code = [fence for fence in FENCES if fence.language == "python"]
    skipped = [fence for fence in code if "skip" in fence.options]
    assert len(code) > 60
    assert len(skipped) < len(code) / 8


def commands(fence: Fence) -> list[list[str]]:
    """The commands of a shell block, each as words, without variables set before it."""
    lines = fence.code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[w for w in line if "=" not in w or w.startswith("-")] for line in words if line]


def check_command(words: list[str]) -> None:
    """A command of the repository's own names something that is there."""
    first, *rest = words
    if first == "make":
        assert all(re.search(rf"^{target}:", MAKEFILE, re.M) for target in rest), words
    elif first in {"pip", "accelerate", "torchrun", "python"}:
        for file in (w for w in rest if re.fullmatch(r"(examples|tests|benchmarks)/\S+\.\w+", w)):
            assert (ROOT / file).is_file(), words
        for module in (rest[n + 1] for n, word in enumerate(rest) if word == "-m"):
            path = ROOT / module.replace(".", "/")
            assert module == "pytest" or path.is_dir() or path.with_suffix(".py").is_file(), words
        for extras in re.findall(r"vera-fx\[([\w,]+)\]", " ".join(rest)):
            assert set(extras.split(",")) <= EXTRAS.keys(), words
    elif first == "serve":
        module, _, name = rest[-1].partition(":")
        path = (ROOT / module.replace(".", "/")).with_suffix(".py")
        assert re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.M), words
    else:
        assert first in {"vera-fx", "curl", "git", "export", "vllm"}, f"what is {words}?"


@pytest.mark.parametrize("fence", SHELL, ids=str)
def test_commands_exist(fence: Fence) -> None:
    for words in commands(fence):
        check_command(words)


def test_the_commands_of_vera_fx_exist() -> None:
    from typer.main import get_command

    from vera_fx.cli.app import app

    known = set(get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
    used = {w[1] for fence in SHELL for w in commands(fence) if w[0] == "vera-fx"}
    assert {"doctor", "inspect"} <= used
    assert used <= known


def test_a_command_that_is_not_there_is_seen() -> None:
    for line in ("make nothing", "python -m benchmarks.nothing", "pip install 'vera-fx[nothing]'"):
        with pytest.raises(AssertionError):
            check_command(shlex.split(line))


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {link}"


def test_every_public_name_stands_in_the_reference_once() -> None:
    named = [
        n for p in (DOCS / "api").glob("*.md") for n in re.findall(r"^::: (\S+)$", text_of(p), re.M)
    ]
    assert len(set(named)) == len(named)
    ours = {name.removeprefix("vera_fx.") for name in named if ".passes." not in name}
    assert ours == set(vera_fx.__all__)
    for graph_pass in (*vera_fx.passes.ORDER, *vera_fx.passes.FOR_EXPORTS):
        assert f"vera_fx.passes.{graph_pass.__name__}" in named


def test_every_page_is_in_the_navigation_and_nothing_else_is() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = re.findall(r": ([\w/]+\.md)$", nav, re.M)
    assert len(set(listed)) == len(listed)
    assert set(listed) <= {page.relative_to(DOCS).as_posix() for page in PAGES[1:]}


def test_pictures_say_what_they_show() -> None:
    for page in PAGES:
        for text, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", prose(page)):
            assert len(text) > 15, f"{name_of(page)}: {target}"
    for picture in (*(DOCS / "pictures").glob("*.svg"), *(DOCS / "figures").glob("*.svg")):
        assert "prefers-color-scheme: dark" in picture.read_text(encoding="utf-8"), picture
        assert picture.stat().st_size < 20_000, picture
