"""Figures in the sentences of docs/quality.md and docs/recipes.md, from the runs that there are."""

import statistics

from benchmarks.quality.tables import DEEP, DOMAINS, MANY, SEEDS, Runs, gaps, middle, of, plain

_HEAD = 770


def _leads(runs: Runs, name: str) -> list[float]:
    """By how many points a method is ahead of VeRA in the median pair of each domain."""
    found = [gaps(runs, name, domain) for domain in DOMAINS]
    return [-100 * statistics.median(pairs) for pairs in found if pairs]


def head_gain(runs: Runs) -> str:
    """Points of VeRA over the head, from domain to domain."""
    gains = sorted(-lead for lead in _leads(runs, "head"))
    return f"{gains[0]:.0f} to {gains[-1]:.0f}"


def lora_lead(runs: Runs) -> str:
    """Points of LoRA r=8 over VeRA."""
    leads = sorted(_leads(runs, "LoRA r=8"))
    return f"{leads[0]:.1f} to {leads[-1]:.1f}"


def dvora_lead(runs: Runs) -> str:
    """Points of DVoRA over VeRA, where it is ahead, and in how many domains that is."""
    leads = _leads(runs, "DVoRA r=256")
    ahead = sorted(lead for lead in leads if lead > 0)
    if not ahead:
        return f"in none of {len(leads)} domains"
    return f"in {len(ahead)} domains of {len(leads)} by {ahead[0]:.1f} to {ahead[-1]:.1f}"


def full_lead(runs: Runs) -> str:
    """Points of full fine-tuning over VeRA, and the seeds that there are."""
    words: list[str] = []
    for domain in DOMAINS:
        if pairs := gaps(runs, "full", domain):
            seeds = "" if len(pairs) == SEEDS else f" ({len(pairs)} of {SEEDS} seeds)"
            words.append(f"{-100 * statistics.median(pairs):.1f} on `{domain}`{seeds}")
    return ", ".join(words)


def _beside(runs: Runs, name: str) -> str:
    """Points between the medians of two methods on `DEEP`."""
    both = (middle(plain(runs, which, DEEP)) for which in (name, MANY))
    return f"{100 * abs(next(both) - next(both)):.1f}"


def _lost(runs: Runs, name: str) -> str:
    """Points that are lost in the median without a part."""
    whole = middle(of(runs, stage="text", task=DEEP, method=MANY))
    return f"{100 * (whole - middle(of(runs, stage='ablation', method=name))):.1f}"


def _trained(runs: Runs, name: str) -> int:
    return plain(runs, name, DEEP)[0]["trained"]


def _times(runs: Runs) -> str:
    """How many times VeRA's numbers LoRA r=8 trains, beside the head."""
    ours, theirs = (_trained(runs, name) - _HEAD for name in (MANY, "LoRA r=8"))
    return f"{theirs / ours:.1f}"


def _image_lead(runs: Runs) -> str:
    names = ("DVoRA r=64", "VeRA r=64")
    both = [middle(of(runs, stage="images", method=name)) for name in names]
    return f"{100 * (both[0] - both[1]):.1f}"


FACTS = {
    "head_gain": head_gain,
    "lora_lead": lora_lead,
    "dvora_lead": dvora_lead,
    "full_lead": full_lead,
    "lora_times": _times,
    "vera_numbers": lambda runs: f"{_trained(runs, MANY) - _HEAD:,}",
    "lora_1_numbers": lambda runs: f"{_trained(runs, 'LoRA r=1'):,}",
    "rank_64_numbers": lambda runs: f"{_trained(runs, 'VeRA r=64'):,}",
    "rank_256_numbers": lambda runs: f"{_trained(runs, MANY):,}",
    "rank_1024_numbers": lambda runs: f"{_trained(runs, 'VeRA r=1024'):,}",
    "lora_1_gap": lambda runs: _beside(runs, "LoRA r=1"),
    "all_linear": lambda runs: _beside(runs, f"{MANY}, all linear"),
    "rank_1024": lambda runs: _beside(runs, "VeRA r=1024"),
    "rank_64": lambda runs: _beside(runs, "VeRA r=64"),
    "without_d": lambda runs: _lost(runs, "only b trains"),
    "without_b": lambda runs: _lost(runs, "only d trains, from 0, b = 1"),
    "dvora_images": _image_lead,
}
"""By the word that stands for a figure in a sentence: ``<=word>``."""
