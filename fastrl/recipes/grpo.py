"""GRPO and its family: prompts -> rollouts -> rewards -> advantages -> packed batches -> loss -> optimizer -> sampler.

A round samples `steps_per_generation` optimizer steps' worth of completions and learns from each
`num_iterations` times. With one update per round l_old is the policy itself and costs no pass; with beta 0 there is
no reference model; completions without gradient never reach the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.algorithms.control import AdaptiveKL, adapted, exceeds_target_kl
from fastrl.algorithms.policy_gradient import PolicyGradient
from fastrl.report.completions import CompletionSample, samples_of
from fastrl.report.journal import Journal
from fastrl.rewards.resolve import resolve_rewards
from fastrl.rollout.builtin import BuiltinEngine
from fastrl.rollout.engine import Sampling
from fastrl.train.algorithm import algorithm_from
from fastrl.train.collect import Experience, Sampler, collect, collect_round
from fastrl.train.config import GRPOConfig
from fastrl.train.device import compute_dtype, peak_gib, pick_device
from fastrl.train.estimate import estimate_by_group
from fastrl.train.experience_metrics import experience_metrics
from fastrl.train.export import save_pretrained
from fastrl.train.guards import check_probability_error
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model import load_model, load_tokenizer
from fastrl.train.optimizer import MasterAdamW
from fastrl.train.prepare import StepSequences, cut_into_steps, prepare
from fastrl.train.prompts import Prompt, load_prompts
from fastrl.train.run_directory import open_run_directory
from fastrl.train.schedule import learning_rate_at, warmup_length
from fastrl.train.snapshot import Progress, restore, save
from fastrl.train.update import policy_batch_loss, update
from fastrl.types import TokenBatch


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run computes with; made once, before the first round.

    Attributes:
        prompts: the pool that rounds draw from.
        held_out: prompts for evaluation; may be empty.
        algorithm: the record of choices.
        policy: the model that is trained.
        reference: its frozen start; None when the algorithm has no KL.
        optimizer: owns the policy's master weights.
        sampler: engine, rewards and sampling parameters.
        groups: prompts of one round.
        total_steps: optimizer steps of the whole run.
    """

    prompts: list[Prompt]
    held_out: list[Prompt]
    algorithm: PolicyGradient
    policy: PreTrainedModel
    reference: PreTrainedModel | None
    optimizer: MasterAdamW
    sampler: Sampler
    groups: int
    total_steps: int


def run(config: GRPOConfig) -> int:
    """Train a policy on its own completions; return the process's exit code.

    Writes metrics.jsonl, completions.jsonl, report.html, checkpoint-N/ and model/ under `output_dir`.
    """
    with open_run_directory(config.output_dir, asdict(config), resume=config.resume_from_checkpoint) as directory:
        tokenizer = load_tokenizer(
            config.model_name_or_path,
            chat_template=config.data.chat_template,
            trust_remote_code=config.trust_remote_code,
        )
        setup = set_up(config, tokenizer)
        journal = Journal(
            directory.path,
            title=f"fastrl grpo ({config.parity or config.algorithm})",
            total_steps=setup.total_steps,
            live=config.report.panel,
            trackers=config.report.to,
            config=asdict(config),
        )
        with journal:
            progress, offsets = restore(directory, setup.optimizer, resume=config.resume_from_checkpoint)
            journal.truncate_to(offsets)
            while progress.step < setup.total_steps:
                setup.sampler.engine.load_weights(setup.policy, progress.step)
                experience, ordinal = collect_round(
                    setup.sampler,
                    setup.prompts,
                    first_ordinal=progress.ordinal,
                    groups=setup.groups,
                    max_rounds=config.dynamic_sampling.max_rounds,
                )
                if directory.interrupted():
                    # This round has taught nothing yet: the resumed run samples it again, alike.
                    save(directory, progress, setup.optimizer, journal.offsets(), keep=config.save_total_limit)
                    return EXIT_INTERRUPTED
                first = progress.step
                progress = learn(config, setup, journal, experience, replace(progress, ordinal=ordinal))
                is_last = progress.step >= setup.total_steps
                if setup.held_out and (is_last or _crossed(first, progress.step, config.eval_steps)):
                    evaluate(setup, journal, progress)
                if is_last or directory.interrupted() or _crossed(first, progress.step, config.save_steps):
                    save(directory, progress, setup.optimizer, journal.offsets(), keep=config.save_total_limit)
                if directory.interrupted():
                    return EXIT_INTERRUPTED
        name = Path(config.model_name_or_path).name
        card = f"`{name}` after {progress.step} steps of fastrl:\n\n```\n{setup.algorithm}\n```"
        save_pretrained(setup.policy, tokenizer, directory.path / "model", card=card)
    return 0


def set_up(config: GRPOConfig, tokenizer: PreTrainedTokenizerBase) -> Setup:
    """Check the data, then load the models; what can be refused is refused before a weight is read."""
    algorithm = algorithm_from(config)
    rewards = resolve_rewards(config.reward_funcs, config.reward_weights)
    load = partial(
        load_prompts,
        tokenizer=tokenizer,
        data=config.data,
        rewards=rewards,
        max_prompt_length=config.rollout.max_prompt_length,
        output_dir=config.output_dir,
    )
    prompts = load(config.train_dataset)
    held_out = load(config.eval_dataset) if config.eval_dataset else []
    device = pick_device(config.device)
    load_one = partial(
        load_model,
        config.model_name_or_path,
        dtype=compute_dtype(config.dtype),
        device=device,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    policy = load_one(gradient_checkpointing=config.gradient_checkpointing)
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    groups = batch_size * config.steps_per_generation // config.num_generations
    rounds = ceil(config.num_train_epochs * len(prompts) / groups)
    return Setup(
        prompts=prompts,
        held_out=held_out,
        algorithm=algorithm,
        policy=policy,
        reference=load_one().requires_grad_(False) if algorithm.kl is not None else None,
        optimizer=MasterAdamW(
            policy,
            betas=(config.adam_beta1, config.adam_beta2),
            epsilon=config.adam_epsilon,
            weight_decay=config.weight_decay,
        ),
        sampler=Sampler(
            engine=BuiltinEngine(policy, tokenizer, batch_size=config.rollout.batch_size),
            decode=partial(tokenizer.decode, skip_special_tokens=True),
            rewards=rewards,
            sampling=sampling_of(config),
            num_generations=config.num_generations,
            seed=config.seed,
            overlong=config.overlong,
        ),
        groups=groups,
        total_steps=config.max_steps
        if config.max_steps > 0
        else rounds * config.steps_per_generation * config.num_iterations,
    )


def learn(config: GRPOConfig, setup: Setup, journal: Journal, experience: Experience, progress: Progress) -> Progress:
    """Take the optimizer steps of one round and log them; return the progress after them."""
    algorithm = _steered(setup.algorithm, progress)
    advantage = algorithm.advantage(experience.reward, experience.group)
    steps = cut_into_steps(
        algorithm,
        experience.rollouts,
        advantage,
        experience.group,
        is_judged=experience.reward.isfinite(),
        is_kept=_kept(config, experience),
        keep_denominator=config.keep_masked_denominator,
        steps=config.steps_per_generation,
    )
    started = perf_counter()
    batches = [_prepared(config, setup, algorithm, step) for step in steps]
    of_round = experience_metrics(experience) | {"time/logprob": perf_counter() - started}
    samples, errors = _samples(config, setup, experience, advantage.tolist()), experience.scores.errors
    updates = config.num_iterations * list(zip(steps, batches, strict=True))
    for step, step_batches in updates[: setup.total_steps - progress.step]:
        started = perf_counter()
        metrics = update(
            setup.policy,
            setup.optimizer,
            policy_batch_loss(algorithm, config.kernels),
            step_batches,
            config,
            temperature=config.temperature,
            lr=_learning_rate(config, setup, progress),
            step=progress.step + 1,
        )
        if step is steps[0] and samples and draws_from_the_policy(config):
            check_probability_error(metrics.get("sampling/probability_error", 1.0), step=progress.step + 1)
        progress = _advanced(config, progress, metrics, step, step_batches)
        algorithm = _steered(setup.algorithm, progress)
        metrics = of_round | metrics | _speed(setup, of_round, step, len(updates), perf_counter() - started, progress)
        if progress.step % config.logging_steps == 0 or progress.step >= setup.total_steps:
            journal.write(progress.step, metrics, samples=samples, errors=errors)
            samples, errors = [], {}
        if exceeds_target_kl(metrics.get("approx_kl", 0.0), config.target_kl):
            break
    return progress


def evaluate(setup: Setup, journal: Journal, progress: Progress) -> None:
    """Sample the held-out prompts once each, always with the same seeds, and log what they earn."""
    sampler = replace(setup.sampler, num_generations=1, seed=setup.sampler.seed + 1)
    experience = collect(sampler, setup.held_out, range(len(setup.held_out)))
    found = estimate_by_group(experience.reward.tolist(), experience.group.tolist())
    metrics = {"eval/reward": found.mean, "eval/reward_standard_error": found.standard_error}
    metrics |= {
        f"eval/{name}": value for name, value in experience.scores.metrics.items() if name.startswith("rewards/")
    }
    journal.write(progress.step, metrics, errors=experience.scores.errors)


def sampling_of(config: GRPOConfig) -> Sampling:
    """Return the run's sampling parameters."""
    return Sampling(
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop=config.stop,
    )


def draws_from_the_policy(config: GRPOConfig) -> bool:
    """Whether completions come from the very distribution that is trained: no filter, no penalty."""
    return (config.top_p, config.top_k, config.min_p, config.repetition_penalty) == (1.0, 0, 0.0, 1.0)


def _prepared(config: GRPOConfig, setup: Setup, algorithm: PolicyGradient, step: StepSequences) -> list[TokenBatch]:
    return prepare(
        algorithm,
        step,
        model=setup.policy,
        reference=setup.reference,
        temperature=config.temperature,
        token_budget=config.packing.token_budget,
        chunk_rows=config.kernels.chunk_rows,
        needs_old=config.steps_per_generation * config.num_iterations > 1,
    )


def _kept(config: GRPOConfig, experience: Experience) -> Tensor:
    masked = ("length",) if config.mask_truncated_completions else ()
    return torch.tensor([rollout.finish_reason not in masked for rollout in experience.rollouts], dtype=torch.bool)


def _steered(algorithm: PolicyGradient, progress: Progress) -> PolicyGradient:
    """The algorithm with the adaptive KL coefficient of this moment."""
    if progress.kl_coef is None or algorithm.kl is None:
        return algorithm
    return replace(algorithm, kl=replace(algorithm.kl, coef=progress.kl_coef))


def _advanced(
    config: GRPOConfig,
    progress: Progress,
    metrics: dict[str, float],
    step: StepSequences,
    batches: Sequence[TokenBatch],
) -> Progress:
    tokens = sum(len(batch.target) for batch in batches)
    progress = replace(progress, step=progress.step + 1, num_tokens=progress.num_tokens + tokens)
    if config.adaptive_kl_target is None or "kl" not in metrics:
        return progress
    coef = progress.kl_coef if progress.kl_coef is not None else config.beta
    assert coef is not None, "validation refuses adaptive_kl_target without beta"
    controller = AdaptiveKL(coef, config.adaptive_kl_target)
    return replace(progress, kl_coef=adapted(controller, metrics["kl"], samples=step.n_sequences).coef)


def _learning_rate(config: GRPOConfig, setup: Setup, progress: Progress) -> float:
    return learning_rate_at(
        progress.step,
        peak=config.learning_rate,
        kind=config.lr_scheduler_type,
        warmup_steps=warmup_length(
            setup.total_steps, warmup_steps=config.warmup_steps, warmup_ratio=config.warmup_ratio
        ),
        total_steps=setup.total_steps,
    )


def _speed(
    setup: Setup, of_round: dict[str, float], step: StepSequences, updates: int, seconds: float, progress: Progress
) -> dict[str, float]:
    """Time and size of one step; the round's sampling is spread evenly over its updates."""
    share = sum(value for name, value in of_round.items() if name.startswith("time/")) / updates
    speed = {
        "time/train": seconds,
        "step_time": seconds + share,
        "tokens_per_second": step.n_tokens / (seconds + share),
        "memory/peak_gib": peak_gib(setup.policy.device),
        "num_tokens": progress.num_tokens,
        "trained_sequences": len(step.sequences) / max(1, step.n_sequences),
    }
    return speed if progress.kl_coef is None else speed | {"kl_coef": progress.kl_coef}


def _samples(
    config: GRPOConfig, setup: Setup, experience: Experience, advantages: list[float]
) -> list[CompletionSample]:
    return samples_of(
        [prompt.prompt for prompt in experience.prompts],
        experience.completions,
        [reward.name for reward in setup.sampler.rewards],
        experience.scores,
        count=config.report.log_completions,
        advantages=advantages,
    )


def _crossed(before: int, after: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies in (before, after]: rounds may take several steps."""
    return every is not None and before // every != after // every
