"""A module that is to be adapted, as graphs know it."""

from dataclasses import dataclass

from vera_fx.passes.sites.cut import Cut
from vera_fx.passes.sites.products import BaseProduct


@dataclass(frozen=True, slots=True)
class Target:
    """A module chosen for adaptation, as the graph knows it.

    Attributes:
        path: the module's path in the model.
        in_features: width of its input.
        out_features: width of its output.
        product: how its own product shows in graphs.
        weights: every attribute path under which the weight can appear in a graph: more than the
            module's own if the parameter is tied to another module's, none if it is computed
            (``torch.nn.utils.parametrize``).
        aliases: further paths of the very same module, if it is registered more than once.
        cut: how its product is cut over processes; None if it is not. Sizes are those of the whole.
    """

    path: str
    in_features: int
    out_features: int
    product: BaseProduct
    weights: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    cut: Cut | None = None

    @property
    def is_called(self) -> bool:
        """True if graphs call the module, whose weight only its own code reads."""
        return not self.product.layout

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path under which the module can make a call."""
        return (self.path, *self.aliases)

    @property
    def columns_in(self) -> slice:
        """Those of its input features that a call in this process sees."""
        return self._columns("in", self.in_features)

    @property
    def columns_out(self) -> slice:
        """Those of its output features that a call in this process gives."""
        return self._columns("out", self.out_features)

    def _columns(self, of: str, whole: int) -> slice:
        if self.cut is None or self.cut.of != of:
            return slice(0, whole)
        return slice(self.cut.start, self.cut.start + self.cut.size)
