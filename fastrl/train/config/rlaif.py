"""Constitutional preference data: principles in place of human labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.train.config.inference import InferenceConfig

QUESTION = "Question:\n{prompt}\n\nAnswer:\n{response}\n\n"


@dataclass(frozen=True, kw_only=True)
class RLAIFConfig(InferenceConfig):
    """Preference pairs from principles: drafts, critiques and revisions, and a critic that says which is better.

    Attributes:
        prompt_file: JSONL or parquet with a `prompt` column.
        output_file: JSONL of preference rows to write, with its origin beside it.
        principles: what a good answer is, one text each; or principles_file.
        principles_file: YAML list of texts, or of mappings with name and text.
        critic_model_name_or_path: directory of the model that criticises, revises and labels; None is the policy.
        critic_judge: YAML file of a judge (docs/judge.md) whose endpoint does that instead.
        revisions: rounds of critique and revision of each draft; 0 compares drafts only.
        labels: who says which answer is better: "critic" scores all answers of a prompt and pairs the best with the
            worst; "revision" takes every last revision as better than its draft.
        min_margin: smallest difference of the critic's scores, in [0, 1], that makes a pair; ties never do.
        critique_template: format string with {prompt}, {response}, {principle}.
        revision_template: the same, with {critique} too.
        verdict_template: the same as critique_template; the critic's probability of the first verdict is the score.
        verdicts: of good and bad answers, for a critic that is a model here.
        max_critique_length: most tokens of a critique.
        temperature: of drafts, critiques and revisions.
    """

    prompt_file: str
    output_file: str
    principles: tuple[str, ...] = ()
    principles_file: str | None = None
    critic_model_name_or_path: str | None = None
    critic_judge: str | None = None
    revisions: int = 1
    labels: Literal["critic", "revision"] = "critic"
    min_margin: float = 0.0
    critique_template: str = (
        QUESTION + "Principle: {principle}\n\nPoint out where the answer breaks the principle. Be specific and short."
    )
    revision_template: str = (
        QUESTION + "Principle: {principle}\n\nCritique:\n{critique}\n\nRewrite the answer so that it keeps the "
        "principle. Reply with the rewritten answer and nothing else."
    )
    verdict_template: str = QUESTION + "Principle: {principle}\n\nDoes the answer keep the principle? Reply Yes or No."
    verdicts: tuple[str, ...] = ("Yes", "No")
    max_critique_length: int = 256
