"""vLLM meets the engine contract: real vLLM, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.rollout.vllm_engine import VLLMEngine
from fastrl.rollout.vllm_start import Settings
from tests.rollout import contract
from tests.vllm.models import MODELS, qwen3

pytestmark = pytest.mark.vllm


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[contract.MakeEngine]:
    """Makes one engine at a time: the one before is closed."""
    opened: list[VLLMEngine] = []

    def make(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> VLLMEngine:
        while opened:
            opened.pop().close()
        path = str(tmp_path / "model")
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        opened.append(VLLMEngine(path, model, tokenizer, settings=Settings(kv_cache_gib=0.1)))
        return opened[-1]

    yield make
    while opened:
        opened.pop().close()


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda f: f.__name__)
def test_vllm_meets_the_contract(
    check: contract.Check, make_engine: contract.MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it but one combination: vLLM drops by min-p before top-p, which is another distribution, so it is refused.

    The one check left out, `completions_in_segments_are_those_in_one_piece`, is no part of CHECKS: vLLM's generators
    cannot be wound forward, so a completion cut in segments is another one, though always the same.
    """
    every = contract.SAMPLINGS["all"]
    assert every.min_p > 0.0
    assert every.top_p < 1.0
    monkeypatch.setitem(contract.SAMPLINGS, "all", replace(every, min_p=0.0))
    check(make_engine, qwen3)


@pytest.mark.parametrize("make_model", MODELS[1:], ids=lambda f: f.__name__)
def test_other_architectures_sample_and_are_updated(
    make_model: contract.MakeModel, make_engine: contract.MakeEngine
) -> None:
    """Untied heads, absolute positions, windows, soft caps: log-probabilities before and after an update."""
    contract.rollouts_carry_the_version_of_their_weights(make_engine, make_model)
