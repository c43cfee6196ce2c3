"""Models that transformers quantises while it loads them: trained by its Trainer, saved, loaded again."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

import vera_fx
from tests.helpers import fill_vectors, vectors_of
from tests.quantised.backends import IDS, INPUTS, TARGETS, plain

pytest.importorskip("bitsandbytes")
CONFIG = vera_fx.VeraConfig(r=5, target_modules=TARGETS)


@pytest.fixture(params=["4bit", "8bit"])
def folder(request: Any, tmp_path: Path) -> tuple[Path, BitsAndBytesConfig]:
    plain().save_pretrained(tmp_path / "base")
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    }
    kwargs: dict[str, Any] = four if request.param == "4bit" else {"load_in_8bit": True}
    return tmp_path / "base", BitsAndBytesConfig(
        **kwargs, llm_int8_skip_modules=["o_proj", "lm_head"]
    )


def load(folder: tuple[Path, BitsAndBytesConfig]) -> Any:
    path, config = folder
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map="cpu", dtype=torch.float32
    )


def trained(model: Any, out: Path, **options: Any) -> Any:
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=3, per_device_train_batch_size=3, learning_rate=0.05,
        report_to=[], use_cpu=True, save_steps=3, disable_tqdm=True, **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer


def test_trained_by_trainer_and_read_back(folder: Any, tmp_path: Path) -> None:
    model = vera_fx.adapt(load(folder), CONFIG)
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    before = {name: p.detach().clone() for name, p in vectors_of(model).items()}
    trained(model, tmp_path / "run")
    assert all(not torch.equal(p, before[name]) for name, p in vectors_of(model).items())
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    files = {path.name for path in checkpoint.rglob("adapter_model*")}
    assert files, list(checkpoint.iterdir())
    again = vera_fx.load_adapter(load(folder), next(checkpoint.rglob("adapter_config.json")).parent)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(again(**INPUTS).logits, model(**INPUTS).logits, atol=1e-5)


def test_trainer_takes_it_only_while_it_is_adapted(folder: Any, tmp_path: Path) -> None:
    model = vera_fx.adapt(load(folder), CONFIG)
    kind = type(model.hf_quantizer)
    vera_fx.unload(model)
    assert type(model.hf_quantizer) is not kind
    assert type(model.hf_quantizer).__mro__[0] is kind.__mro__[1]
    with pytest.raises(ValueError, match="purely quantized"):
        trained(model, tmp_path / "run")


def test_the_quantised_base_is_saved_and_loaded(folder: Any, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    for each in (model, again):
        vera_fx.adapt(each, CONFIG)
        fill_vectors(each)
    assert torch.equal(model(**INPUTS).logits, again(**INPUTS).logits)


def test_unloaded_with_the_adapter_it_is_a_plain_model(folder: Any, tmp_path: Path) -> None:
    model = vera_fx.adapt(load(folder), CONFIG)
    fill_vectors(model)
    expected = model(**INPUTS).logits.detach()
    merged = vera_fx.unload(model, merge=True)
    assert not getattr(merged, "is_quantized", False)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(again.model.layers[0].mlp.up_proj) is torch.nn.Linear
    # 8-bit products round their input as well.
    assert (again(**INPUTS).logits - expected).abs().max() < 0.02


def test_copies_and_pickles(folder: Any) -> None:
    model = vera_fx.adapt(load(folder), CONFIG)
    fill_vectors(model)
    expected = model(**INPUTS).logits
    assert torch.equal(copy.deepcopy(model)(**INPUTS).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**INPUTS).logits, expected)
