"""Give every row of the batch its own adapter."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import emit, fake_mode_of
from vera_fx.passes.engine.graph import Tag, first_body_node, is_call, node_arg, tensor_of
from vera_fx.passes.engine.protocol import Numerics, RowError, SiteError
from vera_fx.passes.engine.reports import Action, PassReport, Rewrite
from vera_fx.passes.rows.facts import row_facts
from vera_fx.passes.rows.operands import placed, row_product
from vera_fx.passes.rows.rules import is_pointwise
from vera_fx.passes.rows.vocabulary import Lost, RowFacts, Rows, Size, same, shape_of
from vera_fx.passes.sites.trained_bias import is_change, total_of_change

aten = torch.ops.aten

_ME = "RowVectors"


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where the rows' own values of an attribute come from.

    Attributes:
        path: the attribute as the graph reads it now, the same for every row.
        table: name of the graph's new input that holds the values, row by row.
        start: first column there of this attribute's values.
        shape: the attribute's shape; one of more than one dimension has an input to itself.
    """

    path: str
    table: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowVectors:
    """Read vectors (and trained biases and heads) row by row from inputs of the graph.

    Which row a position belongs to is followed through the whole graph (`row_facts`); where that
    cannot be proven, the graph is refused. The products by A and B stay one for the whole batch.

    Before::

        %lin_weight: f32[5, 3] = lin.weight
        %lin_bias: f32[5] = lin.bias
        %x: f32[s0, 3] = input
        %slot_vera_a: f32[2, 4] = slot.vera_A
        %slot_vera_b: f32[7, 2] = slot.vera_B
        %slot_lambda_d: f32[2] = slot.lambda_d
        %slot_lambda_b: f32[5] = slot.lambda_b
        %linear: f32[s0, 5] = linear(%x, %lin_weight, %lin_bias)
        %cut_A: f32[2, 3] = slice(%slot_vera_a, 1, 0, 3)
        %z: f32[s0, 2] = linear(%x, %cut_A)
        %h: f32[s0, 2] = mul(%z, %slot_lambda_d)
        %cut_B: f32[5, 2] = slice(%slot_vera_b, 0, 0, 5)
        %u: f32[s0, 5] = linear(%h, %cut_B)
        %update: f32[s0, 5] = mul(%u, %slot_lambda_b)
        %add: f32[s0, 5] = add(%linear, %update)
        return [%add]

    After::

        %lin_weight: f32[5, 3] = lin.weight
        %lin_bias: f32[5] = lin.bias
        %x: f32[s0, 3] = input
        %rows: f32[s0, 7] = input
        %slot_vera_a: f32[2, 4] = slot.vera_A
        %slot_vera_b: f32[7, 2] = slot.vera_B
        %linear: f32[s0, 5] = linear(%x, %lin_weight, %lin_bias)
        %cut_A: f32[2, 3] = slice(%slot_vera_a, 1, 0, 3)
        %z: f32[s0, 2] = linear(%x, %cut_A)
        %row: f32[s0, 2] = slice(%rows, 1, 0, 2)
        %h: f32[s0, 2] = mul(%z, %row)
        %cut_B: f32[5, 2] = slice(%slot_vera_b, 0, 0, 5)
        %u: f32[s0, 5] = linear(%h, %cut_B)
        %row_1: f32[s0, 5] = slice(%rows, 1, 2, 7)
        %update: f32[s0, 5] = mul(%u, %row_1)
        %add: f32[s0, 5] = add(%linear, %update)
        return [%add]

    Needs: branches inserted by `InsertVera`, before any other pass rewrites them.
    Keeps: every value, where all rows have the values of the attribute.
    Skips: nothing.
    """

    sources: tuple[RowSource, ...] = ()
    batched: frozenset[int] = frozenset()
    """Numbers of the inputs whose first dimension is the rows'."""
    widths: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()
    """The new inputs in order: name, sizes after the first dimension, dtype."""
    tokenwise: frozenset[str] = frozenset()
    """Paths of modules that keep rows apart although their operators do not (`row_facts`)."""

    numerics: ClassVar[Numerics] = Numerics.INTENDED

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Rewrite every use of the sources.

        Raises:
            RowError: sites whose positions cannot be told apart by row, and copies that are used in
                a way that cannot be made to differ by row: all of them. The graph is spoilt then.
        """
        if not self.sources or self._is_done(gm):
            return PassReport(())
        facts = row_facts(gm, self.batched, self.tokenwise)
        inputs = self._add_inputs(gm, facts)
        by_path = {source.path: source for source in self.sources}
        if not _is_single(facts):
            _split_affine(gm, frozenset(by_path), facts)
        reads = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target in by_path]
        found = {
            str(n.target): self._refused(gm, n, by_path[n.target], inputs, facts) for n in reads
        }
        lost = {path: reason for path, reason in found.items() if reason is not None}
        if lost:
            raise RowError(lost)
        done = tuple(Rewrite(str(node.target), Action.READ_BY_ROW) for node in reads)
        for node in reads:
            gm.graph.erase_node(node)
        return PassReport(done or (Rewrite("", Action.INPUTS_ADDED),))

    def _refused(self, gm: GraphModule, node: Node, source: RowSource, *where: Any) -> str | None:
        """Rewrite one read; the reason if that cannot be done."""
        try:
            self._replace(gm, node, source, *where)
        except SiteError as error:
            return str(error)
        return None

    def _replace(
        self,
        gm: GraphModule,
        node: Node,
        source: RowSource,
        inputs: dict[str, Node],
        facts: RowFacts,
    ) -> None:
        table = inputs[source.table]
        if not _is_single(facts):
            for user in list(node.users):
                _rewrite(gm, node, user, table, source, facts)
            return
        tag = Tag(_ME, source.path, "row")
        with gm.graph.inserting_before(first_body_node(gm.graph)):
            row = _columns(gm, table, source, table, tag)
            row = emit(gm, aten.select.int, (row, 0, 0), like=table, tag=tag)
        node.replace_all_uses_with(row)

    def _is_done(self, gm: GraphModule) -> bool:
        names = {name for name, _, _ in self.widths}
        return any(n.op == "placeholder" and n.target in names for n in gm.graph.nodes)

    def _add_inputs(self, gm: GraphModule, facts: RowFacts) -> dict[str, Node]:
        existing = [node for node in gm.graph.nodes if node.op == "placeholder"]
        like, batch = existing[min(self.batched)], self._batch(gm, facts)
        after, found = existing[-1], dict[str, Node]()
        for name, sizes, dtype in self.widths:
            with gm.graph.inserting_after(after):
                after = found[name] = gm.graph.placeholder(name)
            with torch.no_grad(), fake_mode_of(like):
                device = tensor_of(like).device
                after.meta["val"] = torch.empty((batch, *sizes), dtype=dtype, device=device)
            facts.learn(after, Rows(0, batch))
        return found

    def _batch(self, gm: GraphModule, facts: RowFacts) -> Size:
        """The number of rows as the first site has it."""
        paths = {source.path for source in self.sources}
        reads = (n for n in gm.graph.nodes if n.op == "get_attr" and n.target in paths)
        uses = (facts.of(n) for read in reads for user in read.users for n in user.all_input_nodes)
        return next((f.batch for f in uses if isinstance(f, Rows)), facts.batches[0])


def _is_single(facts: RowFacts) -> bool:
    return same(facts.batches[0], 1)


def _split_affine(gm: GraphModule, paths: frozenset[str], facts: RowFacts) -> None:
    """Take biases and norms' weights that differ by row out of the operators that include them."""
    for node in list(gm.graph.nodes):
        if not any(n.op == "get_attr" and n.target in paths for n in node.all_input_nodes):
            continue
        if is_call(node, aten.linear.default) and _reads(node, 2, paths):
            _apart(gm, node, (node.args[0], node.args[1]), aten.linear.default, (2,), facts)
        elif is_call(node, aten.addmm.default) and _reads(node, 0, paths):
            _apart(gm, node, node.args[1:3], aten.mm.default, (0,), facts)
        elif is_call(node, aten.layer_norm.default):
            args = (*node.args[:2], None, None, *node.args[4:])
            _apart(gm, node, args, aten.layer_norm.default, (2, 3), facts)


def _reads(node: Node, index: int, paths: frozenset[str]) -> bool:
    operand = node_arg(node, index)
    return operand is not None and operand.op == "get_attr" and operand.target in paths


def _apart(
    gm: GraphModule,
    node: Node,
    args: tuple[Any, ...],
    target: Any,
    affine: tuple[int, ...],
    facts: RowFacts,
) -> None:
    """``op(..., weight, bias)`` as ``op(...) * weight + bias``."""
    tag = Tag(_ME, "", "apart")
    with gm.graph.inserting_before(node):
        result = emit(gm, target, args, like=node, tag=tag)
        facts.learn(result, facts.of(node))
        for index in affine:
            operand = node_arg(node, index)
            if operand is not None:
                step = aten.mul.Tensor if index == 2 and len(affine) == 2 else aten.add.Tensor  # noqa: PLR2004
                result = emit(gm, step, (result, operand), like=node, tag=tag)
                facts.learn(result, facts.of(node))
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _rewrite(
    gm: GraphModule, attr: Node, user: Node, table: Node, source: RowSource, facts: RowFacts
) -> None:
    tag = Tag(_ME, source.path, "row")
    others = [n for n in user.all_input_nodes if n is not attr]
    with gm.graph.inserting_before(user):
        if is_change(user):
            total = total_of_change(user)
            value = _columns(gm, table, source, total, tag)
            value = emit(gm, aten.sub.Tensor, (value, others[0]), like=total, tag=tag)
            user.replace_all_uses_with(placed(gm, _rows_at(total, facts), total, value, tag))
            gm.graph.erase_node(user)
        elif is_pointwise(user) and len(others) == 1 and len(source.shape) == 1:
            rows = _rows_at(others[0], facts)
            value = _columns(gm, table, source, others[0], tag)
            user.replace_input_with(attr, placed(gm, rows, others[0], value, tag))
        elif _weight_of(user) is attr:
            x = cast("Node", user.args[0])
            weight = (
                table
                if is_call(user, aten.linear.default)
                else emit(gm, aten.transpose.int, (table, 1, 2), like=x, tag=tag)
            )
            product = row_product(gm, _rows_at(x, facts), x, weight, tag)
            facts.learn(product, facts.of(user))
            user.replace_all_uses_with(product)
            gm.graph.erase_node(user)
        else:
            raise SiteError(
                f"its own copy is used by {user.target} ({user.name}), which cannot take another value "
                "for every row"
            )


def _weight_of(user: Node) -> Node | None:
    is_product = is_call(user, aten.linear.default, aten.mm.default) and len(user.args) == 2  # noqa: PLR2004
    return node_arg(user, 1) if is_product else None


def _rows_at(node: Node, facts: RowFacts) -> Rows:
    fact = facts.of(node)
    if isinstance(fact, Rows):
        return fact
    reason = fact.reason if isinstance(fact, Lost) else f"{node.name} is the same for every row"
    raise SiteError(f"the rows of the batch cannot be told apart there: {reason}")


def _columns(gm: GraphModule, table: Node, source: RowSource, like: Node, tag: Tag) -> Node:
    if len(source.shape) != 1 or shape_of(table)[1] == source.shape[0]:
        return table
    size = source.shape[0]
    args = (table, 1, source.start, source.start + size)
    return emit(gm, aten.slice.Tensor, args, like=like, tag=tag)
