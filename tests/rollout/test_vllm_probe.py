"""The probe: what it takes for wrong, for stale, and for the noise between two systems."""

from __future__ import annotations

import pytest
import torch

from fastrl.rollout.vllm_probe import SamplerWeightsError, check_holds, probe_ids, trainer_logprob
from tests.rollout.tiny import CONTEXT, V, qwen3, tiny_tokenizer

OLD = torch.tensor([-1.0, -2.0, -3.0, -4.0])
NEW = OLD + torch.tensor([1e-3, -2e-3, 1e-3, 2e-3])  # what a small update does
NOISE = torch.tensor([1e-4, -1e-4, 1e-4, -1e-4])  # between two systems that hold the same weights


def test_the_same_weights_pass_with_their_mean_difference() -> None:
    assert check_holds(NEW + NOISE, NEW, OLD, tolerance=0.2, version=1) == pytest.approx(1e-4, rel=1e-2)
    assert check_holds(NEW, NEW, None, tolerance=1e-6, version=0) == 0.0


def test_old_weights_are_found_far_below_the_tolerance() -> None:
    with pytest.raises(SamplerWeightsError, match=r"still holds older weights than version 7: .*never arrived"):
        check_holds(OLD + NOISE, NEW, OLD, tolerance=0.2, version=7)


def test_an_update_smaller_than_the_noise_proves_nothing() -> None:
    moved = OLD + 1e-6
    assert check_holds(OLD + NOISE, moved, OLD, tolerance=0.2, version=1) > 0


@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_other_weights_and_no_numbers_are_wrong(value: float) -> None:
    with pytest.raises(SamplerWeightsError, match="does not hold the weights of version 3"):
        check_holds(NEW + value, NEW, None, tolerance=0.2, version=3)


def test_the_known_sequence_is_text_where_the_tokenizer_has_words_for_it() -> None:
    tokenizer = tiny_tokenizer()
    ids = probe_ids(tokenizer, V, CONTEXT)
    assert tokenizer.decode(list(ids)).startswith("the quick brown fox")
    assert len(ids) == 32
    assert len(probe_ids(tokenizer, V, 9)) == 8


def test_the_trainer_scores_it_by_one_forward_pass_in_eval_mode() -> None:
    model = qwen3().train()
    ids = (5, 6, 7, 8)
    found = trainer_logprob(model, ids)
    want = model.eval()(torch.tensor([ids])).logits[0, :-1].detach().double().log_softmax(-1)
    assert found.tolist() == pytest.approx([float(want[t, ids[t + 1]]) for t in range(3)], abs=1e-5)
