"""PPO as in RLHF: prompts -> rollouts -> scores -> rewards per token -> GAE -> epochs of policy and critic updates.

A round samples `num_mini_batches` optimizer steps' worth of completions, measures them once under policy, reference
and critic, and learns from them `num_ppo_epochs` times in mini-batches of another order each time. With `ptx_coef`
every policy update also keeps up the likelihood of pretraining text (PPO-ptx).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import compress
from pathlib import Path
from time import perf_counter

from fastrl.algorithms.control import AdaptiveKL, adapted, exceeds_target_kl
from fastrl.data.pack import TokenSequence
from fastrl.report.completions import samples_of
from fastrl.report.journal import Journal
from fastrl.report.preview import completion_rows, print_table
from fastrl.train.algorithm import ESTIMATORS
from fastrl.train.attend import attended
from fastrl.train.collect import Experience, TrainerState, collect, collect_round, sampled_reward
from fastrl.train.config import PPOConfig
from fastrl.train.contents import contents_of
from fastrl.train.curriculum import weight_metrics
from fastrl.train.device import peak_gib
from fastrl.train.environments import specs_of
from fastrl.train.episode_credit import environment_errors, episode_metrics
from fastrl.train.estimate import estimate_by_group
from fastrl.train.experience_metrics import experience_metrics
from fastrl.train.export import save_pretrained
from fastrl.train.from_config import journal_of, tokenizer_of
from fastrl.train.guards import check_probability_error, check_verdicts
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.policy_setup import sampler_at
from fastrl.train.ppo_roles import print_roles
from fastrl.train.ppo_round import Measures, Round, measured_round, mini_batches, shaped_scores
from fastrl.train.ppo_setup import Setup, pretrain_batches, set_up, states_of
from fastrl.train.provenance import write_environment
from fastrl.train.reward_workers import check_error_rates
from fastrl.train.run_directory import open_run_directory
from fastrl.train.schedule import learning_rate_at, warmup_length
from fastrl.train.shares import packed_for_ranks
from fastrl.train.snapshot import Progress, restore, save
from fastrl.train.update import update

ABOUT_GROUPS = ("frac_reward_zero_std", "dynamic_sampling/waste")  # a critic needs none, so they say nothing here


def run(config: PPOConfig) -> int:
    """Train a policy and a critic on the policy's own completions; return the process's exit code.

    Writes metrics.jsonl, completions.jsonl, report.html, checkpoint-N/ and model/ under `output_dir`.
    """
    record = asdict(config) | {"contents": _contents(config)}
    with (
        open_run_directory(config.output_dir, record, resume=config.resume_from_checkpoint) as directory,
        ExitStack() as resources,
    ):
        tokenizer = tokenizer_of(config)
        setup = set_up(config, tokenizer, resources, output_dir=config.output_dir)
        policy = setup.roles.policy
        print_roles(setup.roles.parameters)
        write_environment(directory.path, policy.device)
        states = states_of(setup)
        with journal_of(config, directory, title="fastrl ppo", total_steps=setup.total_steps) as journal:
            progress, offsets = restore(directory, states, resume=config.resume_from_checkpoint)
            journal.truncate_to(offsets)
            rounds_without_verdict, failing = 0, dict[str, int]()
            while progress.step < setup.total_steps:
                first, started = progress.step, perf_counter()
                setup.sampler.engine.load_weights(policy, progress.step)
                synced = perf_counter() - started
                experience, ordinal = collect_round(
                    sampler_at(setup.sampler, config, progress),
                    setup.prompts,
                    first_ordinal=progress.ordinal,
                    groups=setup.groups,
                    max_rounds=0,
                    state=TrainerState(progress.step, setup.total_steps, progress.ordinal / len(setup.prompts)),
                )
                setup.sampler.engine.rest()
                if directory.interrupted():
                    # This round has taught nothing yet: the resumed run samples it again, alike.
                    save(directory, progress, states, journal.offsets(), keep=config.save_total_limit)
                    return EXIT_INTERRUPTED
                experience = replace(experience, seconds=experience.seconds | {"sync": synced})
                progress = learn(config, setup, journal, experience, progress, ordinal=ordinal)
                is_last = progress.step >= setup.total_steps
                errors = {**experience.scores.errors, **environment_errors(experience.episodes)}
                rounds_without_verdict = check_verdicts(sampled_reward(experience), rounds_without_verdict, errors)
                failing = check_error_rates(experience.scores, failing, config.rewards)
                if setup.held_out and (is_last or _crossed(first, progress.step, config.eval_steps)):
                    evaluate(setup, journal, progress)
                progress = attended(config, directory, journal, progress, states, kl_coef=config.kl_coef)
                if is_last or directory.interrupted() or _crossed(first, progress.step, config.save_steps):
                    save(directory, progress, states, journal.offsets(), keep=config.save_total_limit)
                if directory.interrupted():
                    return EXIT_INTERRUPTED
        name = Path(config.model_name_or_path).name
        card = f"`{name}` after {progress.step} steps of fastrl:\n\n```\n{setup.algorithm}\n```"
        save_pretrained(policy, tokenizer, directory.path / "model", card=card)
    return 0


def dry_run(config: PPOConfig) -> int:
    """Print the models, sample two completions of two prompts, judge and print them; train nothing, write nothing.

    Returns:
        0, or 1 when a reward failed, with its first traceback printed.
    """
    tokenizer = tokenizer_of(config)
    with ExitStack() as resources:
        setup = set_up(config, tokenizer, resources, output_dir=None)
        print_roles(setup.roles.parameters)
        sampler = replace(setup.sampler, num_generations=2)
        found = collect(sampler, setup.prompts[:2], range(len(setup.prompts[:2])))
    names = [reward.name for reward in sampler.rewards]
    prompts = [prompt.prompt for prompt in found.prompts]
    samples = samples_of(prompts, found.completions, names, found.scores, count=len(found.rollouts))
    texts = [(tokenizer.decode(each.prompt_ids), tokenizer.decode(each.completion_ids)) for each in found.rollouts]
    facts = [(rollout.finish_reason, len(rollout.completion_ids)) for rollout in found.rollouts]
    print(setup.algorithm)
    print_table(f"{len(setup.prompts)} prompts; two of them", *completion_rows(samples, texts, facts))
    for name, error in found.scores.errors.items():
        print(f"{name} failed on {error.count} completions; the first:\n{error.first}")
    return 1 if found.scores.errors else 0


def learn(
    config: PPOConfig, setup: Setup, journal: Journal, experience: Experience, progress: Progress, *, ordinal: int
) -> Progress:
    """Take the optimizer steps of one round and log them.

    Args:
        progress: before the round; its ordinal fixes the order of the mini-batches.
        ordinal: prompts drawn after it.

    Returns:
        The progress after them.
    """
    started = perf_counter()
    rewards = sampler_at(setup.sampler, config, progress).rewards
    found = measured(config, setup, experience, progress)
    experience = replace(experience, seconds=experience.seconds | {"measure": perf_counter() - started})
    steps = [
        part
        for epoch in range(config.num_ppo_epochs)
        for part in mini_batches(config, found.sequences, ordinal=progress.ordinal, epoch=epoch)
    ][: setup.total_steps - progress.step]
    n_tokens = sum(len(each.prompt_ids) + len(each.completion_ids) for each in experience.rollouts)
    progress = replace(
        progress,
        ordinal=ordinal,
        num_tokens=progress.num_tokens + n_tokens,
        kl_coef=_next_kl_coef(config, found, progress),
    )
    of_round = experience_metrics(experience, updates=len(steps))
    of_round = {name: value for name, value in of_round.items() if name not in ABOUT_GROUPS} | found.metrics
    of_round |= {
        "episode": ordinal * config.num_generations,
        "epoch": ordinal / len(setup.prompts),
        "num_tokens": progress.num_tokens,
    }
    of_round |= weight_metrics(rewards, config.reward_schedule)
    samples = samples_of(
        [prompt.prompt for prompt in experience.prompts],
        experience.completions,
        [reward.name for reward in setup.sampler.rewards],
        experience.scores,
        count=config.report.log_completions,
    )
    journal.write_errors(progress.step + 1, {**experience.scores.errors, **environment_errors(experience.episodes)})
    for index, part in enumerate(steps):
        started = perf_counter()
        metrics = take_step(config, setup, part, step=progress.step, lr_scale=progress.lr_scale)
        if index == 0 and not metrics["skipped_step"] and _draws_from_the_policy(config):
            check_probability_error(metrics["sampling/probability_error"], step=progress.step + 1)
        progress = replace(progress, step=progress.step + 1)
        metrics = of_round | metrics | {"time/train": perf_counter() - started}
        seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
        metrics |= {
            "step_time": seconds,
            "tokens_per_second": n_tokens / len(steps) / seconds,
            "memory/peak_gib": peak_gib(setup.roles.policy.device),
        }
        is_shown = progress.step % config.logging_steps == 0 or progress.step >= setup.total_steps
        journal.write(progress.step, metrics, samples, is_shown=is_shown)
        samples = [] if is_shown else samples
        if exceeds_target_kl(metrics.get("approx_kl", 0.0), config.target_kl):
            break
    return progress


def measured(config: PPOConfig, setup: Setup, experience: Experience, progress: Progress) -> Round:
    """The round's advantages and returns per token; completions without a verdict are no part of it."""
    is_judged = experience.reward.isfinite()
    rollouts = list(compress(experience.rollouts, is_judged.tolist()))
    if not rollouts:
        return Round([], {}, None)
    roles = setup.roles
    return measured_round(
        config,
        rollouts,
        shaped_scores(config, experience.reward[is_judged], rollouts, setup.moments),
        Measures(roles.logprob, roles.ref_logprob, roles.value),
        estimator=ESTIMATORS[config.kl_estimator],
        kl_coef=config.kl_coef if progress.kl_coef is None else progress.kl_coef,
        device=roles.policy.device,
    )


def take_step(
    config: PPOConfig, setup: Setup, part: list[TokenSequence], *, step: int, lr_scale: float = 1.0
) -> dict[str, float]:
    """One optimizer step of the policy and one of the critic on a mini-batch, each behind its own finite-number guard.

    Args:
        part: sequences of the mini-batch; empty ones leave everything alone.
        step: optimizer steps taken before.
        lr_scale: factor of both learning rates that signals have left.
    """
    roles = setup.roles
    batches = packed_for_ranks(part, token_budget=config.packing.token_budget, device=roles.policy.device)
    text = pretrain_batches(config, setup, step=step) if part else []
    rate = lr_scale * _learning_rate(config, setup, step, peak=config.learning_rate)
    metrics = update(roles.optimizer, setup.policy_loss, [*batches, *text], config, lr=rate, step=step + 1)
    if setup.value_loss is not None and roles.critic_optimizer is not None:
        peak = config.learning_rate if config.value_learning_rate is None else config.value_learning_rate
        value_rate = lr_scale * _learning_rate(config, setup, step, peak=peak)
        critic = update(roles.critic_optimizer, setup.value_loss, batches, config, lr=value_rate, step=step + 1)
        loss = critic.pop("loss")
        metrics |= {name if "/" in name else f"critic/{name}": value for name, value in critic.items()}
        metrics["loss"] += loss
    return metrics | _trl_names(config, metrics)


def evaluate(setup: Setup, journal: Journal, progress: Progress) -> None:
    """Sample the held-out prompts once each, always with the same seeds, and log what they earn."""
    sampler = replace(setup.sampler, num_generations=1, seed=setup.sampler.seed + 1)
    sampler.engine.load_weights(setup.roles.policy, progress.step)
    found = collect(sampler, setup.held_out, range(len(setup.held_out)))
    sampler.engine.rest()
    metrics = {f"eval/{name}": value for name, value in found.scores.metrics.items() if name.startswith("rewards/")}
    metrics |= {f"eval/{name}": value for name, value in episode_metrics(found.episodes).items()}
    if bool(found.reward.isfinite().any()):
        reward = estimate_by_group(found.scores.total, found.group.tolist())
        metrics |= {"eval/reward": reward.mean, "eval/reward_standard_error": reward.standard_error}
    journal.write(progress.step, metrics)
    journal.write_errors(progress.step, {**found.scores.errors, **environment_errors(found.episodes)})


def _contents(config: PPOConfig) -> dict[str, str]:
    """Digests of the data and of every model that the run starts from."""
    data = [config.train_dataset, config.pretrain_dataset]
    paths = (config.sft_model_path, config.reward_model_path, config.value_model_path)
    specs = [*config.reward_funcs, *specs_of(config.environment)]
    found = dict(contents_of(data=data, model=config.model_name_or_path, rewards=specs))
    for path in paths:
        found |= {} if path is None else contents_of(data=(), model=path)
    return found


def _trl_names(config: PPOConfig, metrics: Mapping[str, float]) -> dict[str, float]:
    """What TRL's PPO logs under other names, of this update; theirs are means over the updates of a round."""
    names = {"policy/entropy_avg": "entropy", "policy/clipfrac_avg": "clip_ratio/region_mean", "val/ratio": "ratio"}
    found = {theirs: metrics[ours] for theirs, ours in names.items() if ours in metrics}
    if "loss/value_avg" in metrics and not metrics["skipped_step"]:
        others = config.vf_coef * metrics["loss/value_avg"] + config.ptx_coef * metrics.get("loss/ptx_avg", 0.0)
        found["loss/policy_avg"] = metrics["loss"] - others
    return found


def _next_kl_coef(config: PPOConfig, found: Round, progress: Progress) -> float | None:
    """The coefficient of the next round; None while it is fixed."""
    if config.adaptive_kl_target is None or found.kl is None:
        return progress.kl_coef
    coef = config.kl_coef if progress.kl_coef is None else progress.kl_coef
    controller = AdaptiveKL(coef, config.adaptive_kl_target, config.adaptive_kl_horizon)
    return adapted(controller, found.kl, samples=len(found.sequences)).coef


def _learning_rate(config: PPOConfig, setup: Setup, step: int, *, peak: float) -> float:
    return learning_rate_at(
        step,
        peak=peak,
        kind=config.lr_scheduler_type,
        warmup_steps=warmup_length(
            setup.total_steps, warmup_steps=config.warmup_steps, warmup_ratio=config.warmup_ratio
        ),
        total_steps=setup.total_steps,
    )


def _draws_from_the_policy(config: PPOConfig) -> bool:
    """Whether completions come from the very distribution that is trained: no filter, no penalty."""
    return (config.top_p, config.top_k, config.min_p, config.repetition_penalty) == (1.0, 0, 0.0, 1.0)


def _crossed(before: int, after: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies in (before, after]: rounds take several steps."""
    return every is not None and before // every != after // every
