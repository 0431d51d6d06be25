"""Rules of constitutional preference data."""

from __future__ import annotations

from collections.abc import Iterator
from string import Formatter

from fastrl.train.config.rlaif import RLAIFConfig
from fastrl.train.validate_files import dataset_problem, file_problem, model_problem, writable_problem

FIELDS = {
    "critique_template": {"prompt", "response", "principle"},
    "revision_template": {"prompt", "response", "principle", "critique"},
    "verdict_template": {"prompt", "response", "principle"},
}


def rlaif_problems(config: RLAIFConfig) -> Iterator[str]:
    """Lines `key: what is wrong; what to do`."""
    yield from dataset_problem("prompt_file", config.prompt_file)
    yield from writable_problem("output_file", config.output_file)
    if bool(config.principles) == (config.principles_file is not None):
        yield "principles: give either principles or principles_file"
    yield from file_problem("principles_file", config.principles_file)
    yield from _critic(config)
    for key, known in FIELDS.items():
        yield from _template(key, getattr(config, key), known)
    if len(config.verdicts) != 2 or config.verdicts[0] == config.verdicts[1]:
        yield f"verdicts: must be two different texts, of good and bad answers, got {list(config.verdicts)}"
    if config.revisions == 0 and config.labels == "revision":
        yield "labels: revision needs revisions of at least 1; without them let the critic say which is better"
    if config.revisions == 0 and config.num_generations < 2:
        yield "num_generations: with revisions 0 a pair needs at least 2 drafts of a prompt"
    if config.labels == "revision" and config.min_margin:
        yield "min_margin: has no effect without scores; set labels to critic"


def _critic(config: RLAIFConfig) -> Iterator[str]:
    if config.critic_model_name_or_path is not None:
        found = model_problem(config.critic_model_name_or_path)
        yield from (problem.replace("model_name_or_path", "critic_model_name_or_path", 1) for problem in found)
        if config.critic_judge is not None:
            yield "critic_judge: there is a critic_model_name_or_path already; name one of them"
    if config.critic_judge is not None:
        from fastrl.rewards.judge_config import read_judge

        try:
            read_judge(config.critic_judge)
        except ValueError as error:
            yield f"critic_judge: {error}"


def _template(key: str, template: str, known: set[str]) -> Iterator[str]:
    try:
        names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        yield f"{key}: is not a format string: {error}; write {{{{ for a brace"
        return
    if names - known:
        listed = ", ".join(f"{{{name}}}" for name in sorted(known))
        yield f"{key}: may hold {listed}, got {{{min(names - known)}}}; write {{{{ for a brace"
    elif "response" not in names:
        yield f"{key}: does not show the answer; write {{response}} where it belongs"
