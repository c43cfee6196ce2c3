"""Run the branch's products in the base's half precision instead of in float32."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import Put, emit
from vera_fx.passes.engine.graph import Tag, tag_of, tensor_of
from vera_fx.passes.engine.memo import Memo
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Rewrite
from vera_fx.passes.sites.inserted import InsertedBranch, erase_unused, input_of, inserted_branches

aten = torch.ops.aten

_ME = "LowerBranch"
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class LowerBranch:
    """Let ``x @ A.T`` and ``h @ B.T`` multiply in bfloat16 or float16 where the base does.

    PEFT casts the activations of a half-precision base up and runs the branch in float32, at a
    quarter of the speed or less. Here the products take half-precision operands and accumulate in
    float32, as the base's own products do; the vectors, the pointwise steps and the sum with the
    base stay in float32. A and B lose nothing: they were rounded to the base's dtype when drawn.

    Before::

        %lin_weight: bf16[5, 3] = lin.weight
        %lin_bias: bf16[5] = lin.bias
        %x: bf16[s0, 3] = input
        %slot_vera_a: f32[2, 4] = slot.vera_A
        %slot_vera_b: f32[7, 2] = slot.vera_B
        %slot_lambda_d: f32[2] = slot.lambda_d
        %slot_lambda_b: f32[5] = slot.lambda_b
        %linear: bf16[s0, 5] = linear(%x, %lin_weight, %lin_bias)
        %cast_in: f32[s0, 3] = to.dtype(%x, torch.float32)
        %cut_A: f32[2, 3] = slice(%slot_vera_a, 1, 0, 3)
        %z: f32[s0, 2] = linear(%cast_in, %cut_A)
        %h: f32[s0, 2] = mul(%z, %slot_lambda_d)
        %cut_B: f32[5, 2] = slice(%slot_vera_b, 0, 0, 5)
        %u: f32[s0, 5] = linear(%h, %cut_B)
        %update: f32[s0, 5] = mul(%u, %slot_lambda_b)
        %add: f32[s0, 5] = add(%linear, %update)
        %cast_out: bf16[s0, 5] = to.dtype(%add, torch.bfloat16)
        return [%cast_out]

    After::

        %lin_weight: bf16[5, 3] = lin.weight
        %lin_bias: bf16[5] = lin.bias
        %x: bf16[s0, 3] = input
        %slot_vera_a: f32[2, 4] = slot.vera_A
        %slot_vera_b: f32[7, 2] = slot.vera_B
        %slot_lambda_d: f32[2] = slot.lambda_d
        %slot_lambda_b: f32[5] = slot.lambda_b
        %linear: bf16[s0, 5] = linear(%x, %lin_weight, %lin_bias)
        %cut_A: f32[2, 3] = slice(%slot_vera_a, 1, 0, 3)
        %A_half: bf16[2, 3] = to.dtype(%cut_A, torch.bfloat16)
        %z_1: bf16[s0, 2] = linear(%x, %A_half)
        %h: f32[s0, 2] = mul(%z_1, %slot_lambda_d)
        %cut_B: f32[5, 2] = slice(%slot_vera_b, 0, 0, 5)
        %h_half: bf16[s0, 2] = to.dtype(%h, torch.bfloat16)
        %B_half: bf16[5, 2] = to.dtype(%cut_B, torch.bfloat16)
        %u_1: bf16[s0, 5] = linear(%h_half, %B_half)
        %update: f32[s0, 5] = mul(%u_1, %slot_lambda_b)
        %add: f32[s0, 5] = add(%linear, %update)
        %cast_out: bf16[s0, 5] = to.dtype(%add, torch.bfloat16)
        return [%cast_out]

    Needs: branches inserted by `InsertBranches`.
    Keeps: values and gradients to the rounding of the base's dtype.
    Skips: nothing; a branch in the base's dtype is left as it is.
    """

    enabled: bool = True
    """False where PEFT's own arithmetic was asked for."""

    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Lower every branch whose input was cast up."""
        rewrites: list[Rewrite] = []
        memo = Memo()
        for branch in inserted_branches(gm) if self.enabled else ():
            source = _half_source(branch)
            if source is not None:
                dtype = tensor_of(source).dtype
                _lower(gm, branch, source, memo)
                name = str(dtype).removeprefix("torch.")
                rewrites.append(Rewrite(branch.site, Action.PRODUCTS_LOWERED, name))
        return PassReport(tuple(rewrites))


def _half_source(branch: InsertedBranch) -> Node | None:
    """The half-precision input that was cast up for this branch; None if there was no cast."""
    node = branch.x
    if branch.has_dropout:
        node = input_of(node)
    tag = tag_of(node)
    if tag is None or tag.role != "cast_in":
        return None
    source = input_of(node)
    return source if tensor_of(source).dtype in _HALF else None


def _lower(gm: GraphModule, branch: InsertedBranch, source: Node, memo: Memo) -> None:
    dtype = tensor_of(source).dtype
    # Dropout stays in float32, so that its masks are PEFT's.
    lowered = None if branch.has_dropout else source
    for product, projection in branch.products:
        with gm.graph.inserting_before(product):
            put = Put(gm, _ME, branch.site, product, memo)
            x = lowered or put.cast(input_of(product), dtype, role=f"{_letter(product)}_half")
            A = put.cast(input_of(product, 1), dtype, role=f"{projection}_half", shared=True)
            tag = tag_of(product) or Tag(_ME, branch.site)
            new = emit(gm, aten.linear.default, (x, A), like=product, tag=tag, memo=memo)
        product.replace_all_uses_with(new)
        lowered = None
    erase_unused(gm, *(product for product, _ in reversed(branch.products)))


def _letter(product: Node) -> str:
    """What the input of a product is called: ``x``, or the role of what made it."""
    tag = tag_of(input_of(product))
    return "x" if tag is None or tag.role in {"dropout", "cast_in"} else tag.role
