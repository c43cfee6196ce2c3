"""Requests to two replicas of Ray Serve: to the less busy one, or to the one that has the adapter in memory.

python -m benchmarks.ray_routing      # in an environment with vera-fx[ray,demo]
"""

import shutil
import tempfile
import urllib.request
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

import vera_fx
from benchmarks.report import console, write
from examples.server.load import Load, Outcome, run
from examples.server.minilm import CONFIG, load_base

PORT, REPLICAS, HEADER = 8110, 2, "serve_multiplexed_model_id"
CASES = {"a quarter in memory": (4, 1.0), "most ask for one": (1, 3.0)}
"""Of how many adapters one is kept in memory, and the exponent of Zipf's law that requests follow."""

COUNTERS = ("rows_total", "batches_total", "adapter_loads_total")


def folders(root: Path, adapters: int) -> Path:
    """MiniLM with a head, and one adapter under so many names."""
    model, tokenizer = load_base()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    vera_fx.save_adapter(vera_fx.adapt(model, CONFIG), root / "store" / "c0")
    for number in range(1, adapters):
        shutil.copytree(root / "store" / "c0", root / "store" / f"c{number}")
    return root


def counters() -> dict[str, dict[str, int]]:
    """Each replica's counters."""
    found: dict[str, dict[str, int]] = {}
    while len(found) < REPLICAS:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics") as answer:
            lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines())
            found[answer.headers["x-replica"]] = {name: int(lines[name]) for name in COUNTERS}
    return found


def measured(load: Load) -> tuple[Outcome, dict[str, float]]:
    """One round: how it went, and what each replica had of it."""
    before = counters()
    outcome = run(load)
    grown = [{n: new[n] - before[key][n] for n in COUNTERS} for key, new in counters().items()]
    rows, batches, loads = (sum(one[name] for one in grown) for name in COUNTERS)
    busiest = max(one["rows_total"] for one in grown)
    shares = {
        "rows_per_batch": rows / batches,
        "loads_per_row": loads / rows,
        "busiest": busiest / rows,
    }
    return outcome, shares


def summary(name: str, rounds: list[tuple[Outcome, dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds."""
    each = [{**outcome.summary(), **shares} for outcome, shares in rounds]
    keys = [key for key in each[0] if key not in ("requests", "errors")]
    errors = sum(outcome.errors.total() for outcome, _ in rounds)
    return {"name": name, **{k: median(e[k] for e in each) for k in keys}, "errors": errors}


def compared(root: Path, adapters: int, rounds: int, case: str, **load: Any) -> list[Any]:
    """Both ways of routing for one case, in turn."""
    from ray import serve

    from deploy.ray_serve import Options, app

    capacity, load["skew"] = adapters // CASES[case][0], CASES[case][1]
    limits = {"rate": 0.0, "per_client": 1024}
    sizes = {"capacity": capacity, "max_batch": 16, "length": 64}
    made = app(Options(model=root / "model", store=root / "store", limits=limits, **sizes))
    serve.run(made, name="routed", route_prefix="/")
    places = {f"c{number}": f"http://127.0.0.1:{PORT}" for number in range(adapters)}
    ways = {"less busy": "", "by adapter": HEADER}
    found: dict[str, list[Any]] = {way: [] for way in ways}
    for header in ways.values():
        run(Load(places, header=header, **{**load, "seconds": 3.0}))
    for number in range(rounds):
        for way, header in [*ways.items()][:: -1 if number % 2 else 1]:
            found[way].append(measured(Load(places, header=header, **load)))
    serve.delete("routed")
    return [summary(f"{case}: {way}", each) for way, each in found.items()]


def main(
    adapters: Annotated[int, typer.Option(min=64)] = 400,
    clients: Annotated[int, typer.Option(min=1)] = 16,
    seconds: Annotated[float, typer.Option(min=1.0, help="of load, each time")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path, typer.Option()] = Path("out/bench_ray_routing.json"),
) -> None:
    """Load two replicas of each case, by one way of routing and the other in turn."""
    import ray
    from ray import serve

    load = {"clients": clients, "seconds": seconds}
    ray.init(num_cpus=REPLICAS, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    with tempfile.TemporaryDirectory() as folder:
        root = folders(Path(folder), adapters)
        found = [row for case in CASES for row in compared(root, adapters, rounds, case, **load)]
    serve.shutdown()
    ray.shutdown()
    show(found)
    write(output, {"adapters": adapters, **load, "results": found})


def show(found: list[dict[str, Any]]) -> None:
    """The figures as a table."""
    columns = {"per_second": "answers/s", "p50_ms": "p50 ms", "p95_ms": "p95 ms"}
    shares = {
        "rows_per_batch": "rows/batch",
        "loads_per_row": "loads/row",
        "busiest": "busiest",
        "errors": "errors",
    }
    table = Table("", *columns.values(), *shares.values())
    for row in found:
        times = (f"{row[key]:.0f}" for key in columns)
        table.add_row(row["name"], *times, *(f"{row[key]:.2f}" for key in shares))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
