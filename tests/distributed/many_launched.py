"""A script of `train_many` as `accelerate launch` starts it; every process leaves what it has of all jobs.

accelerate launch --config_file FILE tests/distributed/many_launched.py FOLDER
"""

import sys
from pathlib import Path

import accelerate
import torch
from safetensors.torch import save_file
from torch import distributed as dist

import vera_fx
from tests.training.jobs import classifier, trained
from tests.training.test_many import JOBS


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = accelerate.Accelerator()
    model = classifier().to(accelerator.device)
    results = vera_fx.train_many(model, JOBS, progress=False, state=folder / "state")
    results.save(folder / "results.json")
    accelerator.wait_for_everyone()
    values = {f"{n} {k}": v.contiguous() for n in JOBS for k, v in trained(model, n).items()}
    about = {"backend": dist.get_backend(), "world": str(accelerator.num_processes)}
    save_file(values, folder / f"rank{accelerator.process_index}.safetensors", about)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
