"""How many kernels a hundred lengths ask Triton to compile, counted where they are asked for: nothing is compiled.

A process with a stand-in for the GPU's driver launches every kernel. Triton works out each launch's key as it does
on a GPU, hands it to a hook, and launches nothing because the hook says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
import json, random
import torch, triton
from collections import defaultdict
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
import fastrl.kernels.tuning as tuning
import fastrl.ops.backend as backend
backend._missing_triton = lambda *_: None  # CPU tensors, for once without the interpreter
tuning.architecture = lambda _: "sm_90"
torch.empty = lambda *a, **k: torch.zeros(*a, **k)  # nothing writes the results, and the loops read them
torch.empty_like = torch.zeros_like
keys = defaultdict(set)
def hook(*, fn, compile, **_):
    keys[fn.name.split(".")[-1]].add(compile["key"])
    return True
triton.knobs.runtime.jit_cache_hook = hook
from tests.kernels.test_on_gpu import step_of
for length in [1, 2, *random.Random(0).sample(range(3, 900), 98)]:
    step_of(length, 509, "cpu", chunk_rows=length // 3 + 1)
print(json.dumps({name: len(found) for name, found in keys.items()}))
"""


def test_a_hundred_lengths_ask_for_a_handful_of_kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", COUNT]  # what is left to Triton's default warns
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert {"_row_partials", "_combine", "_row_gradient", "_objective", "_from_right", "_from_left", "_gae"} <= set(
        counts
    )
    # Rows that begin at 16 bytes or not, kept probabilities or logits, and the block sizes of the scans.
    assert max(counts.values()) <= 6, counts
