"""VeRA as a kind of branch."""

from vera_fx.branches.protocol import BranchKind, PlanWords
from vera_fx.branches.vera.config import VeraConfig
from vera_fx.branches.vera.costs import VeraCosts
from vera_fx.branches.vera.graph import VeraGraph
from vera_fx.branches.vera.maths import VeraMaths
from vera_fx.branches.vera.parameters import VeraParameters
from vera_fx.branches.vera.steps import vera_steps

_MERGED = "with E = b∘B∘d: one product by a merged weight"

VERA = BranchKind(
    name="VeRA",
    paper="arXiv 2310.11454",
    peft_type=VeraConfig.peft_type,
    config=VeraConfig,
    parameters=VeraParameters(),
    maths=VeraMaths(),
    graph=VeraGraph(),
    costs=VeraCosts(),
    steps=vera_steps,
    words={
        "factored": PlanWords("+ b∘((d∘z) Bᵀ)", "two thin products beside the base's"),
        "scaled": PlanWords("+ z Eᵀ", "with E = b∘B∘d, formed once per call"),
        "merged": PlanWords("by W + E A", f"{_MERGED}; gradients through z"),
        "dense": PlanWords("by W + E A", f"{_MERGED}; no z at all"),
    },
)
