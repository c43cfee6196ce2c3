"""Graph-to-graph passes. They know torch and torch.fx, nothing of configs, files or models."""

from dataclasses import dataclass, field

from vera_fx.passes.checkpoint_layers import CheckpointLayers
from vera_fx.passes.contiguous_attention import ContiguousAttention
from vera_fx.passes.dense_products import DenseProducts
from vera_fx.passes.drop_idle_dropout import DropIdleDropout
from vera_fx.passes.drop_metadata_asserts import DropMetadataAsserts
from vera_fx.passes.engine.emit import Put
from vera_fx.passes.engine.functions import call_module, recomputed
from vera_fx.passes.engine.graph import (
    META_KEY,
    Tag,
    is_call,
    module_paths,
    resolve,
    tag_of,
    tensor_of,
    written_attributes,
    written_between,
    written_inputs,
)
from vera_fx.passes.engine.outlining import outline_whole
from vera_fx.passes.engine.protocol import (
    GraphPass,
    Numerics,
    PassContractError,
    RowError,
    SiteError,
)
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip, Why
from vera_fx.passes.engine.runner import PassRecord, PipelineReport, RunOptions, run_passes
from vera_fx.passes.engine.text import graph_text
from vera_fx.passes.fold_weights import FoldWeights
from vera_fx.passes.inline_grad_mode import InlineGradMode
from vera_fx.passes.insert_branches import InsertBranches
from vera_fx.passes.lower_branch import LowerBranch
from vera_fx.passes.merge_weight import MergeWeight
from vera_fx.passes.outline_layers import OutlineLayers, is_outlined
from vera_fx.passes.plans.choose import SiteGroup, allowed, choose_plans, site_groups
from vera_fx.passes.plans.devices import CPU, DEVICES, Device
from vera_fx.passes.plans.layer_time import LayerTime, concrete
from vera_fx.passes.plans.plan import OPEN, PLANS, Assignment, Choice, PlanCosts, Workload
from vera_fx.passes.recompute_in_backward import RecomputeInBackward
from vera_fx.passes.redirect_parameters import Redirect, RedirectParameters
from vera_fx.passes.row_vectors import RowSource, RowVectors
from vera_fx.passes.scale_branch import ScaleBranch
from vera_fx.passes.share_projection import ShareProjection
from vera_fx.passes.sites.called_module import CalledModule, called_modules
from vera_fx.passes.sites.cut import Cut
from vera_fx.passes.sites.find import Site, SiteSearch, find_sites
from vera_fx.passes.sites.inserted import InsertedBranch, input_of, past_cast
from vera_fx.passes.sites.kinds import Branch, BranchGraph
from vera_fx.passes.sites.products import BaseCall, BaseProduct
from vera_fx.passes.sites.read_weight import ReadWeight
from vera_fx.passes.sites.target import Target
from vera_fx.passes.zero_masked_rows import ZeroMaskedRows

__all__ = [
    "CPU",
    "DEVICES",
    "FOR_EXPORTS",
    "META_KEY",
    "OPEN",
    "ORDER",
    "PLANS",
    "Action",
    "AdaptationPlan",
    "Assignment",
    "BaseCall",
    "BaseProduct",
    "Branch",
    "BranchGraph",
    "CalledModule",
    "CheckpointLayers",
    "Choice",
    "ContiguousAttention",
    "Cut",
    "DenseProducts",
    "Device",
    "DropIdleDropout",
    "DropMetadataAsserts",
    "FoldWeights",
    "GraphPass",
    "InlineGradMode",
    "InsertBranches",
    "InsertedBranch",
    "LayerTime",
    "LowerBranch",
    "MergeWeight",
    "Numerics",
    "OutlineLayers",
    "PassContractError",
    "PassRecord",
    "PassReport",
    "PipelineReport",
    "PlanCosts",
    "Put",
    "ReadWeight",
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
    "call_module",
    "called_modules",
    "choose_plans",
    "cleanup",
    "concrete",
    "find_sites",
    "graph_text",
    "input_of",
    "is_call",
    "is_outlined",
    "module_paths",
    "outline_whole",
    "past_cast",
    "recomputed",
    "resolve",
    "run_passes",
    "site_groups",
    "tag_of",
    "tensor_of",
    "training",
    "written_attributes",
    "written_between",
    "written_inputs",
]


ORDER: tuple[type[GraphPass], ...] = (
    InlineGradMode,
    DropMetadataAsserts,
    DropIdleDropout,
    InsertBranches,
    RedirectParameters,
    RowVectors,
    LowerBranch,
    ShareProjection,
    MergeWeight,
    ScaleBranch,
    CheckpointLayers,
    RecomputeInBackward,
    OutlineLayers,
)
"""All passes that a graph goes through, in order: `cleanup`, `adaptation`, `training`."""

FOR_EXPORTS: tuple[type[GraphPass], ...] = (
    FoldWeights,
    DenseProducts,
    ContiguousAttention,
    ZeroMaskedRows,
)
"""Passes over graphs that leave the library."""


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
        InsertBranches(plan.targets, plan.branches),
        RedirectParameters(plan.redirects),
        plan.rows,
        LowerBranch(enabled=not assignment.exact),
        ShareProjection(),
        MergeWeight(assignment.merged, assignment.dense),
        ScaleBranch(assignment.scaled),
        CheckpointLayers(checkpointed),
    )


def training(assignment: Assignment, outline: OutlineLayers) -> tuple[GraphPass, ...]:
    """The passes over an adapted graph that is to be trained, in order.

    Args:
        assignment: how each site's branch is computed.
        outline: which layers are to share a body.
    """
    return (RecomputeInBackward(assignment.folds_again), outline)
