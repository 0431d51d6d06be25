"""Completions of prompts; with `verify`, the ones that pass, as a dataset for the next stage of training.

prompts -> n completions each -> verify -> keep distinct ones that pass -> rows, and beside them where they come from
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.rewards.protocol import Reward
from fastrl.rewards.resolve import resolve_rewards
from fastrl.rollout.engine import Engine, Sampling
from fastrl.rollout.episodes import Episode
from fastrl.rollout.seeds import request_seed
from fastrl.train.collect import Experience, Sampler, collect
from fastrl.train.config import GenerateConfig, OverlongBlock
from fastrl.train.contents import contents_of
from fastrl.train.device import compute_dtype, pick_device
from fastrl.train.durable import write_text
from fastrl.train.engine import opened_engine
from fastrl.train.environments import Player, check_columns, opened, own_reward, player_of, specs_of, tool_schemas
from fastrl.train.episode_credit import environment_errors
from fastrl.train.guards import check_verdicts
from fastrl.train.learned_rewards import loaded
from fastrl.train.model import load_model, load_tokenizer
from fastrl.train.partial_file import open_partial
from fastrl.train.prompts import Prompt, columns_of, load_prompts
from fastrl.train.provenance import environment
from fastrl.train.rejection import SELECTIONS, Candidate
from fastrl.train.reward_workers import check_error_rates, workers_of
from fastrl.train.validate_environment import OWN_REWARD
from fastrl.types import Rollout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def run(config: GenerateConfig) -> int:
    """Write JSON lines; a killed run goes on after the last prompts it had finished, with the same result.

    Returns:
        0, or 1 when nothing was kept.
    """
    rewards = _verifiers(config)
    tokenizer = load_tokenizer(
        config.model_name_or_path, chat_template=config.data.chat_template, trust_remote_code=config.trust_remote_code
    )
    source = config.prompt_file if config.prompt_file is not None else [{"prompt": text} for text in config.prompts]
    prompts = load_prompts(
        source,
        tokenizer,
        config.data,
        rewards,
        max_prompt_length=config.rollout.max_prompt_length,
        output_dir=None,
        tools=tool_schemas(config.environment),
    )
    check_columns(config.environment, columns_of(prompts))
    device = pick_device(config.device)
    model = load_model(
        config.model_name_or_path,
        dtype=compute_dtype(config.dtype),
        device=device,
        trust_remote_code=config.trust_remote_code,
    )
    with opened_engine(config, model, tokenizer) as engine:
        return _run(config, _sampler(config, engine, tokenizer, rewards), prompts, device)


def _verifiers(config: GenerateConfig) -> list[Reward]:
    """The rewards whose sum decides; `environment` names the environment's own."""
    own = own_reward(config.environment) if OWN_REWARD in config.verify else []
    if OWN_REWARD in config.verify and not own:
        raise ValueError("verify: environment is what get_reward says, and the environment's class has no such method")
    named = [spec for spec in config.verify if spec != OWN_REWARD]
    return [*(resolve_rewards(named) if named else []), *own]


def _sampler(
    config: GenerateConfig, engine: Engine, tokenizer: PreTrainedTokenizerBase, rewards: Sequence[Reward]
) -> Sampler:
    return Sampler(
        engine=engine,
        decode=partial(tokenizer.decode, skip_special_tokens=True),
        rewards=loaded(config, tokenizer, rewards),
        sampling=Sampling(
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            stop=config.stop,
        ),
        num_generations=config.num_generations,
        seed=config.seed,
        overlong=OverlongBlock(),
        workers=workers_of(config.rewards),
        player=player_of(config, tokenizer),
    )


def _run(config: GenerateConfig, sampler: Sampler, prompts: Sequence[Prompt], device: torch.device) -> int:
    if config.output_file is None:
        for _ in _rows_of_all(config, sampler, prompts, first=0, counts=Counter(), write=_print):
            pass
        return 0
    specs = [*config.verify, *specs_of(config.environment)]
    contents = contents_of(data=[config.prompt_file], model=config.model_name_or_path, rewards=specs)
    record = {"config": asdict(config), "contents": contents}
    with open_partial(Path(config.output_file), record) as file:
        counts = Counter(file.counts)
        for done in _rows_of_all(config, sampler, prompts, first=file.done, counts=counts, write=file.write):
            file.mark(done, counts)
        provenance = record | {"environment": environment(device), "counts": dict(counts)}
        _print_counts(config, counts, total=len(prompts))
        write_text(_beside(config.output_file), json.dumps(provenance, indent=1, sort_keys=True) + "\n")
        file.finish()
    return 0 if counts["rows"] else 1


def _rows_of_all(
    config: GenerateConfig, sampler: Sampler, prompts: Sequence[Prompt], *, first: int, counts: Counter[str], write: Any
) -> Any:
    """Sample, select and write the prompts from `first` on, a batch at a time; yield how many are done after each."""
    size = max(1, config.rollout.batch_size // config.num_generations)
    without_verdict, failing = 0, dict[str, int]()
    for start in range(first, len(prompts), size):
        ordinals = range(start, min(start + size, len(prompts)))
        batch = [prompts[i] for i in ordinals]
        if config.verify:
            experience = collect(sampler, batch, ordinals)
            _tell_faults(experience.episodes)
            errors = {**experience.scores.errors, **environment_errors(experience.episodes)}
            without_verdict = check_verdicts(experience.reward, without_verdict, errors)
            failing = check_error_rates(experience.scores, failing, config.rewards)
            rows = _selected(config, experience, counts)
        elif sampler.player is not None:
            rows = _played(config, sampler, sampler.player, batch, ordinals)
        else:
            rows = _completions(config, sampler, batch, ordinals)
        counts["prompts"] += len(batch)
        counts["completions"] += len(batch) * config.num_generations
        counts["rows"] += len(rows)
        # What a model was shown belongs to its answer: training on the row renders the same prompt.
        write(rows if sampler.player is None else [{**row, "tools": sampler.player.schemas} for row in rows])
        yield ordinals.stop


def _selected(config: GenerateConfig, experience: Experience, counts: Counter[str]) -> list[dict[str, Any]]:
    """The rows that the prompts of one batch give, in the format asked for."""
    n, rows = config.num_generations, []
    rewards = experience.scores.total
    counts["judged"] += sum(value is not None for value in rewards)
    counts["passed"] += sum(value is not None and value >= config.verify_threshold for value in rewards)
    counts["cut_off"] += sum(rollout.finish_reason == "length" for rollout in experience.rollouts)
    for start in range(0, len(experience.rollouts), n):
        here = slice(start, start + n)
        candidates = [
            Candidate(completion, _text(completion), reward, rollout.finish_reason == "stop")
            for completion, reward, rollout in zip(
                experience.completions[here], rewards[here], experience.rollouts[here], strict=True
            )
        ]
        found = []
        for prompt, alike in _by_prompt(experience.prompts[here], candidates):
            select = SELECTIONS[config.output_format]
            found += select(prompt, alike, config.verify_threshold, config.max_per_prompt)
        counts["prompts_with_rows"] += bool(found)
        rows += found[: config.max_per_prompt]
    return rows


def _by_prompt(prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> list[tuple[Any, list[Candidate]]]:
    """The candidates of each prompt in a group: an environment may have opened the group's prompt in several ways."""
    found: dict[str, tuple[Any, list[Candidate]]] = {}
    for prompt, candidate in zip(prompts, candidates, strict=True):
        found.setdefault(json.dumps(prompt.prompt), (prompt.prompt, []))[1].append(candidate)
    return list(found.values())


def _completions(
    config: GenerateConfig, sampler: Sampler, batch: Sequence[Prompt], ordinals: range
) -> list[dict[str, Any]]:
    """Every completion with its length, how it ended and its mean log-probability."""
    samples = range(config.num_generations)
    rollouts = sampler.engine.generate(
        [prompt.ids for prompt in batch for _ in samples],
        sampler.sampling,
        seeds=[request_seed(config.seed, ordinal, sample) for ordinal in ordinals for sample in samples],
    )
    return [
        _described(batch[i // config.num_generations], rollout, sampler.decode(rollout.completion_ids))
        for i, rollout in enumerate(rollouts)
    ]


def _described(prompt: Prompt, rollout: Rollout, text: str) -> dict[str, Any]:
    return {
        "prompt": prompt.prompt,
        "completion": text,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.completion_ids),
        "mean_logprob": sum(rollout.logprob) / max(1, len(rollout.logprob)),
    }


def _played(
    config: GenerateConfig, sampler: Sampler, player: Player, batch: Sequence[Prompt], ordinals: range
) -> list[dict[str, Any]]:
    """Every episode, as `_completions` has completions: its length is what the model said, its messages all of it."""
    samples = range(config.num_generations)
    repeated = [prompt for prompt in batch for _ in samples]
    seeds = [request_seed(config.seed, ordinal, sample) for ordinal in ordinals for sample in samples]
    episodes = player.play(sampler.engine, repeated, seeds, sampler.sampling)
    _tell_faults(episodes)
    rows = []
    for prompt, episode in zip(repeated, episodes, strict=True):
        n = sum(episode.rollout.is_sampled or ())
        rows.append(
            {
                "prompt": opened(prompt, episode),
                "completion": episode.messages,
                "finish_reason": episode.rollout.finish_reason,
                "tokens": n,
                "mean_logprob": sum(episode.rollout.logprob) / max(1, n),
                "reward": None if isinstance(episode.reward, Mapping) else episode.reward,
            }
        )
    return rows


def _tell_faults(episodes: Sequence[Episode]) -> None:
    for error in environment_errors(episodes).values():
        print(f"the environment failed in {error.count} episodes; the first:\n{error.first}", file=sys.stderr)


def _text(completion: Any) -> str:
    """What makes two completions the same: the text, or all messages where there are several."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"]) if len(completion) == 1 else json.dumps(completion, sort_keys=True)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    sys.stdout.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _print_counts(config: GenerateConfig, counts: Counter[str], *, total: int) -> None:
    print(f"{config.output_file}: {counts['rows']} rows from {counts['completions']} completions of {total} prompts")
    if config.verify and counts["judged"]:
        rate = 100 * counts["passed"] / counts["judged"]
        print(
            f"verified: {rate:.1f} % of {counts['judged']} judged completions passed, "
            f"{counts['prompts_with_rows']} prompts gave a row, {counts['cut_off']} completions were cut off"
        )


def _beside(output_file: str) -> Path:
    return Path(f"{output_file}.provenance.json")
