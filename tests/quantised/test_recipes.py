"""docs/quantised.md: every block runs, and prints what the page says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vera_fx
from tests.quantised.backends import IDS, plain

PAGE = (Path(__file__).parents[2] / "docs" / "quantised.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
LIBRARIES = {
    "BitsAndBytes": "bitsandbytes",
    "torchao": "torchao",
    "hqq": "hqq",
    "quanto": "optimum",
}


def test_there_are_as_many_as_the_page_promises() -> None:
    assert len(BLOCKS) == 6


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = BLOCKS[number]
    for word, library in LIBRARIES.items():
        if word in code:
            pytest.importorskip(library)
    folder = tmp_path / "base"
    plain().save_pretrained(folder)
    space: dict[str, Any] = {"folder": folder}
    exec(compile(code, f"block {number}", "exec"), space)
    if "memory_on_paper" in code:
        assert capsys.readouterr().out.strip() in PAGE
        return
    rows = vera_fx.explain(space["model"]).targets
    assert rows
    assert all(row.base for row in rows)
    if "from_pretrained" in code:
        loss = space["model"](input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert torch.isfinite(loss)


def test_paper_by_hand() -> None:
    """A model of three parameters: every number by the formula."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(10, 6)
            self.lin = torch.nn.Linear(6, 64)

    config = vera_fx.VeraConfig(r=4, target_modules=["lin"])
    found = vera_fx.memory_on_paper(Net(), config, bits=4)
    small, others = 6 * 64, 10 * 6 + 64
    assert found.base == small // 2 + 4 * small // 64 + 2 * others
    assert found.base_16_bit == 2 * (small + others)
    assert found.projections == 4 * 4 * (6 + 64)
    assert found.vectors == 4 * (4 + 64)
    assert found.training == 3 * found.vectors
    assert vera_fx.memory_on_paper(Net(), config).base == found.base_16_bit
    with pytest.raises(vera_fx.ConfigError, match="4, 8 or 16 bits, not 3"):
        vera_fx.memory_on_paper(Net(), config, bits=3)
