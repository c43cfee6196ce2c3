"""What passes and the chooser tell: codes and data, which reports turn into words."""

import enum
from dataclasses import dataclass


class Action(enum.Enum):
    """What a pass did. The text is for people, who may be told what else it involved."""

    BRANCH_ADDED = "branch added at {other}"
    BRANCH_SCALED = "branch added by one scaled product"
    CHECK_ERASED = "check erased"
    DROPOUT_ERASED = "idle dropout erased"
    GRADIENTS_INLINED = "inlined, gradients {other}"
    INPUT_RECOMPUTED = "input {other} recomputed"
    INPUTS_ADDED = "inputs added"
    LAYER_CHECKPOINTED = "{count} nodes recomputed in backward"
    LAYER_OUTLINED = "{count} nodes in {other}"
    LAYER_OUTLINED_FOR_ITS_WORK = "{count} nodes in {other}: a step of one layer takes about {role}"
    MADE_CONTIGUOUS = "its output is contiguous"
    MERGED_THROUGH_X = "weight merged, vector gradients through G.T @ x"
    MERGED_THROUGH_Z = "weight merged, vector gradients through G.T @ z"
    PRODUCTS_LOWERED = "products in {other}"
    READ_BY_ROW = "read row by row"
    REDIRECTED = "reads {other}"
    ROWS_ZEROED = "rows that may look at no key give zeros"
    SHARED = "{role} shared with {other}"
    WEIGHT_RECOMPUTED = "merged weight recomputed"


class Reason(enum.Enum):
    """Why something was left alone, or why a plan was chosen."""

    # of passes
    CALLED = "the base's weight is read by its own module alone"
    DROPS_INPUT = "the branch drops elements of its input, the base does not"
    HOST_BOUND = "a step of one such layer takes about {other}, too little for a call of its own"
    MASK_ADDITIVE = "its mask is additive"
    NEVER_CALLED = "never called in this graph"
    NEVER_READ = "never read in this graph"
    NO_SUCH_PLAN = "this kind of branch has no such plan"
    OTHER_DTYPES = "the products of branch and base are in different dtypes"
    OWN_MASKS = "adapter dropout draws its own mask at every site"
    SEVERAL_HERE = "several adapters are active at this site"
    WRITTEN_BETWEEN = "{other} may be changed in place before it"
    # of the chooser
    ASKED_FOR = "asked for"
    AUTOCAST = "autocast, under which only the factored plan rounds as PEFT does"
    CHEAPEST = "{tokens} tokens: {costs}"
    DROPOUT = "dropout on the branch's input, which only the factored plan can do"
    LEANEST = "{tokens} tokens, what keeps least for backward: {costs}"
    NARROW = "small gradients would vanish in more than one product in float16"
    PER_ROW = "rows have adapters of their own"
    SEVERAL_ACTIVE = "several adapters are active"
    SLOW_HALF = "products in float32, as this processor multiplies half precision slowly"
    TIMED = "{tokens} tokens, timed: {costs}"


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One change of the graph.

    Attributes:
        subject: the site, node or path that it is about.
        action: what was done.
        other: the other node, path, body or dtype involved, if any.
        role: which of the subject's nodes, by the role in its tag, if that matters.
        count: how many nodes, if that matters.
    """

    subject: str
    action: enum.Enum
    other: str = ""
    role: str = ""
    count: int = 0

    def __str__(self) -> str:
        words = {"other": self.other, "role": self.role, "count": self.count}
        return str(self.action.value).format(**words)


@dataclass(frozen=True, slots=True)
class Skip:
    """A candidate that a pass left alone, and why. Read by users: names the cause, not the code."""

    subject: str
    reason: enum.Enum
    other: str = ""

    def __str__(self) -> str:
        return str(self.reason.value).format(other=self.other)


@dataclass(frozen=True, slots=True)
class Why:
    """Why a site has its plan.

    Attributes:
        reason: the code.
        tokens: rows of the site's input for the sizes at hand, where costs decided.
        costs: each plan's cost as a share of the factored plan's, where costs decided.
    """

    reason: Reason
    tokens: int = 0
    costs: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        shares = ", ".join(f"{plan} {cost:.2f}" for plan, cost in self.costs)
        return self.reason.value.format(tokens=self.tokens, costs=shares)


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did to one graph."""

    rewrites: tuple[Rewrite, ...] = ()
    skips: tuple[Skip, ...] = ()

    @property
    def changed(self) -> bool:
        """True if the graph differs; derived, so that a pass cannot misreport it."""
        return bool(self.rewrites)
