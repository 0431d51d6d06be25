"""GRPO and its family: prompts -> rollouts -> rewards -> advantages -> packed batches -> loss -> optimizer -> sampler.

A round samples `steps_per_generation` optimizer steps' worth of completions and learns from each
`num_iterations` times. With one update per round l_old is the policy itself and costs no pass; with beta 0 there is
no reference model; completions without gradient never reach the backbone.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from fastrl.algorithms.control import AdaptiveKL, adapted, exceeds_target_kl
from fastrl.algorithms.policy_gradient import PolicyGradient
from fastrl.losses.advantage import multi_objective
from fastrl.report.completions import samples_of
from fastrl.report.journal import Journal
from fastrl.report.preview import completion_rows, print_table
from fastrl.train.ahead import Rounds, Source
from fastrl.train.algorithm import algorithm_from
from fastrl.train.attend import attended
from fastrl.train.collect import Experience, collect, reward_columns, sampled_reward
from fastrl.train.config import GRPOConfig
from fastrl.train.contents import contents_of
from fastrl.train.curriculum import weight_metrics
from fastrl.train.device import peak_gib
from fastrl.train.engine import opened_engine
from fastrl.train.environments import rewards_of, specs_of
from fastrl.train.episode_credit import environment_errors, episode_metrics, token_credit
from fastrl.train.estimate import estimate_by_group
from fastrl.train.experience_metrics import experience_metrics
from fastrl.train.export import save_pretrained
from fastrl.train.from_config import journal_of, model_of, tokenizer_of
from fastrl.train.guards import check_probability_error, check_verdicts
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.policy_setup import Setup, prompts_of, sampler_at, sampler_of, set_up
from fastrl.train.prepare import StepSequences, cut_into_steps, prepare
from fastrl.train.provenance import write_environment
from fastrl.train.reward_workers import check_error_rates
from fastrl.train.run_directory import open_run_directory
from fastrl.train.schedule import learning_rate_at, warmup_length
from fastrl.train.snapshot import Progress, Stateful, restore, save
from fastrl.train.staleness import RatioRange, is_fresh
from fastrl.train.stream import Stream
from fastrl.train.update import policy_batch_loss, update
from fastrl.types import TokenBatch


def run(config: GRPOConfig) -> int:
    """Train a policy on its own completions; return the process's exit code.

    Writes metrics.jsonl, completions.jsonl, report.html, checkpoint-N/ and model/ under `output_dir`.
    """
    specs = [*config.reward_funcs, *specs_of(config.environment)]
    contents = contents_of(data=[config.train_dataset], model=config.model_name_or_path, rewards=specs)
    record = asdict(config) | {"contents": contents}
    with (
        open_run_directory(config.output_dir, record, resume=config.resume_from_checkpoint) as directory,
        ExitStack() as resources,
    ):
        tokenizer = tokenizer_of(config)
        setup = set_up(config, tokenizer, resources)
        write_environment(directory.path, setup.policy.device)
        title = f"fastrl grpo ({config.parity or config.algorithm})"
        rounds = rounds_of(config, setup)
        resources.enter_context(closing(rounds))
        states: dict[str, Stateful] = {"optimizer": setup.optimizer}
        if config.rollout.max_staleness > 0:
            states["rounds"] = rounds
        with journal_of(config, directory, title=title, total_steps=setup.total_steps) as journal:
            progress, offsets = restore(directory, states, resume=config.resume_from_checkpoint)
            journal.truncate_to(offsets)
            rounds_without_verdict, failing = 0, dict[str, int]()
            while progress.step < setup.total_steps:
                first = progress.step
                experience, ordinal = rounds.take(progress)
                if directory.interrupted() and config.rollout.max_staleness == 0:
                    # This round has taught nothing yet: the resumed run samples it again, alike.
                    save(directory, progress, states, journal.offsets(), keep=config.save_total_limit)
                    return EXIT_INTERRUPTED
                progress = learn(config, setup, journal, experience, replace(progress, ordinal=ordinal))
                is_last = progress.step >= setup.total_steps
                errors = {**experience.scores.errors, **environment_errors(experience.episodes)}
                rounds_without_verdict = check_verdicts(sampled_reward(experience), rounds_without_verdict, errors)
                failing = check_error_rates(experience.scores, failing, config.rewards)
                if setup.held_out and (is_last or _crossed(first, progress.step, config.eval_steps)):
                    with rounds.paused():
                        evaluate(setup, journal, progress)
                beta = 0.0 if setup.algorithm.kl is None else setup.algorithm.kl.coef
                progress = attended(config, directory, journal, progress, states, kl_coef=beta)
                if is_last or directory.interrupted() or _crossed(first, progress.step, config.save_steps):
                    save(directory, progress, states, journal.offsets(), keep=config.save_total_limit)
                if directory.interrupted():
                    return EXIT_INTERRUPTED
        name = Path(config.model_name_or_path).name
        card = f"`{name}` after {progress.step} steps of fastrl:\n\n```\n{setup.algorithm}\n```"
        save_pretrained(setup.policy, tokenizer, directory.path / "model", card=card)
    return 0


def dry_run(config: GRPOConfig) -> int:
    """Sample two completions of two prompts, judge and print them; train nothing, write nothing.

    Returns:
        0, or 1 when a reward failed, with its first traceback printed.
    """
    tokenizer = tokenizer_of(config)
    algorithm = algorithm_from(config)
    rewards = rewards_of(config)
    prompts = prompts_of(config, tokenizer, rewards, config.train_dataset, output_dir=None)
    with opened_engine(config, model_of(config), tokenizer) as engine:
        sampler = replace(
            sampler_of(config, engine, tokenizer, rewards), num_generations=min(2, config.num_generations)
        )
        found = collect(sampler, prompts[:2], range(len(prompts[:2])))
    names = [reward.name for reward in rewards]
    samples = samples_of(
        [prompt.prompt for prompt in found.prompts], found.completions, names, found.scores, count=len(found.rollouts)
    )
    texts = [(tokenizer.decode(each.prompt_ids), tokenizer.decode(each.completion_ids)) for each in found.rollouts]
    facts = [(rollout.finish_reason, len(rollout.completion_ids)) for rollout in found.rollouts]
    print(algorithm)
    print_table(f"{len(prompts)} prompts; two of them", *completion_rows(samples, texts, facts))
    for name, error in found.scores.errors.items():
        print(f"{name} failed on {error.count} completions; the first:\n{error.first}")
    return 1 if found.scores.errors else 0


def learn(config: GRPOConfig, setup: Setup, journal: Journal, experience: Experience, progress: Progress) -> Progress:
    """Take the optimizer steps of one round and log them; return the progress after them."""
    algorithm = _steered(setup.algorithm, progress)
    rewards = sampler_at(setup.sampler, config, progress).rewards
    advantage = algorithm.advantage(experience.reward, experience.group)
    if config.multi_objective_aggregation == "normalize_then_sum":
        weights = torch.tensor([reward.weight for reward in rewards])
        advantage = multi_objective(reward_columns(experience), experience.group, weights)
    started = perf_counter()
    steps = cut_into_steps(
        algorithm,
        experience.rollouts,
        advantage,
        experience.group,
        is_judged=experience.reward.isfinite(),
        is_kept=_kept(config, experience),
        keep_denominator=config.keep_masked_denominator,
        steps=config.steps_per_generation,
        credit=token_credit(experience.episodes, experience.group, experience.reward.isfinite(), config.environment),
    )
    batches = [_prepared(config, setup, algorithm, step) for step in steps]
    experience = replace(experience, seconds=experience.seconds | {"logprob": perf_counter() - started})
    updates = (config.num_iterations * list(zip(steps, batches, strict=True)))[: setup.total_steps - progress.step]
    n_tokens = sum(step.n_tokens for step in steps)
    progress = replace(progress, num_tokens=progress.num_tokens + n_tokens)
    of_round = experience_metrics(experience, updates=len(updates)) | {
        "epoch": progress.ordinal / len(setup.prompts),
        "num_tokens": progress.num_tokens,
    }
    of_round |= weight_metrics(rewards, config.reward_schedule)
    samples = samples_of(
        [prompt.prompt for prompt in experience.prompts],
        experience.completions,
        [reward.name for reward in setup.sampler.rewards],
        experience.scores,
        count=config.report.log_completions,
        advantages=advantage.tolist(),
    )
    errors = {**experience.scores.errors, **environment_errors(experience.episodes)}
    journal.write_errors(progress.step + 1, errors)
    is_on_policy = draws_from_the_policy(config) and is_fresh(experience.rollouts, version=progress.step)
    for index, (step, step_batches) in enumerate(updates):
        started = perf_counter()
        batch_loss = policy_batch_loss(setup.policy, algorithm, config.kernels, temperature=config.temperature)
        ratios = RatioRange(batch_loss) if config.rollout.max_staleness > 0 else None
        metrics = update(
            setup.optimizer,
            batch_loss if ratios is None else ratios,
            step_batches,
            config,
            lr=_learning_rate(config, setup, progress),
            step=progress.step + 1,
        )
        metrics |= {} if ratios is None else ratios.metrics()
        if index == 0 and not metrics["skipped_step"] and is_on_policy:
            check_probability_error(metrics["sampling/probability_error"], step=progress.step + 1)
        progress = _advanced(config, setup, progress, metrics, step)
        algorithm = _steered(setup.algorithm, progress)
        metrics = of_round | metrics | {"time/train": perf_counter() - started}
        metrics |= _speed(metrics, n_tokens / len(updates), step, progress, setup.policy.device)
        is_shown = progress.step % config.logging_steps == 0 or progress.step >= setup.total_steps
        journal.write(progress.step, metrics, samples, is_shown=is_shown)
        samples = [] if is_shown else samples
        if exceeds_target_kl(metrics.get("approx_kl", 0.0), config.target_kl):
            break
    return progress


def evaluate(setup: Setup, journal: Journal, progress: Progress) -> None:
    """Sample the held-out prompts once each, always with the same seeds, and log what they earn."""
    sampler = replace(setup.sampler, num_generations=1, seed=setup.sampler.seed + 1)
    sampler.engine.load_weights(setup.policy, progress.step)
    found = collect(sampler, setup.held_out, range(len(setup.held_out)))
    sampler.engine.rest()
    metrics = {f"eval/{name}": value for name, value in found.scores.metrics.items() if name.startswith("rewards/")}
    metrics |= {f"eval/{name}": value for name, value in episode_metrics(found.episodes).items()}
    if bool(found.reward.isfinite().any()):
        reward = estimate_by_group(found.scores.total, found.group.tolist())
        metrics |= {"eval/reward": reward.mean, "eval/reward_standard_error": reward.standard_error}
    journal.write(progress.step, metrics)
    journal.write_errors(progress.step, {**found.scores.errors, **environment_errors(found.episodes)})


def rounds_of(config: GRPOConfig, setup: Setup) -> Rounds | Stream:
    """What rounds are taken from: sampled whole, or in segments with the newest weights."""
    source = Source(
        config=config,
        policy=setup.policy,
        sampler=setup.sampler,
        prompts=setup.prompts,
        groups=setup.groups,
        max_rounds=config.dynamic_sampling.max_rounds,
        updates=config.steps_per_generation * config.num_iterations,
        total_steps=setup.total_steps,
    )
    block = config.rollout
    if block.segment_tokens is None:
        return Rounds(source, depth=block.max_staleness)
    return Stream(source, depth=block.max_staleness, segment_tokens=block.segment_tokens)


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
        kernels=config.kernels,
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
    config: GRPOConfig, setup: Setup, progress: Progress, metrics: dict[str, float], step: StepSequences
) -> Progress:
    """The progress after an update; a skipped one leaves the adaptive KL coefficient alone, it measured nothing."""
    kl, coef = setup.algorithm.kl, progress.kl_coef
    if config.adaptive_kl_target is not None and kl is not None and not metrics["skipped_step"]:
        controller = AdaptiveKL(kl.coef if coef is None else coef, config.adaptive_kl_target)
        coef = adapted(controller, metrics["kl"], samples=step.n_sequences).coef
    return replace(progress, step=progress.step + 1, kl_coef=coef)


def _learning_rate(config: GRPOConfig, setup: Setup, progress: Progress) -> float:
    return progress.lr_scale * learning_rate_at(
        progress.step,
        peak=config.learning_rate,
        kind=config.lr_scheduler_type,
        warmup_steps=warmup_length(
            setup.total_steps, warmup_steps=config.warmup_steps, warmup_ratio=config.warmup_ratio
        ),
        total_steps=setup.total_steps,
    )


def _speed(
    metrics: dict[str, float], n_tokens: float, step: StepSequences, progress: Progress, device: torch.device
) -> dict[str, float]:
    """Time and size of one update; n_tokens is its share of the tokens that the round sampled and fed."""
    seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
    speed = {
        "step_time": seconds,
        "tokens_per_second": n_tokens / seconds,
        "memory/peak_gib": peak_gib(device),
        "trained_sequences": len(step.sequences) / max(1, step.n_sequences),
    }
    return speed if progress.kl_coef is None else speed | {"kl_coef": progress.kl_coef}


def _crossed(before: int, after: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies in (before, after]: rounds may take several steps."""
    return every is not None and before // every != after // every
