"""DVoRA as a kind of branch."""

from vera_fx.branches.dvora.config import DVoraConfig
from vera_fx.branches.dvora.costs import DVoraCosts
from vera_fx.branches.dvora.graph import DVoraGraph
from vera_fx.branches.dvora.maths import DVoraMaths
from vera_fx.branches.dvora.parameters import DVoraParameters
from vera_fx.branches.dvora.steps import dvora_steps
from vera_fx.branches.protocol import BranchKind, PlanWords

DVORA = BranchKind(
    name="DVoRA",
    paper="arXiv 2402.09353",
    peft_type=DVoraConfig.peft_type,
    config=DVoraConfig,
    parameters=DVoraParameters(),
    maths=DVoraMaths(),
    graph=DVoraGraph(),
    costs=DVoraCosts(),
    steps=dvora_steps,
    words={
        "factored": PlanWords(
            "+ (s-1)·Wx + s∘b∘((d∘z) Bᵀ)", "with s = m/|V|, V = W + E A: two thin products beside"
        ),
        "dense": PlanWords(
            "by m·V/|V|", "with V = W + E A, E = b∘B∘d: one product by a merged weight"
        ),
    },
    idle_at_zero=False,
    not_mixed="its magnitude is taken of the whole weight, one adapter at a time",
    not_peft="it knows no DVoRA; `vera_fx.to_lora` writes the DoRA adapter that computes the same",
    not_cut="its magnitude takes the norm of whole rows of the weight",
)
