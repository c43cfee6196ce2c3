"""How each operator carries the rows of the batch from its inputs to its output.

Every rule is a small proof: with the rows of the inputs as stated, a position of the output depends
on one row alone, and on that row's place in the input. Operators without a rule lose the rows.
"""

from collections.abc import Callable
from operator import getitem

from torch.fx import Node

from vera_fx.passes.engine.functions import call_module
from vera_fx.passes.rows import math as row_math
from vera_fx.passes.rows import moves as row_moves
from vera_fx.passes.rows.support import REDUCING, is_pointwise, lost, op_name
from vera_fx.passes.rows.vocabulary import Fact, Lost, RowFacts

Rule = Callable[[Node, RowFacts], Fact]


def fact_of(node: Node, facts: RowFacts) -> Fact:
    """What is known of the result of ``node``, from what is known of its inputs."""
    inputs = [facts.of(operand) for operand in node.all_input_nodes]
    for fact in inputs:
        if isinstance(fact, Lost):
            return fact
    name = op_name(node)
    if name == "arange":
        return row_moves.arange(node, facts)
    if not any(inputs):
        return None
    if node.target is call_module:
        return row_math.called(node, facts)
    rule = _RULES.get(name) or (row_math.pointwise if is_pointwise(node) else None)
    if node.target is getitem:
        return facts.of(node.args[0])
    return rule(node, facts) if rule is not None else lost(node, "is not known to keep rows apart")


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_KEEPING = "softmax _softmax log_softmax _log_softmax cumsum cumprod flip roll topk sort argsort"
_SAME = "to _to_copy alias clone contiguous detach detach_ dropout dropout_ lift_fresh_copy native_dropout"
_SHAPE_ONLY = (
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty sym_size"
)
_POOLS = "max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d"
_RULES: dict[str, Rule] = {
    **_named(row_math.along, f"{' '.join(REDUCING)} {_KEEPING}"),
    **_named(row_math.unchanged, _SAME),
    **_named(row_math.pointwise, "where masked_fill_ fill_ zero_ type_as __and__ __or__ __xor__"),
    **_named(row_math.independent, _SHAPE_ONLY),
    **_named(row_math.per_sample, f"conv1d conv2d conv3d group_norm {_POOLS}"),
    **_named(row_math.matmul, "matmul mm bmm addmm baddbmm"),
    **_named(row_math.normalised, "layer_norm rms_norm"),
    **_named(row_moves.reshape, "view reshape _unsafe_view flatten unflatten"),
    **_named(row_moves.transpose, "transpose permute t numpy_T mT"),
    **_named(row_moves.split, "split split_with_sizes chunk"),
    **_named(row_moves.pad, "pad constant_pad_nd"),
    "linear": row_math.linear,
    "scaled_dot_product_attention": row_math.attention,
    "embedding": row_math.embedding,
    "copy_": row_math.copied,
    "expand": row_moves.expand,
    "unsqueeze": row_moves.unsqueeze,
    "squeeze": row_moves.squeeze,
    "select": row_moves.select,
    "unbind": row_moves.select,
    "slice": row_moves.cut,
    "cat": row_moves.cat,
    "stack": row_moves.stack,
    "index": row_moves.index,
    "gather": row_moves.gather,
    "repeat": row_moves.repeat,
    "repeat_interleave": row_moves.repeat_interleave,
}
