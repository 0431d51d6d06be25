"""The probability of a verdict, against transformers' own logits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastrl.recipes.sorting import make_tokenizer
from fastrl.train.judge import verdict_probability
from fastrl.train.tiny import make_tiny_qwen3


@pytest.mark.parametrize("verdicts", [("1", "0"), ("12", "3")])
def test_the_probability_is_that_of_the_verdicts_tokens_over_both(verdicts: tuple[str, str]) -> None:
    tokenizer = make_tokenizer()
    model = make_tiny_qwen3(len(tokenizer), hidden_size=16, layers=2, seed=1)
    prompts = ["123", [{"role": "user", "content": "45"}], "6"]
    got = verdict_probability(model, tokenizer, prompts, verdicts=verdicts, token_budget=8)
    for prompt, probability in zip(["123", "<|user|>45<|assistant|>", "6"], got.tolist(), strict=True):
        likelihood = []
        for verdict in verdicts:
            ids = tokenizer(prompt + verdict)["input_ids"]
            with torch.no_grad():
                p = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
            n = len(verdict)
            steps = list(enumerate(pairwise(ids)))[-n:]
            likelihood.append(torch.stack([p[at, target] for at, (_, target) in steps]).prod().item())
        assert probability == pytest.approx(likelihood[0] / sum(likelihood), rel=1e-4)
    assert len(set(got.tolist())) == 3
    assert verdict_probability(model, tokenizer, []).shape == (0,)


@pytest.mark.parametrize("verdicts", [("1", "1"), ("", "0")])
def test_verdicts_that_cannot_be_told_apart_are_refused(verdicts: tuple[str, str]) -> None:
    tokenizer = make_tokenizer()
    model = make_tiny_qwen3(len(tokenizer), hidden_size=16, layers=1)
    with pytest.raises(ValueError, match="verdicts must make different tokens"):
        verdict_probability(model, tokenizer, ["1"], verdicts=verdicts)
