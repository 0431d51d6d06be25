"""Sampled tokens per second: the built-in engine against transformers' `generate`, same model, prompts and limits.

    python -m bench.rollout [--quick] [--results FOLDER]

A plain script rather than a row: two samplers draw different tokens, so there is no value to compare. Their greedy
completions are compared instead, before anything is timed. Tokens after a row's end are not counted for either side,
and a record's milliseconds are those of as many tokens as the two drew on average.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bench.__main__ import ROOT, provenance
from bench.records import put
from fastrl.rollout.builtin import BuiltinEngine
from fastrl.rollout.engine import Sampling


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a batch. Prompts are random ids, each repeated `group` times.

    Attributes:
        eos: number of token ids that end a completion; 0 lets every row run to `length`.
    """

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    prompts: int
    group: int
    prompt_length: tuple[int, int]
    length: int
    eos: int = 0


TINY = Case(hidden=64, layers=4, heads=4, vocabulary=64, prompts=32, group=8, prompt_length=(8, 14), length=20)
CPU_CASES = GPU_CASES = {
    "tiny, 20 tokens each": TINY,
    "tiny, 40 tokens or EOS": replace(TINY, length=40, eos=3),
    "tiny, D=128": replace(TINY, hidden=128),
    "30M, 64 tokens or EOS": Case(
        hidden=512, layers=8, heads=8, vocabulary=8192, prompts=8, group=8, prompt_length=(40, 60), length=64, eos=100
    ),
}


class NoEOS:
    """A tokenizer for an engine that only decodes ids."""

    eos_token_id = None


def model_of(case: Case, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads // 2,
        head_dim=case.hidden // case.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).eval().to(device)
    model.generation_config.eos_token_id = list(range(1, 1 + case.eos)) or None
    return model


def prompts_of(case: Case) -> list[list[int]]:
    rng = random.Random(0)
    lengths = [rng.randint(*case.prompt_length) for _ in range(case.prompts)]
    prompts = [[rng.randrange(1 + case.eos, case.vocabulary) for _ in range(n)] for n in lengths]
    return [prompt for prompt in prompts for _ in range(case.group)]


def by_generate(model: PreTrainedModel, case: Case, prompts: list[list[int]], is_greedy: bool) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.inference_mode():
        sample = partial(model.generate, ids, attention_mask=mask, max_new_tokens=case.length, pad_token_id=0)
        rows = sample(do_sample=False) if is_greedy else sample(do_sample=True, top_k=0)
    rows = rows[:, width:].tolist()
    ends = set(range(1, 1 + case.eos))
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def by_engine(engine: BuiltinEngine, case: Case, prompts: list[list[int]], is_greedy: bool) -> list[list[int]]:
    sampling = Sampling(max_completion_length=case.length, temperature=0.0 if is_greedy else 1.0)
    rollouts = engine.generate(prompts, sampling, seeds=range(len(prompts)))
    return [list(rollout.completion_ids) for rollout in rollouts]


def run(sample: Callable[[], list[list[int]]]) -> tuple[int, float]:
    """Tokens drawn, and seconds."""
    start = time.perf_counter()
    tokens = sum(map(len, sample()))
    return tokens, time.perf_counter() - start


def measured(case: Case, *, device: str, repeats: int, seconds: float = float("inf")) -> list[dict[str, Any]]:
    """One record per side, timed in turns after their greedy completions have agreed.

    Args:
        seconds: after which no further turn begins; two are taken in any case, and one before them that warms up.
    """
    model, prompts = model_of(case, device), prompts_of(case)
    engine = BuiltinEngine(model, NoEOS())
    sides = {"generate": partial(by_generate, model, case), "fastrl": partial(by_engine, engine, case)}
    if len({str(side(prompts, True)) for side in sides.values()}) != 1:
        raise RuntimeError(f"{case}: the greedy completions differ, so the two sides do not do the same work")
    turns: list[dict[str, tuple[int, float]]] = []
    end = time.perf_counter() + seconds
    while len(turns) <= repeats and (len(turns) < 3 or time.perf_counter() < end):
        turns.append({name: run(partial(side, prompts, False)) for name, side in sides.items()})
    del turns[0]  # the first one warms up
    usual = statistics.mean(turn[name][0] for turn in turns for name in sides)
    records = []
    for name in sides:
        rates = [tokens / seconds for tokens, seconds in (turn[name] for turn in turns)]
        times = sorted(1e3 * usual / rate for rate in rates)
        records.append(
            {
                "contender": name,
                "dtype": "float32",
                "ms": statistics.median(times),
                "ms_p10": times[0],
                "ms_p90": times[-1],
                "repeats": len(turns),
                "tokens_per_second": statistics.median(rates),
            }
        )
    return records


def sizes(case: Case) -> dict[str, Any]:
    """The case's numbers, for its records."""
    return asdict(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each side, alternating; medians are shown")
    parser.add_argument("--quick", action="store_true", help="the tiny models only")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the JSON lines")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; sampled tokens per second, median")
    print(f"{'case':26s}{'generate':>10s}{'fastrl':>10s}{'ratio':>8s}")
    origin, records = provenance(device, quick=options.quick), []
    for name, case in CPU_CASES.items():
        if options.quick and not name.startswith("tiny"):
            continue
        found = measured(case, device=device, repeats=options.rounds)
        generate, fastrl = (each["tokens_per_second"] for each in found)
        print(f"{name:26s}{generate:10.0f}{fastrl:10.0f}{fastrl / generate:8.2f}", flush=True)
        shape = {"name": name, "sizes": sizes(case)}
        records += [{"row": "rollout", "shape": shape, **each, **origin} for each in found]
    put(options.results / f"rollout.{device}.jsonl", records)


if __name__ == "__main__":
    main()
