"""Rows that teach a model to judge: a question with an answer in the prompt, the verdict as the completion.

A generative reward model is a language model after SFT on such rows; its reward is the probability of the verdict.

Source: Zhang 2024, arXiv:2408.15240 (GenRM: "Is the answer correct (Yes/No)?", reward p(Yes)).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrl.data.problems import DataError, Problem, described
from fastrl.data.template import filled

TEMPLATE = "Question:\n{prompt}\n\nAnswer:\n{completion}\n\nIs the answer correct? Reply Yes or No."
VERDICTS = ("Yes", "No")


def judgement_rows(
    row: Mapping[str, Any], *, template: str = TEMPLATE, verdicts: tuple[str, str] = VERDICTS
) -> list[dict[str, Any]]:
    """Turn a labelled or a preferred answer into conversations that end with a verdict.

    A row with `prompt, completion, label` makes one conversation, one with `prompt, chosen, rejected` two: chosen gets
    the first verdict, rejected the second. With a column `rationale` (labelled rows), its text follows the verdict
    after a line break, so that the verdict is still the first thing the model says.

    Args:
        row: prompts and completions are texts, or conversations of which the contents are joined by line breaks.
        template: format string with {prompt} and {completion}.
        verdicts: of right and wrong answers.

    Returns:
        Rows with prompt and completion as messages.

    Raises:
        DataError: neither of the two kinds of row, or a label that is neither true nor false.
    """
    if row.get("chosen") is not None and row.get("rejected") is not None:
        judged = [(row["chosen"], True), (row["rejected"], False)]
    elif row.get("completion") is not None and isinstance(row.get("label"), bool):
        judged = [(row["completion"], row["label"])]
    else:
        expected = "prompt, chosen, rejected, or prompt, completion and a label that is true or false"
        raise DataError([Problem("unknown format", "", expected, described(row))])
    rows = []
    for completion, is_right in judged:
        question = filled(template, {"prompt": _text(row["prompt"]), "completion": _text(completion)}, name="template")
        verdict = verdicts[0 if is_right else 1]
        said = verdict if row.get("rationale") is None else f"{verdict}\n{row['rationale']}"
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": said}],
            }
        )
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(str(message["content"]) for message in value)
