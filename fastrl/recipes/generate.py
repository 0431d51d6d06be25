"""Completions of prompts from the command line or a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastrl.rollout.builtin import BuiltinEngine
from fastrl.rollout.engine import Sampling
from fastrl.rollout.seeds import request_seed
from fastrl.train.config import GenerateConfig
from fastrl.train.device import compute_dtype, pick_device
from fastrl.train.model import load_model, load_tokenizer
from fastrl.train.prompts import load_prompts


def run(config: GenerateConfig) -> int:
    """Write one JSON line per completion: prompt, completion, finish_reason, tokens, mean log-probability."""
    tokenizer = load_tokenizer(
        config.model_name_or_path, chat_template=config.data.chat_template, trust_remote_code=config.trust_remote_code
    )
    source = config.prompt_file if config.prompt_file is not None else [{"prompt": text} for text in config.prompts]
    prompts = load_prompts(
        source, tokenizer, config.data, (), max_prompt_length=config.rollout.max_prompt_length, output_dir=None
    )
    model = load_model(
        config.model_name_or_path,
        dtype=compute_dtype(config.dtype),
        device=pick_device(config.device),
        trust_remote_code=config.trust_remote_code,
    )
    samples = range(config.num_generations)
    rollouts = BuiltinEngine(model, tokenizer, batch_size=config.rollout.batch_size).generate(
        [prompt.ids for prompt in prompts for _ in samples],
        Sampling(
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            stop=config.stop,
        ),
        seeds=[request_seed(config.seed, ordinal, sample) for ordinal in range(len(prompts)) for sample in samples],
    )
    lines = [
        json.dumps(
            {
                "prompt": prompts[index // config.num_generations].prompt,
                "completion": tokenizer.decode(rollout.completion_ids, skip_special_tokens=True),
                "finish_reason": rollout.finish_reason,
                "tokens": len(rollout.completion_ids),
                "mean_logprob": sum(rollout.logprob) / max(1, len(rollout.logprob)),
            },
            ensure_ascii=False,
        )
        for index, rollout in enumerate(rollouts)
    ]
    text = "\n".join(lines) + "\n"
    if config.output_file is None:
        sys.stdout.write(text)
    else:
        Path(config.output_file).write_text(text, encoding="utf-8")
    return 0
