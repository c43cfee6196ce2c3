"""One process of `test_warm_start`: compiles two training steps and prints what caches gave."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import vera_fx


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.lin(x).tanh()


def main(load: str, save: str) -> None:
    """Compile; read cached artifacts before and write them after where a path is given."""
    os.environ["VERA_FX_OUTLINE"] = "4"  # however little work these layers are
    torch.manual_seed(0)
    if load:
        torch.compiler.load_cache_artifacts(Path(load).read_bytes())
    # Deep enough that its layers are outlined, and merged so that hand-derived gradients take part.
    base = nn.Sequential(*(Block() for _ in range(5)), nn.Linear(6, 4))
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=2, target_modules="all-linear", plan="merged"))
    compiled = torch.compile(model, fullgraph=True)
    for rows in (4, 7):
        compiled(torch.ones(rows, 6)).square().sum().backward()
    if save:
        artifacts = torch.compiler.save_cache_artifacts()
        assert artifacts is not None
        Path(save).write_bytes(artifacts[0])
    counters = torch._dynamo.utils.counters
    found = {"inductor": counters["inductor"], "aot": counters["aot_autograd"]}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
