"""Figures in the documentation are those of committed files, which say how they were measured."""

import importlib.util
import json
import re
import shlex
import statistics

import pytest

from benchmarks.figures import DOCS, TABLES, charts, known, pages_with_figures

ROOT = DOCS.parent
PAGES = {path.relative_to(DOCS).as_posix(): found for path, found in pages_with_figures()}
RUNS = DOCS / "figures" / "runs"


def named(page: str) -> str:
    return page.removesuffix(".md").replace("/", ".")


def test_there_are_figures() -> None:
    assert len(PAGES) > 6
    assert {path.stem for path in TABLES.glob("*.json")} == {named(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_files(page: str) -> None:
    kept = known(named(page))
    assert [(table.heading, table.rows) for table in kept] == PAGES[page], (
        "python -m benchmarks.figures take"
    )


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    for table in known(named(page)):
        assert table.command, f"{table.heading}: say in docs/figures/tables what measured it"
        for command in table.command.split(";"):
            _, first, *rest = shlex.split(command)
            if first == "-m":
                assert importlib.util.find_spec(rest[0]), command
            else:
                assert (ROOT / first).is_file(), command


def test_charts_are_drawn_from_the_tables() -> None:
    for name, picture in charts().items():
        assert (DOCS / "figures" / name).read_text(encoding="utf-8") == picture, (
            "python -m benchmarks.figures draw"
        )
        assert picture.count("<rect") > 8


def run(name: str) -> dict:
    found = json.loads((RUNS / name).read_text(encoding="utf-8"))
    assert {"command", "date", "machine", "versions"} <= found.keys()
    return found


def test_every_run_is_used() -> None:
    kept = {table.kept for page in PAGES for table in known(named(page))} - {"table"}
    assert kept | {"memory_bf16.json"} == {path.name for path in RUNS.glob("*.json")}


def test_the_table_of_jobs_of_one_row_is_its_runs() -> None:
    (table,) = (t for t in known("train_many") if t.kept == "many_jobs.json")
    expected = []
    for runs in run("many_jobs.json")["runs"]:
        for found in runs["results"]:
            times = {name: spread["median"] for name, spread in found["ms"].items()}
            systems = ("ours in turn", "PEFT VeRA in turn", "PEFT LoRA in turn")
            mib = found["mib"]
            expected.append((
                str(found["jobs"]),
                str(runs["length"]),
                {"minilm": "MiniLM", "llama": "Llama"}[found["shape"]] + ", compiled" * runs["compiled"],
                *(f"{times[name] / times['one batch']:.2f}" for name in systems),
                f"{mib['one batch']:.0f}" if mib else "",
                f"{2 * mib['ours in turn']:.0f}" if mib else "",
            ))  # fmt: skip
    assert sorted(map(tuple, table.rows[1:])) == sorted(expected)


def test_the_table_of_sentences_is_its_runs() -> None:
    (table,) = (t for t in known("train_many") if t.kept == "many_sentences.json")
    expected = []
    for runs in run("many_sentences.json")["runs"]:
        for found in runs["results"]:
            times = {name: spread["median"] for name, spread in found["ms"].items()}
            systems = ("one adapter", "ours in turn", "PEFT VeRA in turn", "PEFT LoRA in turn")
            expected.append((
                str(found["jobs"]),
                str(runs["rows"] // found["jobs"]),
                *(f"{times[name] / times['one batch']:.2f}" for name in systems),
                f"{found['mib']['one batch']:.0f}",
                f"{2 * found['mib']['ours in turn']:.0f}",
            ))  # fmt: skip
    assert list(table.rows[1:]) == expected


def test_the_table_of_first_calls_is_its_runs() -> None:
    (table,) = (t for t in known("benchmarks") if t.kept == "first_call.json")
    for row, found in zip(table.rows[1:], run("first_call.json")["results"], strict=True):
        medians = [statistics.median(column) for column in zip(*found["seconds"], strict=True)]
        assert row[2] == f"{medians[0]:.2f}"
        assert (row[3], row[5]) == (f"{medians[1]:.2f}", f"{medians[2]:.2f}")
        assert (row[4], row[6]) == (f"{found['ratio']:.2f}", f"{found['kept']:.2f}")


def test_the_table_of_switches_is_its_runs() -> None:
    (table,) = (t for t in known("many_adapters") if t.kept == "switch.json")
    assert table.command == run("switch.json")["command"]
    for row, case in zip(table.rows[1:], run("switch.json")["switch"], strict=True):
        times = case["microseconds"]
        shown = (f"{times[name]:,.0f}" for name in ("serving", "may train", "PEFT"))
        assert row == (str(case["layers"]), str(case["adapters"]), *shown)


def test_the_table_of_sharded_layers_is_its_run() -> None:
    (table,) = (t for t in known("distributed") if t.kept == "host_parts.json")
    found = run("host_parts.json")
    assert table.command == found["command"]
    assert [row["parts of a capture"] for row in found["parts"]] == [[found["layers"]]] * 2
    for cells, row in zip(table.rows[1:], found["results"], strict=True):
        ms = row["milliseconds"]
        shown = (
            f"{ms[name] / found['layers']:.2f}" for name in ("floor", "peft", "lora r=8", "ours")
        )
        assert cells == (row["where"], row["form"], *shown, f"{ms['ours'] / ms['peft']:.2f}")


def front_page(command: str) -> tuple[str, str]:
    rows = re.findall(r"^\|(.*)\| `(.*)` \|$", (DOCS / "index.md").read_text(), re.MULTILINE)
    (cells,) = (cells for cells, found in rows if found == command)
    return tuple(cell.strip() for cell in cells.split("|")[1:3])


def test_the_front_pages_three_numbers() -> None:
    memory = run("memory_bf16.json")
    (case,) = memory["results"]
    beyond = [case["mib"][name]["step"] - case["mib"]["floor"]["step"] for name in ("ours", "peft")]
    assert front_page(memory["command"]) == tuple(f"{value:.0f}" for value in beyond)

    switch = run("switch.json")
    (case,) = (c for c in switch["switch"] if (c["layers"], c["adapters"]) == (12, 50))
    times = [case["microseconds"][name] for name in ("serving", "PEFT")]
    assert front_page(switch["command"]) == tuple(f"{value:,.0f}" for value in times)

    training = next(table for table in known("benchmarks") if table.heading == "Training")
    at = next(n for n, row in enumerate(training.rows) if row[0] == "bfloat16: Llama shape")
    assert training.rows[at + 1][:2] == ("the same", "2,048")
    assert front_page(training.command) == (training.rows[at + 1][2], "1")
