"""What `make package` runs with the installed wheel, in an environment without transformers.

Nothing of the repository is on its path: a file or a dependency that the wheel lacks is an error here.
"""

import importlib.util
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import vera_fx
import vera_fx.passes


def check(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"the installed package: {what}")


def main() -> None:
    where = Path(vera_fx.__file__).resolve()
    check("site-packages" in where.parts, f"vera_fx comes from {where}")
    check((where.parent / "py.typed").is_file(), "py.typed is missing")
    check(version("vera-fx") == vera_fx.__version__, "two versions")
    for library in ("transformers", "peft", "accelerate", "rich"):
        check(importlib.util.find_spec(library) is None, f"{library} is here")

    base = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 3))
    x = torch.randn(5, 10)
    before = base(x)
    model = vera_fx.adapt(base, vera_fx.VeraConfig(r=4, target_modules=["0", "2"]))
    check(torch.equal(model(x), before), "a fresh adapter changes the output")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained = model(x).detach()
    check(not torch.allclose(trained, before), "training changes nothing")
    check("MergeWeight" in str(vera_fx.explain(model)), "no graph ran")

    with tempfile.TemporaryDirectory() as folder:
        vera_fx.save_adapter(model, folder)
        vera_fx.unload(model)
        check(torch.equal(model(x), before), "unload leaves something")
        vera_fx.load_adapter(model, folder)
    check(torch.allclose(model(x), trained), "the saved adapter is another")
    sys.stdout.write(
        f"vera-fx {vera_fx.__version__} as installed: adapted, trained, saved, loaded; no transformers\n"
    )


if __name__ == "__main__":
    main()
