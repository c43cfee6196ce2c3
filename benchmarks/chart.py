"""Draw what `python -m benchmarks` wrote: overhead over the frozen base, beside the hardware's limit.

python -m benchmarks.chart out/bench.svg
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

COLOURS = {"peft": "#8a8f98", "lora r=8": "#c9a227", "ours": "#1f6feb"}


def draw(results: list[dict[str, Any]], target: Path) -> None:
    """One group of bars per case: overhead as a share of the floor; a mark at the products' time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vera_fx"  # the same numbers give the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.62 * len(results) + 1.2), layout="constrained")
    height = 0.8 / len(COLOURS)
    for row, result in enumerate(results):
        timings = result["timings"]
        floor = timings["floor"]
        for number, (name, colour) in enumerate(COLOURS.items()):
            if name not in timings:
                continue
            at = row + (number - 1) * height
            share = (timings[name]["median"] - floor["median"]) / floor["median"]
            limit = (timings[name]["limit"] - floor["limit"]) / floor["median"]
            axes.barh(at, share, height * 0.9, color=colour, label=name if row == 0 else None)
            axes.plot([limit, limit], [at - height / 2, at + height / 2], color="black", lw=1.2)
    axes.set_yticks(range(len(results)), [label(result["case"]) for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("training step beyond the frozen base, as a share of it; line: products alone")
    figure.legend(loc="outside upper center", ncols=len(COLOURS), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, metadata={"Date": None})


def label(case: dict[str, Any]) -> str:
    """A case in a few words."""
    tokens = case["batch"] * case["length"]
    dtype = "bf16" if "bfloat16" in case["dtype"] else "fp32"
    return f"{case['family']} r={case['r']}, {dtype}\n{tokens:,} tokens, {case['layers']} layers"


def main(
    target: Annotated[Path, typer.Argument(help="an .svg file")],
    source: Annotated[Path, typer.Option()] = Path("out/bench.json"),
) -> None:
    """Draw the chart."""
    draw(json.loads(source.read_text())["results"], target)


if __name__ == "__main__":
    typer.run(main)
