"""A kept capture gives what an export gives, in every kind of call, and needs none."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.helpers import fill_vectors, loss_of, main_output, vectors_of
from tests.models import BY_NAME, Family, llama, params, tokens
from vera_fx import VeraConfig
from vera_fx.errors import CaptureCacheWarning

Exports = Callable[[], int]


def adapted(family: Family, **fields: Any) -> nn.Module:
    torch.manual_seed(3)
    model = family.build()
    vera_fx.adapt(model, VeraConfig(r=5, **{**family.config, **fields}))
    fill_vectors(model)
    return model


def results(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The outputs in eval mode, and in train mode with every gradient."""
    with torch.no_grad():
        found = [main_output(model.eval()(**inputs))]
    torch.manual_seed(5)
    loss_of(model.train()(**inputs)).backward()
    return found + [p.grad for p in vectors_of(model).values() if p.grad is not None]


@pytest.mark.parametrize("family", params("mlp", "bert"))
def test_results_are_those_of_an_export(tmp_path: Path, exports: Exports, family: Family) -> None:
    expected = results(adapted(family), family.inputs())
    exports()

    with vera_fx.capture_cache(tmp_path):
        first = results(adapted(family), family.inputs())
        assert exports() == 2
        # Classifiers note in their configuration what their labels look like, when Python runs.
        results(adapted(family), family.inputs())
        assert exports() == (1 if family.name in {"bert", "vit"} else 0)
        model = adapted(family)
        again = results(model, family.inputs())
        assert exports() == 0, "captured what was kept"

    assert len(expected) > 2
    assert all(map(torch.equal, first, expected))
    assert all(map(torch.equal, again, expected))
    assert str(vera_fx.explain(model)).count("site") > 0


def test_reports_are_those_of_an_export(tmp_path: Path) -> None:
    with vera_fx.capture_cache(tmp_path):
        pages = []
        for _ in range(2):
            model = adapted(BY_NAME["bert"])
            model.eval()(**BY_NAME["bert"].inputs())
            graph = vera_fx.explain(model).graphs[0]
            pages.append(
                [(r.name, r.report, r.nodes_before, r.nodes_after) for r in graph.report.records]
            )

    assert pages[0] == pages[1]
    assert any(report.rewrites for _, report, *_ in pages[0])


def test_compiled_training_is_one_graph(tmp_path: Path, exports: Exports) -> None:
    family, steps = BY_NAME["bert"], []
    with vera_fx.capture_cache(tmp_path):
        for _ in range(2):
            torch.compiler.reset()
            model = adapted(family).train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            loss_of(compiled(**family.inputs())).backward()
            steps.append([p.grad for p in vectors_of(model).values()])
    assert exports() == 1
    assert all(map(torch.equal, *steps))


def test_generates_with_a_cache_of_keys(tmp_path: Path, exports: Exports) -> None:
    prompt, found = tokens(2, 6), []
    with vera_fx.capture_cache(tmp_path):
        for _ in range(2):
            model = adapted(BY_NAME["llama"]).eval()
            found.append(model.generate(prompt, max_new_tokens=4, do_sample=False))
            counted = exports()
    assert counted == 0
    assert torch.equal(*found)


def test_other_sizes_fit_or_are_captured_and_kept(tmp_path: Path, exports: Exports) -> None:
    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 9)

        def forward(self, x: Tensor) -> Tensor:
            y = self.lin(x)
            return y * 2 if x.shape[0] % 3 == 0 else y - 1

    def outputs() -> list[Tensor]:
        torch.manual_seed(0)
        model = Even()
        vera_fx.adapt(model, VeraConfig(r=4, target_modules=["lin"]))
        fill_vectors(model)
        return [model(torch.ones(n, 6) / n) for n in (6, 9, 7, 8)]

    expected = outputs()
    exports()
    with vera_fx.capture_cache(tmp_path):
        first, made = outputs(), exports()
        again = outputs()
        assert made == 2
        assert exports() == 0
    assert all(map(torch.equal, first, expected))
    assert all(map(torch.equal, again, expected))


def test_constants_are_kept(tmp_path: Path, exports: Exports) -> None:
    class Constant(nn.Module):
        def __init__(self, shift: Tensor) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 3)
            self.held = [shift]

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) + self.held[0] + torch.tensor([1.0, 2.0, 4.0])

    def output(shift: float) -> Tensor:
        torch.manual_seed(0)
        model = Constant(torch.tensor([shift, 0.0, -shift]))
        vera_fx.adapt(model, VeraConfig(r=4, target_modules=["lin"]))
        return model(torch.ones(2, 6))

    expected, other = output(3.0), output(5.0)
    exports()
    with vera_fx.capture_cache(tmp_path):
        assert torch.equal(output(3.0), expected)
        assert torch.equal(output(3.0), expected)
        assert exports() == 1
        assert torch.equal(output(5.0), other)
        assert exports() == 1


def test_layers_that_are_called_are_bound_to_the_live_ones(
    tmp_path: Path, exports: Exports
) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 4), requires_grad=False)
            self.wide, self.tall = 6, 4

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table

    def model_of(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(Fused(), nn.Tanh(), nn.Linear(4, 3))
        vera_fx.adapt(model, VeraConfig(r=4, target_modules=["0", "2"]))
        fill_vectors(model)
        return model

    x = torch.randn(2, 6)
    with vera_fx.register_base_product(Fused, in_features="wide", out_features="tall"):
        expected = [model_of(seed)(x) for seed in (1, 2)]
        exports()
        with vera_fx.capture_cache(tmp_path):
            found = [model_of(seed)(x) for seed in (1, 2)]
    assert exports() == 1
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(*expected)


SECOND = """
import sys, torch, vera_fx
from tests.caching.test_capture_cache import adapted
from tests.models import BY_NAME
from vera_fx.caching import captures
if sys.argv[2] == "again":
    captures.export_call = None
vera_fx.capture_cache(sys.argv[1])
family = BY_NAME["llama"]
torch.save(adapted(family).eval()(**family.inputs()).logits, sys.argv[3])
"""


def test_another_process_starts_without_exporting(tmp_path: Path) -> None:
    found = []
    for which, seed in (("first", "1"), ("again", "2")):
        out = tmp_path / f"{which}.pt"
        command = [sys.executable, "-c", SECOND, str(tmp_path / "kept"), which, str(out)]
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(command, check=True, env=env, cwd=Path(__file__).parents[2])
        found.append(torch.load(out))
    assert torch.equal(*found)


def test_what_cannot_be_kept_is_captured_and_told(tmp_path: Path) -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x)[x[:, 0] > 0]

    torch.manual_seed(0)
    model = Picks()
    vera_fx.adapt(model, VeraConfig(r=4, target_modules=["lin"]))
    x = torch.randn(5, 6)
    expected = copy.deepcopy(model)(x)
    with (
        vera_fx.capture_cache(tmp_path),
        pytest.warns(CaptureCacheWarning, match="depend on the values of tensors"),
    ):
        found = model(x)
    assert torch.equal(found, expected)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(vera_fx.ConfigError, match="name a folder"):
        vera_fx.capture_cache(tmp_path / "file")


def test_it_ends_with_its_block(tmp_path: Path) -> None:
    with vera_fx.capture_cache(tmp_path):
        pass
    model = llama()
    vera_fx.adapt(model, VeraConfig(r=4, target_modules=["q_proj"]))
    model(input_ids=tokens())
    assert not list(tmp_path.glob("*.safetensors"))


def test_objects_that_answer_every_name_are_not_asked(tmp_path: Path, exports: Exports) -> None:
    class Proxy:
        factor = 3.0

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"asked for {name}")

    class Proxied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.proxy = nn.Linear(6, 3), Proxy()

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) * self.proxy.factor

    with vera_fx.capture_cache(tmp_path):
        found = []
        for _ in range(2):
            torch.manual_seed(0)
            model = Proxied()
            vera_fx.adapt(model, VeraConfig(r=4, target_modules=["lin"]))
            found.append(model(torch.ones(2, 6)))
    assert exports() == 1
    assert torch.equal(*found)
