"""One rank of the training step that `bench.curves` cuts over ranks; the first prints its milliseconds and MiB."""

from __future__ import annotations

import json

import torch

from bench.curves import SHARED_OUT, step_point
from fastrl.train.config import SFTConfig
from fastrl.train.distributed import is_first, joined


def main() -> None:
    """Meet the others and take the step; it ends for all ranks when their gradients are summed."""
    torch.set_num_threads(1)
    with joined(SFTConfig(model_name_or_path="", output_dir="", train_dataset="", device="cpu")):
        point = step_point(SHARED_OUT)
        if is_first():
            print(json.dumps(point), flush=True)


if __name__ == "__main__":
    main()
