"""Accuracy of a model on held-out prompts, with its sampling error."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from fastrl.report.completions import CompletionsLog, samples_of
from fastrl.report.log import COMPLETIONS_FILE
from fastrl.rewards.resolve import resolve_rewards
from fastrl.rollout.engine import Sampling
from fastrl.train.collect import Experience, Sampler, collect
from fastrl.train.config import EvalConfig, OverlongBlock
from fastrl.train.device import compute_dtype, pick_device
from fastrl.train.engine import opened_engine
from fastrl.train.environments import check_columns, own_reward, player_of, tool_schemas
from fastrl.train.episode_credit import environment_errors, episode_metrics
from fastrl.train.estimate import Estimate, estimate_by_group
from fastrl.train.learned_rewards import loaded
from fastrl.train.model import load_model, load_tokenizer
from fastrl.train.prompts import columns_of, load_prompts
from fastrl.train.reward_workers import workers_of


def run(config: EvalConfig) -> int:
    """Print what each reward says of the model's completions; write them to `output_dir` when it is given.

    Returns:
        0, or 1 when no reward judged any completion, or one, or the environment, failed on more than
        `rewards.max_error_rate` of them.
    """
    experience, names = judge(config)
    errors = {**experience.scores.errors, **environment_errors(experience.episodes)}
    for name, error in errors.items():
        print(f"{name} failed on {error.count} completions; the first:\n{error.first}", file=sys.stderr)
    found = totals(experience, names)
    for name in names:
        print(f"{name}: {found.get(name, 'no verdict on any completion')}")
    played = episode_metrics(experience.episodes)
    for name, value in played.items():
        print(f"{name}: {value:.4g}")
    if config.output_dir is not None:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        prompts = [prompt.prompt for prompt in experience.prompts]
        count = len(experience.completions)
        log = CompletionsLog(folder / COMPLETIONS_FILE)
        log.write(0, samples_of(prompts, experience.completions, names, experience.scores, count=count))
        log.close()
        record = {name: {"mean": e.mean, "standard_error": e.standard_error, "n": e.n} for name, e in found.items()}
        record |= {"episodes": played} if played else {}
        (folder / "eval.json").write_text(json.dumps(record, indent=1) + "\n")
    rates = {name: experience.scores.metrics[f"rewards/{name}/error_rate"] for name in experience.scores.errors}
    rates |= {"environment": played["episodes/environment_error_rate"]} if played else {}
    broken = [name for name, rate in rates.items() if rate > config.rewards.max_error_rate]
    if broken:
        print(f"{', '.join(broken)}: failed on more completions than rewards.max_error_rate allows", file=sys.stderr)
    return 0 if found and not broken else 1


def judge(config: EvalConfig) -> tuple[Experience, list[str]]:
    """Sample and score `num_generations` completions of every prompt; also return the rewards' names."""
    named = resolve_rewards(config.reward_funcs) if config.reward_funcs else []
    rewards = [*named, *own_reward(config.environment)]
    if not rewards:
        raise ValueError("there is no reward: set reward_funcs, or give the environment's class a method get_reward")
    tokenizer = load_tokenizer(
        config.model_name_or_path, chat_template=config.data.chat_template, trust_remote_code=config.trust_remote_code
    )
    prompts = load_prompts(
        config.eval_dataset,
        tokenizer,
        config.data,
        rewards,
        max_prompt_length=config.rollout.max_prompt_length,
        output_dir=config.output_dir,
        tools=tool_schemas(config.environment),
    )
    check_columns(config.environment, columns_of(prompts))
    model = load_model(
        config.model_name_or_path,
        dtype=compute_dtype(config.dtype),
        device=pick_device(config.device),
        trust_remote_code=config.trust_remote_code,
    )
    with opened_engine(config, model, tokenizer) as engine:
        sampler = Sampler(
            engine=engine,
            decode=partial(tokenizer.decode, skip_special_tokens=True),
            rewards=loaded(config, tokenizer, rewards),
            sampling=Sampling(
                max_completion_length=config.max_completion_length,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
            ),
            num_generations=config.num_generations,
            seed=config.seed,
            overlong=OverlongBlock(),
            workers=workers_of(config.rewards),
            player=player_of(config, tokenizer),
        )
        return collect(sampler, prompts, range(len(prompts))), [reward.name for reward in rewards]


def totals(experience: Experience, names: list[str]) -> dict[str, Estimate]:
    """Return the mean of each reward, clustered by prompt; a reward that judged nothing is absent."""
    group = experience.group.tolist()
    return {
        name: estimate_by_group(values, group)
        for name, values in zip(names, experience.scores.values, strict=True)
        if any(value is not None for value in values)
    }
