"""Rules of the recipes that learn from a teacher."""

from __future__ import annotations

from collections.abc import Iterator

from fastrl.train.config import DistillConfig, GKDConfig, KernelsBlock, TeacherConfig
from fastrl.train.validate_files import dataset_problem, file_problem, model_problem, writable_problem


def distill_problems(config: DistillConfig) -> Iterator[str]:
    """What cannot be distilled."""
    live, stored = config.teacher_model_name_or_path, config.teacher_logprobs
    if (live is None) == (stored is None):
        yield "teacher_model_name_or_path: give either --teacher_model_name_or_path DIR or --teacher_logprobs FILE"
    if live is not None:
        yield from _teacher(live)
    yield from file_problem("teacher_logprobs", stored)
    if stored is not None and config.teacher_dtype is not None:
        yield "teacher_dtype: has no effect on stored log-probabilities; remove it"
    if config.loss != "jsd" and config.beta is not None:
        yield f"beta: has no effect on {config.loss}; set loss jsd, or remove it"
    if config.beta is not None and not 0 < config.beta < 1:
        yield f"beta: {config.beta} is no mixture; set it between 0 and 1, or choose loss forward_kl or reverse_kl"
    if config.temperature == 0:
        yield "temperature: 0 leaves no distribution to learn; set it above 0"
    if config.alpha == 1:
        yield "alpha: 1 learns nothing from the teacher; lower it, or use fastrl sft"
    yield from _lengths(config)
    yield from _skips_nothing(config.kernels)


def gkd_problems(config: GKDConfig) -> Iterator[str]:
    """What cannot be distilled on the student's own completions."""
    yield from _teacher(config.teacher_model_name_or_path)
    if config.temperature == 0:
        yield "temperature: 0 is greedy, every visit of a prompt would sample the same; set it above 0"
    if config.beta > 1:
        yield f"beta: must be in [0, 1], got {config.beta}"
    if config.seq_kd and config.lmbda == 1:
        yield "seq_kd: has no effect while lmbda is 1, where the student samples every completion; remove it"
    if config.packing.token_budget < config.max_new_tokens:
        yield (
            f"packing.token_budget: {config.packing.token_budget} cannot hold a completion of max_new_tokens "
            f"{config.max_new_tokens}; raise it"
        )
    yield from _skips_nothing(config.kernels)


def teacher_problems(config: TeacherConfig) -> Iterator[str]:
    """What cannot be scored."""
    yield from model_problem(config.model_name_or_path)
    yield from dataset_problem("train_dataset", config.train_dataset)
    yield from dataset_problem("eval_dataset", config.eval_dataset)
    yield from writable_problem("output_file", config.output_file)
    if not config.output_file.endswith(".safetensors"):
        yield f"output_file: {config.output_file} is of an unknown type; name it .safetensors"
    if config.temperature == 0:
        yield "temperature: 0 leaves no distribution to store; set it above 0"
    yield from _lengths(config)
    if config.top_k == 0:
        yield "top_k: 0 keeps nothing of the teacher; set at least 1"


def _teacher(path: str) -> Iterator[str]:
    for problem in model_problem(path):
        yield problem.replace("model_name_or_path", "teacher_model_name_or_path", 1)


def _lengths(config: DistillConfig | TeacherConfig) -> Iterator[str]:
    if config.truncate and config.max_length is None:
        yield "truncate: has no effect without max_length; set that too"
    if config.max_length is not None and config.packing.token_budget < config.max_length:
        yield (
            f"packing.token_budget: {config.packing.token_budget} cannot hold one sequence of max_length "
            f"{config.max_length}; raise it, or lower max_length"
        )


def _skips_nothing(kernels: KernelsBlock) -> Iterator[str]:
    if kernels.skip_tolerance:
        yield "kernels.skip_tolerance: has no effect on a divergence, whose rows all count; remove it"
