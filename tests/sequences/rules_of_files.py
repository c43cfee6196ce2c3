"""Rules: what is written to files, and read back."""

import contextlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from safetensors.torch import load_file

import vera_fx
from tests.helpers import assert_close
from tests.sequences.state import NAMES, State, cache_folder, rows
from tests.sequences.world import WIDTHS


class OfFiles(State):
    """Saved and loaded, converted, exported, captured from disk."""

    @precondition(lambda self: len(self.world.adapters) < len(NAMES) and self.world.adapters)
    @rule(data=st.data(), trainable=st.booleans())
    def save_and_load(self, data: st.DataObject, trainable: bool) -> None:
        world = self.world
        source = data.draw(st.sampled_from(sorted(world.adapters)))
        name = data.draw(st.sampled_from([n for n in NAMES if n not in world.adapters]))
        with tempfile.TemporaryDirectory() as folder:
            vera_fx.save_adapter(self.model, folder, adapter_name=source)
            vera_fx.load_adapter(self.model, folder, adapter_name=name, trainable=trainable)
        world.adapters[name] = world.adapters[source].copied()
        world.adapters[name].trainable = world.adapters[name].learns = trainable
        if not world.active:
            world.activate([name])

    @precondition(lambda self: self.world.adapters)
    @rule(data=st.data())
    def to_lora(self, data: st.DataObject) -> None:
        """An adapter as it is now, whatever is merged or off, in LoRA's words."""
        name = data.draw(st.sampled_from(sorted(self.world.adapters)))
        one = self.world.adapters[name]
        with tempfile.TemporaryDirectory() as folder:
            vera_fx.to_lora(self.model, folder, name)
            found = load_file(Path(folder, "adapter_model.safetensors"))
        for path, (d, b) in one.vectors.items():
            n_in, n_out = WIDTHS[path]
            left, right = (found.pop(f"base_model.model.{path}.lora_{x}.weight") for x in "BA")
            expected = b[:, None] * one.B[:n_out] @ (d[:, None] * one.A[:, :n_in])
            assert_close(left @ right, expected, factor=20)
        own = {key: t for key, t in one.tensors().items() if "vera_lambda" not in key}
        assert found.keys() == own.keys()
        for key, tensor in own.items():
            assert_close(found[key], tensor.detach(), factor=20, what=key)

    @precondition(lambda self: self.world.adapters and self.exports < 1)
    @rule(data=st.data(), form=st.sampled_from(["merged", "constant"]))
    def export(self, data: st.DataObject, form: str) -> None:
        """A program computes what its adapter does now, on rows that it has not seen."""
        world = self.world
        name = data.draw(st.sampled_from(sorted(world.adapters)))
        if world.merged or self.model.training:
            with pytest.raises(vera_fx.ExportError):
                vera_fx.export_program(self.model, (rows((2, 5), 6),), adapter_name=name)
            return
        self.exports += 1
        quantised = world.kind == "quantised"
        with pytest.warns(match="dense weights") if quantised else contextlib.nullcontext():
            program = vera_fx.export_program(
                self.model, (rows((2, 5), 6),), adapter_name=name, form=form
            )
        x = rows((4, 5), 7)
        expected = world.output(x, [world.adapters[name]])
        assert_close(program.module()(x).detach(), expected.detach(), factor=20)

    @rule()
    def capture_on_disk(self) -> None:
        """From now on captures are kept, and read where an earlier sequence has made them; or no more."""
        if self.cache is None:
            self.cache = vera_fx.capture_cache(cache_folder().name)
        else:
            self.leave_cache()
