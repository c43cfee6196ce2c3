"""Tables of docs/quality.md and docs/recipes.md, in Markdown, from the runs that there are."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.quality.results import Result, chosen

Runs = Mapping[str, Result]
DOMAINS = ("movies", "news", "products", "tweets")
SEEDS = 5
DEEP, MANY = "movies", "VeRA r=256"
PAPER = {
    "both train": "90.5 / 85.8",
    "d_initial = 1": "70.3 / 60.3",
    "d_initial = 1e-7": "90.8 / 84.7",
    "only b trains": "81.6 / 64.3",
    "only d trains, from 0, b = 1": "89.7 / 67.0",
    "A, B Kaiming normal": "90.0 / 82.6",
    "A, B uniform in [0, 0.1]": "68.9 / 53.1",
    "A, B of each site's own": "90.7 / 84.6 (shared: 90.0 / 84.6)",
}
"""MRPC / RTE of RoBERTa large in the paper's section 4.6."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def of(runs: Runs, **fields: Any) -> list[Result]:
    """Runs with these values, by rate and seed."""
    found = [r for r in runs.values() if all(r[k] == v for k, v in fields.items())]
    return sorted(found, key=lambda r: (r["lr"], r["seed"]))


def percent(value: float) -> str:
    """With a decimal."""
    return f"{100 * value:.1f}"


def middle(found: Sequence[Result], field: str = "accuracy") -> float:
    """The median of a field."""
    return statistics.median(r[field] for r in found)


def spread(found: Sequence[Result]) -> str:
    """Median and range of accuracy in per cent, and how many seeds, where they are not five."""
    if not found:
        return "not run"
    values = [r["accuracy"] for r in found]
    seeds = "" if len(found) == SEEDS else f", {len(found)} of {SEEDS} seeds"
    return f"{percent(middle(found))} ({percent(min(values))} to {percent(max(values))}{seeds})"


def size(numbers: int) -> str:
    """Bytes in float32."""
    return f"{numbers / 2**8:,.0f} KiB" if numbers < 2**18 else f"{numbers / 2**18:,.1f} MiB"


def methods_in(runs: Runs, *stages: str) -> list[str]:
    """Names, by how much they train."""
    found = {r["method"]: r["trained"] for r in runs.values() if r["stage"] in stages}
    return sorted(found, key=lambda name: found[name])


def plain(runs: Runs, method: str, task: str) -> list[Result]:
    """A method's runs on the test of one domain, whichever table they were done for."""
    return [r for r in of(runs, task=task, method=method) if r["stage"] in {"text", "sizes"}]


def everywhere(runs: Runs) -> list[str]:
    """Methods that were run on more domains than `DEEP`, and those of the first table."""
    names = methods_in(runs, "text", "sizes")
    wide = {r["method"] for r in runs.values() if r["stage"] == "sizes" and r["task"] != DEEP}
    return [name for name in names if name in wide | set(methods_in(runs, "text"))]


def _facts(found: Result) -> list[str]:
    return [f"{found['lr']:g}", f"{found['trained']:,}", size(found["trained"])]


def text(runs: Runs) -> str:
    """Every method on every domain."""
    rows = [_commoner(runs)]
    for name in everywhere(runs):
        cells = [plain(runs, name, domain) for domain in DOMAINS]
        whole = all(len(cell) == SEEDS for cell in cells)
        mean = percent(statistics.mean(map(middle, cells))) if whole else ""
        first = next(cell[0] for cell in cells if cell)
        rows.append([name, *_facts(first), *map(spread, cells), mean])
    head = ("method", "rate", "trained", "float32", *DOMAINS, "mean of the medians")
    return markdown(head, rows)


def _commoner(runs: Runs) -> list[str]:
    shares = [of(runs, stage="labels", task=name)[0]["accuracy"] for name in DOMAINS]
    mean = percent(statistics.mean(shares))
    return ["always the commoner label", "", "0", "", *map(percent, shares), mean]


def differences(runs: Runs) -> str:
    """Accuracy of VeRA less that of others, each pair from one seed, on the same sentences and steps."""
    rows: list[list[str]] = []
    for name in everywhere(runs):
        cells = [gaps(runs, name, domain) for domain in DOMAINS]
        every = [round(gap, 4) for cell in cells for gap in cell]
        if name != MANY and every:
            signs = (sum(gap > 0 for gap in every), every.count(0), sum(gap < 0 for gap in every))
            rows.append([name, *map(_gap, cells), " / ".join(map(str, signs))])
    return markdown((f"{MANY} less", *DOMAINS, "pairs: better / equal / worse"), rows)


def gaps(runs: Runs, name: str, domain: str) -> list[float]:
    """Accuracy of VeRA less that of another method, seed by seed."""
    ours = {r["seed"]: r["accuracy"] for r in plain(runs, MANY, domain)}
    theirs = plain(runs, name, domain)
    return [ours[r["seed"]] - r["accuracy"] for r in theirs if r["seed"] in ours]


def _gap(gaps: Sequence[float]) -> str:
    if not gaps:
        return "not run"
    low, high = (f"{100 * gap:+.1f}" for gap in (min(gaps), max(gaps)))
    return f"{100 * statistics.median(gaps):+.1f} ({low} to {high})"


def costs(runs: Runs) -> str:
    """CPU time and memory of training on `DEEP`."""
    rows: list[list[str]] = []
    for name in methods_in(runs, "text", "peft", "sizes"):
        mine = plain(runs, name, DEEP) or of(runs, stage="peft", method=name)
        if mine:
            held = middle(mine, "step_bytes") + middle(mine, "moments_bytes")
            seconds, step = middle(mine, "train_cpu_s"), middle(mine, "step_ms")
            rows.append([name, f"{seconds:.1f}", f"{step:.0f}", f"{held / 2**20:.0f}"])
    return markdown(("method", "training, CPU s", "median step, CPU ms", "MiB of a step"), rows)


def sweep(runs: Runs, task: str) -> str:
    """Validation accuracy and loss under each rate; the chosen one is bold."""
    best = chosen(runs)
    found = of(runs, stage="sweep", task=task)
    rates = sorted({r["lr"] for r in found})
    rows: list[list[str]] = []
    for name in dict.fromkeys(r["method"] for r in found):
        cells = [_rate(runs, task, name, rate, best[task == "digits", name]) for rate in rates]
        rows.append([name, *cells])
    return markdown(("method", *(f"{rate:g}" for rate in rates)), sorted(rows))


def _rate(runs: Runs, task: str, name: str, rate: float, best: float) -> str:
    found = of(runs, stage="sweep", task=task, method=name, lr=rate)
    if not found:
        return ""
    cell = f"{percent(middle(found))} ({middle(found, 'loss'):.2f})"
    return f"**{cell}**" if rate == best else cell


def images(runs: Runs) -> str:
    """Every method on the digits."""
    share = of(runs, stage="labels", task="digits")[0]["accuracy"]
    rows = [["always the commoner label", "", "0", "", percent(share)]]
    for name in methods_in(runs, "images"):
        found = of(runs, stage="images", method=name)
        rows.append([name, *_facts(found[0]), spread(found)])
    return markdown(("method", "rate", "trained", "float32", "accuracy"), rows)


def sizes(runs: Runs) -> str:
    """Accuracy against parameters, on `DEEP`."""
    rows: list[list[str]] = []
    for name in methods_in(runs, "text", "sizes"):
        found = plain(runs, name, DEEP)
        if found:
            rows.append([name, *_facts(found[0]), spread(found)])
    return markdown(("method", "rate", "trained", "float32", DEEP), rows)


def ablations(runs: Runs) -> str:
    """What VeRA is without each of its parts, on `DEEP`, beside the paper's figures."""
    rows = [
        ["both train", spread(of(runs, stage="text", task=DEEP, method=MANY)), PAPER["both train"]]
    ]
    for name, paper in list(PAPER.items())[1:]:
        rows.append([name, spread(of(runs, stage="ablation", method=name)), paper])
    return markdown(("what", DEEP, "paper: MRPC / RTE"), rows)


def _differ(one: Result, other: Result) -> int:
    return sum(a != b for a, b in zip(one["predictions"], other["predictions"], strict=True))


def peft(runs: Runs) -> str:
    """Ours and PEFT's VeRA, seed by seed."""
    rows: list[list[str]] = []
    for theirs in of(runs, stage="peft"):
        ours = of(runs, stage="text", task=DEEP, method=MANY, seed=theirs["seed"])
        for mine in ours:
            cells = (percent(mine["accuracy"]), percent(theirs["accuracy"]))
            losses = (f"{mine['loss']:.4f}", f"{theirs['loss']:.4f}")
            rows.append([str(theirs["seed"]), *cells, *losses, str(_differ(mine, theirs))])
    head = ("seed", "vera_fx", "PEFT", "loss: vera_fx", "PEFT", "of 400 predictions differ")
    return markdown(head, rows)


def alone(runs: Runs) -> str:
    """`train_many` and training alone, rate by rate."""
    rows: list[list[str]] = []
    for single in of(runs, stage="alone"):
        (many,) = of(runs, stage="sweep", task=DEEP, method=MANY, lr=single["lr"])
        cells = (percent(many["accuracy"]), percent(single["accuracy"]))
        losses = (f"{many['loss']:.4f}", f"{single['loss']:.4f}")
        rows.append([f"{single['lr']:g}", *cells, *losses, str(_differ(many, single))])
    head = (
        "rate",
        "in one batch",
        "alone",
        "loss: in one batch",
        "alone",
        "of 300 predictions differ",
    )
    return markdown(head, rows)


TABLES = {
    "TEXT": text, "DIFFERENCES": differences, "COSTS": costs, "IMAGES": images, "SIZES": sizes,
    "ABLATIONS": ablations, "PEFT": peft, "ALONE": alone,
    "SWEEP": lambda runs: sweep(runs, DEEP), "SWEEP_DIGITS": lambda runs: sweep(runs, "digits"),
}  # fmt: skip
"""By the word that stands for a table in a page."""
