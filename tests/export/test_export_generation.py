"""Exports by others: torch.export on the model itself, and transformers' prefill and decode."""

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vera_fx
from tests.export.export_models import adapted, call_of, eager
from tests.helpers import assert_close, assert_far_apart, hook_reference
from tests.models import tokens

STEPS = 6


def greedy(package, ids, config):
    """Greedy decoding with transformers' runners of a prefill and a decode program."""
    import torch
    import transformers

    recent = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
    name = "cache" if recent else "past_key_values"  # what the programs call it
    batch, length = ids.shape
    cache = {name: transformers.DynamicCache(config=config)}
    places = torch.arange(length).expand(batch, -1)
    programs = package.runners
    result = programs["prefill"](input_ids=ids, position_ids=places, **cache)
    found = [ids]
    for step in range(6):
        found.append(torch.as_tensor(result["logits"])[:, -1].argmax(-1, keepdim=True))
        place = torch.full((batch, 1), length + step)
        cache = {name: result["past_key_values"]}
        result = programs["decode"](input_ids=found[-1], position_ids=place, **cache)
    return torch.cat(found, 1)


ELSEWHERE = f"""
import sys
{inspect.getsource(greedy)}
import torch
from transformers.exporters import ExportedModel
# Programs of torch are pickled.
package = ExportedModel.from_pretrained(sys.argv[1], trust_remote_code=True)
found = [greedy(package, ids, package.config) for ids in torch.load(sys.argv[2])]
assert "vera_fx" not in sys.modules
torch.save(found, sys.argv[3])
"""


def generated(model: nn.Module, ids: Tensor) -> Tensor:
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, pad_token_id=0, **settings)


def exported(model: nn.Module, ids: Tensor, kind: str = "Dynamo"):
    from transformers import exporters

    config = getattr(exporters, f"{kind}Config")(dynamic=True)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exporter = getattr(exporters, f"{kind}Exporter")()
    return exporter.export_for_generation(model, inputs, config)


def check_tokens(results: list[Tensor], calls: list[Tensor], base: nn.Module, model: nn.Module):
    for result, ids in zip(results, calls, strict=True):
        expected = generated(model, ids)
        assert torch.equal(result, expected)
        assert not torch.equal(expected, generated(base, ids))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "Dynamo"),
        pytest.param("llama", "Onnx", marks=SLOW),
        pytest.param("gpt2", "Dynamo", marks=SLOW),
    ],
)
def test_transformers_prefill_and_decode_programs(name: str, kind: str, tmp_path: Path) -> None:
    base, model = adapted(name)
    exported(model, tokens(2, 5), kind).save_pretrained(tmp_path / "package")
    calls = [tokens(2, 5), tokens(3, 8)]
    torch.save(calls, tmp_path / "calls.pt")
    arguments = [tmp_path / "package", tmp_path / "calls.pt", tmp_path / "out.pt"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    check_tokens(torch.load(tmp_path / "out.pt"), calls, base, model)


@pytest.mark.slow
def test_a_merged_adapter_leaves_the_bases_own_programs() -> None:
    base, model = adapted("llama")
    adapted_tokens = generated(model, tokens(2, 5))
    vera_fx.unload(model, merge=True)
    package = exported(model, tokens(2, 5))
    names = {n for part in package.components.values() for n in part.program.state_dict}
    assert not any("vera" in name for name in names)
    assert torch.equal(greedy(package, tokens(2, 5), base.config), adapted_tokens)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_on_the_model_itself(strict: bool) -> None:
    base, model = adapted("mlp")
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(
        model, (), call_of("mlp"), dynamic_shapes=shapes, strict=strict
    ).module()
    call = call_of("mlp", 9)
    assert_close(program(**call), eager(hook_reference(base, model), "mlp", call))
    assert_far_apart(program(**call), eager(base, "mlp", call))
    assert_close(eager(model, "mlp", call), program(**call))


def test_torch_export_sees_saved_modules_and_the_active_adapter() -> None:
    _, model = adapted("bert", bias="all", modules_to_save=["pooler"])
    vera_fx.add_adapter(model, "second", copy.deepcopy(model.vera.adapter("default").config))
    call = call_of("bert")
    for name in ("default", "second"):
        vera_fx.set_adapter(model, name)
        hidden = torch.ones(2, 3, 32)
        own = model.vera.adapter(name).copies.by_path["bert.pooler"]
        assert torch.equal(model.bert.pooler(hidden), own(hidden))
        assert not any(module._forward_hooks for module in own.modules())
        program = torch.export.export(model, (), call).module()
        assert_close(program(**call).logits, eager(model, "bert", call), factor=5)
