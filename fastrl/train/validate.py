"""Rules that a configuration must satisfy beyond the types of its fields; all are checked before torch is imported.

Each problem is one line, `key: what is wrong; what to do`. The key is the dotted path of the option to look at first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from math import gcd
from string import Formatter
from typing import Any

from fastrl.train.config import (
    CPOConfig,
    DataBlock,
    DistillConfig,
    DPOConfig,
    EvalConfig,
    GenerateConfig,
    GKDConfig,
    GRPOConfig,
    InferenceConfig,
    KTOConfig,
    OnlineDPOConfig,
    OnPolicyConfig,
    ORPOConfig,
    OverlongBlock,
    PPOConfig,
    PreferenceConfig,
    PRMConfig,
    ReferenceConfig,
    RewardConfig,
    RLAIFConfig,
    SamplerCorrectionBlock,
    SFTConfig,
    TeacherConfig,
    TrainConfig,
)
from fastrl.train.validate_ahead import ahead_problems
from fastrl.train.validate_distillation import distill_problems, gkd_problems, teacher_problems
from fastrl.train.validate_environment import OWN_REWARD, environment_problems, played_problems
from fastrl.train.validate_files import dataset_problem, file_problem, model_problem, writable_problem
from fastrl.train.validate_lora import lora_problems
from fastrl.train.validate_ppo import ppo_problems
from fastrl.train.validate_preference import (
    cpo_problems,
    dpo_problems,
    kto_problems,
    online_dpo_problems,
    orpo_problems,
    preference_problems,
    reference_problems,
)
from fastrl.train.validate_ranges import range_problems
from fastrl.train.validate_ranks import launched_step_size, ranks_problems, sampling_ranks_problems, times_ranks
from fastrl.train.validate_reward_model import prm_problems, reward_problems
from fastrl.train.validate_rewards import reward_problem
from fastrl.train.validate_rlaif import rlaif_problems
from fastrl.train.validate_signals import aggregation_problems, composition_problems, signal_problems
from fastrl.train.validate_vllm import vllm_problems
from fastrl.train.validate_vllm_server import server_problems

Problems = Iterator[str]

# What the presets are, for rules that must hold before torch and `fastrl.algorithms` are imported; a test compares.
COMPARES_GROUPS = ("grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo", "sapo")
CLIPS_RATIOS = ("grpo", "dr_grpo", "dapo", "reinforce_pp", "gspo")
HAS_KL = ("reinforce_pp", "openrlhf", "open_instruct")


def problems(config: Any) -> list[str]:
    """Everything that is wrong with a configuration, each with its remedy; empty when it can run.

    Args:
        config: an instance of a dataclass in `fastrl.train.config`.

    Returns:
        lines of the form `key: sentence`.
    """
    found = list(range_problems(config))
    if found:
        return found  # the rules below divide and compare: they assume numbers in range
    return [problem for kind, rules in RULES if isinstance(config, kind) for problem in rules(config)]


def notes(config: Any) -> list[str]:
    """What is allowed but worth a word before the run, in the form of `problems`."""
    found: list[str] = []
    if not isinstance(config, (TrainConfig, InferenceConfig)):
        return found
    if config.dtype == "bfloat16" and config.device == "cpu":
        found.append("dtype: bfloat16 on a CPU is usually slower than float32, and less exact")
    if config.trust_remote_code:
        found.append("trust_remote_code: Python code in the model's directory will run with your rights")
    return found


def _train(config: TrainConfig) -> Problems:
    yield from model_problem(config.model_name_or_path)
    yield from dataset_problem("train_dataset", config.train_dataset)
    yield from dataset_problem("eval_dataset", config.eval_dataset)
    yield from writable_problem("output_dir", config.output_dir)
    yield from _data(config.data)
    yield from _schedule(config)
    yield from _machine(config)
    if config.resume_from_checkpoint not in (None, "auto"):
        yield from file_problem("resume_from_checkpoint", config.resume_from_checkpoint, is_directory=True)


def _schedule(config: TrainConfig) -> Problems:
    if config.max_steps == 0:
        yield "max_steps: 0 trains nothing; set -1 for num_train_epochs, or at least 1"
    if config.warmup_steps and config.warmup_ratio:
        yield "warmup_ratio: has no effect while warmup_steps is set; set one of them"
    if 0 < config.max_steps < config.warmup_steps:
        yield f"warmup_steps: {config.warmup_steps} is more than max_steps {config.max_steps}; lower it"
    if config.eval_steps and config.eval_dataset is None:
        yield "eval_steps: has no effect without eval_dataset; set that too"


def _machine(config: TrainConfig) -> Problems:
    if config.device == "cpu" and config.attn_implementation in ("varlen", "flash"):
        yield f"attn_implementation: {config.attn_implementation} needs a GPU and device is cpu; use sdpa"
    elif config.attn_implementation == "flash" and find_spec("flash_attn") is None:
        yield "attn_implementation: flash needs the package flash-attn, which is not installed; use varlen or auto"
    if config.kernels.layers == "triton":
        if config.device == "cpu":
            yield "kernels.layers: triton needs a GPU and device is cpu; use transformers"
        elif find_spec("triton") is None:
            yield "kernels.layers: triton needs the package triton, which is not installed; use transformers"
    for tracker in config.report.to:
        if find_spec(tracker) is None:
            yield f"report.to: the package {tracker} is not installed; pip install {tracker}"


def _data(block: DataBlock) -> Problems:
    for key, template in (
        ("data.prompt_template", block.prompt_template),
        ("data.completion_template", block.completion_template),
    ):
        if template is not None:
            yield from _template(key, template)
    yield from file_problem("data.chat_template", block.chat_template)


def _template(key: str, template: str) -> Problems:
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        yield f"{key}: is not a format string: {error}; write {{column}}, and {{{{ for a brace"
        return
    if not all(name[:1].isidentifier() for name in names):
        yield f"{key}: every pair of braces must name a column, as {{question}}; write {{{{ for a brace"


def _sft(config: SFTConfig) -> Problems:
    if config.truncate and config.max_length is None:
        yield "truncate: has no effect without max_length; set that too"
    if config.label_smoothing and config.loss_type != "nll":
        yield f"label_smoothing: has no place in loss_type {config.loss_type}; remove one of them"
    if config.max_length is not None and config.packing.token_budget < config.max_length:
        yield (
            f"packing.token_budget: {config.packing.token_budget} cannot hold one sequence of max_length "
            f"{config.max_length}; raise it, or lower max_length"
        )


def _grpo(config: GRPOConfig) -> Problems:
    if config.environment.factory is None or config.reward_funcs:  # an environment may judge itself
        yield from _rewards(config.reward_funcs)
    if config.reward_weights is not None and len(config.reward_weights) != len(config.reward_funcs):
        yield (
            f"reward_weights: needs one number for each of the {len(config.reward_funcs)} reward_funcs, "
            f"got {len(config.reward_weights)}"
        )
    yield from _groups(config)
    yield from _policy(config)
    yield from _clip(config)
    yield from _kl(config)
    yield from _lengths(config)
    yield from _correction(config.sampler_correction, is_stale=config.rollout.max_staleness > 0)


def _rewards(specs: tuple[str, ...]) -> Problems:
    if not specs:
        yield "reward_funcs: is empty; name at least one, such as numeric or package.module:function"
    for spec in specs:
        yield from reward_problem(spec)


def _groups(config: GRPOConfig) -> Problems:
    size = config.num_generations
    if size < 2 and config.algorithm in COMPARES_GROUPS:
        yield f"num_generations: {config.algorithm} compares completions of one prompt; set at least 2"
    per_device = config.per_device_train_batch_size
    steps = launched_step_size(config) // per_device * config.steps_per_generation
    if per_device * steps % size:
        unit = size // gcd(size, steps)
        fitting = [n for n in (per_device // unit * unit, (per_device // unit + 1) * unit) if n]
        yield (
            f"num_generations: per_device_train_batch_size x gradient_accumulation_steps x steps_per_generation = "
            f"{per_device} x {config.gradient_accumulation_steps} x {config.steps_per_generation}{times_ranks()} = "
            f"{per_device * steps} completions are no whole number of groups of {size}; "
            f"set per_device_train_batch_size to {' or '.join(map(str, fitting))}"
        )


def _policy(config: GRPOConfig) -> Problems:
    if config.temperature == 0:
        yield "temperature: 0 is greedy, every completion of a prompt would be the same; set it above 0"
    if "" in config.stop:
        yield "stop: an empty text would end every completion at once; remove it"
    if config.parity and config.algorithm != "grpo":
        yield f"parity: {config.parity} brings its own algorithm, and algorithm is {config.algorithm}; remove one"
    if config.keep_masked_denominator and not config.mask_truncated_completions:
        yield "keep_masked_denominator: has no effect while mask_truncated_completions is false; set that too"
    if config.target_kl is not None and config.steps_per_generation * config.num_iterations == 1:
        yield (
            "target_kl: can stop nothing, each batch has one update: set num_iterations or steps_per_generation "
            "above 1, or remove it"
        )


def _clip(config: GRPOConfig) -> Problems:
    given = {"epsilon": config.epsilon, "epsilon_high": config.epsilon_high, "delta": config.delta}
    if config.parity is None and config.algorithm not in CLIPS_RATIOS:
        for key, value in given.items():
            if value is not None and (config.algorithm, key) != ("cispo", "epsilon_high"):
                takes = "takes epsilon_high alone" if config.algorithm == "cispo" else "clips no ratio"
                yield f"{key}: has no place in {config.algorithm}, which {takes}; remove it"
    upper = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if config.delta is not None and upper is not None and config.delta <= 1 + upper:
        yield f"delta: {config.delta} caps the ratio inside the clip range, which ends at {1 + upper}; set it above"


def _kl(config: GRPOConfig) -> Problems:
    has_kl = config.beta > 0 if config.beta is not None else (config.parity or config.algorithm) in HAS_KL
    if has_kl:
        return
    if config.adaptive_kl_target is not None:
        yield "adaptive_kl_target: steers beta, which must start above 0; set beta, such as 0.04"
    for key, value in (("kl_estimator", config.kl_estimator), ("kl_placement", config.kl_placement)):
        if value is not None:
            yield f"{key}: has no effect while beta is 0; set beta above 0, or remove it"


def _lengths(config: GRPOConfig) -> Problems:
    if config.overlong.buffer > config.max_completion_length:
        yield (
            f"overlong.buffer: {config.overlong.buffer} is longer than max_completion_length "
            f"{config.max_completion_length}; lower it"
        )
    if config.overlong.buffer == 0 and config.overlong.penalty != OverlongBlock().penalty:
        yield "overlong.penalty: has no effect while overlong.buffer is 0; set a buffer, in tokens"
    longest = config.max_completion_length + (config.rollout.max_prompt_length or 1)
    if config.packing.token_budget < longest:
        yield (
            f"packing.token_budget: {config.packing.token_budget} cannot hold one sequence of "
            f"rollout.max_prompt_length + max_completion_length = {longest} tokens; raise it"
        )


def _correction(block: SamplerCorrectionBlock, *, is_stale: bool) -> Problems:
    default = SamplerCorrectionBlock()
    mode = block.mode or ("truncate" if is_stale else "none")
    if mode == "mask" and block.low >= block.high:
        yield f"sampler_correction.low: {block.low} must be below sampler_correction.high {block.high}"
    if mode == "none" and block.high != default.high:
        yield "sampler_correction.high: has no effect while sampler_correction.mode is none; set the mode"
    if mode != "mask" and block.low != default.low:
        yield f"sampler_correction.low: has no effect while sampler_correction.mode is {mode}; set mask"


def _inference(config: InferenceConfig) -> Problems:
    yield from model_problem(config.model_name_or_path)
    yield from _data(config.data)
    if config.temperature == 0 and config.num_generations > 1:
        yield "num_generations: at temperature 0 all completions of a prompt are the same; set 1, or a temperature"


def _eval(config: EvalConfig) -> Problems:
    yield from dataset_problem("eval_dataset", config.eval_dataset)
    if config.environment.factory is None or config.reward_funcs:  # an environment may judge itself
        yield from _rewards(config.reward_funcs)
    yield from writable_problem("output_dir", config.output_dir)


def _generate(config: GenerateConfig) -> Problems:
    if bool(config.prompts) == (config.prompt_file is not None):
        yield "prompts: give either --prompts TEXT ... or --prompt_file FILE"
    if "" in config.prompts:
        yield "prompts: one of them is empty; a completion needs something to complete"
    if "" in config.stop:
        yield "stop: an empty text would end every completion at once; remove it"
    yield from dataset_problem("prompt_file", config.prompt_file)
    yield from writable_problem("output_file", config.output_file)
    for spec in config.verify:
        if spec != OWN_REWARD:
            yield from reward_problem(spec, key="verify")
    if config.verify and config.output_file is None:
        yield "output_file: verified completions are a dataset; name the file they go to"
    if config.verify and config.output_format == "preference" and config.num_generations < 2:
        yield "num_generations: a pair needs at least 2 completions of a prompt"
    if not config.verify:
        default = GenerateConfig(model_name_or_path="")
        for key in ("verify_threshold", "output_format", "max_per_prompt"):
            if getattr(config, key) != getattr(default, key):
                yield f"{key}: has no effect without verify; name the reward functions that decide"


# Configuration -> its rules; a subclass has its bases' rules too.
RULES: tuple[tuple[type, Callable[[Any], Problems]], ...] = (
    (TrainConfig, _train),
    (TrainConfig, lora_problems),
    (TrainConfig, ranks_problems),
    (OnPolicyConfig, sampling_ranks_problems),
    (GKDConfig, sampling_ranks_problems),
    (SFTConfig, _sft),
    (OnPolicyConfig, vllm_problems),
    (InferenceConfig, vllm_problems),
    (GKDConfig, vllm_problems),
    (OnPolicyConfig, server_problems),
    (InferenceConfig, server_problems),
    (GKDConfig, server_problems),
    (OnPolicyConfig, ahead_problems),
    (OnPolicyConfig, composition_problems),
    (OnPolicyConfig, environment_problems),
    (OnPolicyConfig, signal_problems),
    (GRPOConfig, _grpo),
    (GRPOConfig, aggregation_problems),
    (PPOConfig, ppo_problems),
    (PreferenceConfig, preference_problems),
    (ReferenceConfig, reference_problems),
    (DPOConfig, dpo_problems),
    (CPOConfig, cpo_problems),
    (ORPOConfig, orpo_problems),
    (KTOConfig, kto_problems),
    (OnlineDPOConfig, online_dpo_problems),
    (RewardConfig, reward_problems),
    (PRMConfig, prm_problems),
    (DistillConfig, distill_problems),
    (GKDConfig, gkd_problems),
    (GKDConfig, ahead_problems),
    (TeacherConfig, teacher_problems),
    (InferenceConfig, _inference),
    (InferenceConfig, ahead_problems),
    (EvalConfig, _eval),
    (EvalConfig, played_problems),
    (GenerateConfig, _generate),
    (GenerateConfig, played_problems),
    (RLAIFConfig, rlaif_problems),
)
