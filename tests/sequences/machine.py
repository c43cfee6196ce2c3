"""Any sequence of calls of the public API, held against a world of plain data."""

from hypothesis.stateful import invariant

import vera_fx
from tests.sequences.rules_of_adapters import OfAdapters
from tests.sequences.rules_of_calls import OfCalls
from tests.sequences.rules_of_files import OfFiles
from tests.sequences.rules_of_folding import OfFolding


class Machine(OfAdapters, OfCalls, OfFiles, OfFolding):
    """All rules, and what always holds."""

    @invariant()
    def base_is_what_it_was(self) -> None:
        if self.world.disabled or not self.world.merged:
            self.follow_base()

    @invariant()
    def says_what_is_on(self) -> None:
        world = self.world
        assert sorted(vera_fx.adapter_names(self.model)) == sorted(world.adapters)
        assert vera_fx.active_adapters(self.model) == ([] if world.disabled else world.active)
        assert list(self.model.vera.merged) == world.merged
        found = vera_fx.explain(self.model)
        assert list(found.active) == world.computing()
        assert list(found.merged) == ([] if world.disabled else world.merged)
        assert found.disabled == bool(world.disabled)
        training = {n for n, p in self.model.named_parameters() if p.requires_grad}
        assert {n.split(".")[2] for n in training} == set(world.trained())
        assert len(training) == sum(map(len, world.trained().values()))

    @invariant()
    def vectors_are_their_own(self) -> None:
        for name in self.world.adapters:
            self.assert_vectors(name)
