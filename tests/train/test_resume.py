"""A resumed run is the same run: curve, weights, moments and generators, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastrl.train.checkpoint import load_checkpoint, resume_point, save_checkpoint
from fastrl.train.model import hidden_states, model_head
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.random_state import generator_state, restore_generators
from fastrl.train.schedule import learning_rate_at
from fastrl.train.step import optimizer_step
from fastrl.train.tiny import make_tiny_qwen3
from tests.train.test_attention import packed

STEPS = 6


def train(run: Path, *, until: int, dtype: torch.dtype, resume: str | None) -> list[float]:
    """A whole tiny recipe: a random batch a step, a checkpoint after each; returns the losses of its own steps."""
    model = make_tiny_qwen3(20, hidden_size=16, layers=2, tie_embeddings=dtype == torch.float32).to(dtype)
    optimizer = MasterAdamW(model, weight_decay=0.1)
    data = torch.Generator().manual_seed(5)
    first = 0
    if (found := resume_point(run, resume)) is not None:
        tensors, state = load_checkpoint(found)
        optimizer.load_state_dict(tensors["optimizer"])
        restore_generators(state["generators"], {"data": data})
        first = state["step"]
    losses = []
    for step in range(first, until):
        total = torch.zeros(())
        for _ in range(2):  # micro-batches
            lengths = torch.randint(2, 9, (3,), generator=data).tolist()
            batch = packed([torch.randint(20, (n,), generator=data) for n in lengths])
            logits = hidden_states(model, batch) @ model_head(model).weight.T
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.target) / 2
            loss.backward()
            total += loss.detach()
        rate = learning_rate_at(step, peak=1e-2, kind="cosine", warmup_steps=2, total_steps=STEPS)
        optimizer_step(optimizer, total, lr=rate, max_grad_norm=1.0, on_nonfinite="halt", step=step)
        losses.append(float(total))
        state = {"step": step + 1, "generators": generator_state({"data": data})}
        save_checkpoint(run, step + 1, tensors={"optimizer": optimizer.state_dict()}, state=state, keep=2)
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_stopped_after_any_step_resumes_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = train(tmp_path / "whole", until=STEPS, dtype=dtype, resume=None)
    expected_tensors, expected_state = load_checkpoint(tmp_path / "whole" / f"checkpoint-{STEPS}")
    for stop in (1, 4):
        run = tmp_path / str(stop)
        head = train(run, until=stop, dtype=dtype, resume="auto")
        torch.manual_seed(123)  # whatever happened to the process in between
        tail = train(run, until=STEPS, dtype=dtype, resume="auto")
        assert head + tail == whole
        tensors, state = load_checkpoint(run / f"checkpoint-{STEPS}")
        assert state["generators"]["own"] == expected_state["generators"]["own"]
        for name, tensor in expected_tensors["optimizer"].items():
            assert torch.equal(tensors["optimizer"][name], tensor), name


def test_forgetting_the_generators_would_change_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", until=STEPS, dtype=torch.float32, resume=None)
    head = train(tmp_path / "run", until=3, dtype=torch.float32, resume=None)
    monkeypatch.setitem(globals(), "restore_generators", lambda *_: None)
    assert head + train(tmp_path / "run", until=STEPS, dtype=torch.float32, resume="auto") != whole
