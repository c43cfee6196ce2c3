"""The files that other tools read: forms, workflows, citation, package."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import vera_fx
from tests.docs.pages import ROOT

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("form", [f for f in FORMS if f.name != "config.yml"], ids=lambda p: p.name)
def test_issue_forms_ask(form: Path) -> None:
    found = read(form)
    assert {"name", "description", "body"} <= found.keys()
    asked = [part for part in found["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked) >= 3
    assert all(part["attributes"]["label"] for part in asked)
    assert any(part.get("validations", {}).get("required") for part in asked)


def steps(workflow: dict[str, Any]) -> list[str]:
    return [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_run_the_suite_and_may_little(path: Path) -> None:
    found = read(path)
    assert any(".ci/run" in step for step in steps(found))
    assert found["permissions"] == {"contents": "read"}
    for job in found["jobs"].values():
        assert all({"uses", "run"} & step.keys() for step in job["steps"])


def test_releases_are_published_without_a_token() -> None:
    found = read(ROOT / ".github" / "workflows" / "release.yml")
    publish = found["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["environment"] == "release"
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets." not in str(found)
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")


def test_a_release_checks_the_version_in_every_file_that_has_it() -> None:
    found = read(ROOT / ".github" / "workflows" / "release.yml")
    checks = next(step for step in steps(found) if "GITHUB_REF_NAME" in step)
    version = vera_fx.__version__
    for wanted, file in re.findall(r'grep -qx "(.+)" (\S+)$', checks, re.MULTILINE):
        line = wanted.replace('\\"', '"').replace("$version", version)
        assert line in (ROOT / file).read_text(encoding="utf-8").splitlines(), file
    assert checks.count("grep -q") == 4


def test_ci_runs_everything() -> None:
    targets = re.findall(r"^make ([\w-]+)$", CI, re.MULTILINE)
    assert {"test", "lint", "types", "docs", "package"} <= set(targets)


def test_the_citation_has_what_it_must() -> None:
    found = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "license"} <= found.keys()
    assert "2310.11454" in found["references"][0]["url"]


def test_the_package_says_what_it_imports() -> None:
    """What `import vera_fx` and saving need is asked for; transformers and the like are extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[<>=\[]", line)[0] for line in project["dependencies"]}
    assert needed == {"torch", "safetensors", "numpy"}
    assert project["version"] == vera_fx.__version__
