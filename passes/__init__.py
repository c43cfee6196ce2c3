"""Graph-to-graph passes. They know torch and torch.fx, nothing of configs, files or models."""

from dataclasses import dataclass, field

from vera_fx.passes.checkpoint_layers import CheckpointLayers
from vera_fx.passes.contiguous_attention import ContiguousAttention
from vera_fx.passes.drop_idle_dropout import DropIdleDropout
from vera_fx.passes.drop_metadata_asserts import DropMetadataAsserts
from vera_fx.passes.engine.graph import META_KEY, Tag, graph_text, module_paths, resolve, tag_of
from vera_fx.passes.engine.protocol import (
    GraphPass,
    Numerics,
    PassContractError,
    RowError,
    SiteError,
)
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip, Why
from vera_fx.passes.engine.runner import PassRecord, PipelineReport, RunOptions, run_passes
from vera_fx.passes.fold_weights import FoldWeights
from vera_fx.passes.inline_grad_mode import InlineGradMode
from vera_fx.passes.insert_vera import Branch, InsertVera
from vera_fx.passes.lower_branch import LowerBranch
from vera_fx.passes.merge_weight import MergeWeight
from vera_fx.passes.outline_layers import OutlineLayers, is_outlined
from vera_fx.passes.plans.choose import (
    PLANS,
    Assignment,
    Choice,
    Costs,
    SiteGroup,
    Workload,
    allowed,
    choose_plans,
    site_groups,
)
from vera_fx.passes.recompute_in_backward import RecomputeInBackward
from vera_fx.passes.redirect_parameters import Redirect, RedirectParameters
from vera_fx.passes.row_vectors import RowSource, RowVectors
from vera_fx.passes.scale_branch import ScaleBranch
from vera_fx.passes.share_projection import ShareProjection
from vera_fx.passes.sites.find import Site, SiteSearch, Target, find_sites
from vera_fx.passes.zero_masked_rows import ZeroMaskedRows

__all__ = [
    "META_KEY",
    "PLANS",
    "Action",
    "AdaptationPlan",
    "Assignment",
    "Branch",
    "CheckpointLayers",
    "Choice",
    "ContiguousAttention",
    "Costs",
    "DropIdleDropout",
    "DropMetadataAsserts",
    "FoldWeights",
    "GraphPass",
    "InlineGradMode",
    "InsertVera",
    "LowerBranch",
    "MergeWeight",
    "Numerics",
    "OutlineLayers",
    "PassContractError",
    "PassRecord",
    "PassReport",
    "PipelineReport",
    "Reason",
    "RecomputeInBackward",
    "Redirect",
    "RedirectParameters",
    "Rewrite",
    "RowError",
    "RowSource",
    "RowVectors",
    "RunOptions",
    "ScaleBranch",
    "ShareProjection",
    "Site",
    "SiteError",
    "SiteGroup",
    "SiteSearch",
    "Skip",
    "Tag",
    "Target",
    "Why",
    "Workload",
    "ZeroMaskedRows",
    "adaptation",
    "allowed",
    "choose_plans",
    "cleanup",
    "find_sites",
    "graph_text",
    "is_outlined",
    "module_paths",
    "resolve",
    "run_passes",
    "site_groups",
    "tag_of",
    "training",
]


def cleanup() -> tuple[GraphPass, ...]:
    """The passes every captured graph gets, adapted or not. All BITWISE."""
    return (InlineGradMode(), DropMetadataAsserts(), DropIdleDropout())


@dataclass(frozen=True, slots=True)
class AdaptationPlan:
    """Everything the adapting passes need to know about the active adapters."""

    targets: tuple[Target, ...]
    branches: tuple[tuple[Branch, ...], ...]
    redirects: tuple[Redirect, ...] = ()
    rows: RowVectors = field(default_factory=RowVectors)


def adaptation(
    plan: AdaptationPlan, assignment: Assignment, checkpointed: frozenset[str] = frozenset()
) -> tuple[GraphPass, ...]:
    """The passes that turn a captured graph into an adapted graph, in order.

    Args:
        plan: the active adapters.
        assignment: how each site's branch is computed.
        checkpointed: paths of the layers to recompute in backward.
    """
    return (
        # First: it finds sites by the base's weights, which may be redirected as well.
        InsertVera(plan.targets, plan.branches),
        RedirectParameters(plan.redirects),
        plan.rows,
        LowerBranch(enabled=not assignment.exact),
        ShareProjection(),
        MergeWeight(assignment.merged, assignment.dense),
        ScaleBranch(assignment.scaled),
        CheckpointLayers(checkpointed),
    )


def training(assignment: Assignment, least: int) -> tuple[GraphPass, ...]:
    """The passes over an adapted graph that is to be trained, in order.

    Args:
        assignment: how each site's branch is computed.
        least: how many equal layers are to share a body.
    """
    return (RecomputeInBackward(assignment.folds_again), OutlineLayers(least))
