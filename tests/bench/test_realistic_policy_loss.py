"""The realistic batch is what it says: real text, masked questions, groups without signal, clipped rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import realistic_policy_loss as row
from fastrl.ops.linear_logprob import reference


def test_words_are_digits_words_and_signs() -> None:
    assert row.words("He has 12+3= <<15>> eggs.") == ["He", "has", *"12+3=<<15>>", "eggs", "."]


def test_the_batch_has_masked_silent_and_clipped_rows_and_a_head_that_learned(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRL_GSM8K", str(shared_data / "gsm8k" / "train.jsonl"))
    hidden, weight, target, advantage, old, row_weight = row.batch(3000, 32, 500, dtype=torch.float32, device="cpu")
    stats = reference(hidden, weight, target)
    assert -stats.logprob.mean() < 0.8 * torch.tensor(500.0).log()  # far better than chance
    trained = row_weight > 0
    assert 0.4 < trained.float().mean() < 0.9
    assert row_weight.sum() == pytest.approx(1.0, abs=1e-5)
    assert 0.1 < (advantage[trained] == 0).float().mean() < 0.6
    ratio = (stats.logprob - old).exp()
    is_clipped = ((ratio > 1.28) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
    assert 0.005 < is_clipped[trained].float().mean() < 0.5
