"""Solutions in steps: token ids, where each step ends, and how a process reward model judges them.

ids = prompt, step 1, separator, step 2, separator, ...        the score of a step is read at its separator's end
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.data.check import Rejected
from fastrl.data.formats import STEPWISE
from fastrl.data.pack import TokenSequence, pack, unpack
from fastrl.data.problems import DataError, Problem, described
from fastrl.data.tokenize import render_prompt
from fastrl.losses.reward_model import last, product, weakest
from fastrl.train.config import PRMConfig
from fastrl.train.prompts import load_rows, set_aside
from fastrl.train.rankings import refuse_long
from fastrl.train.score_model import scored_sequence, token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# [K] probabilities of a solution's steps -> [] of the solution.
AGGREGATIONS: dict[str, Callable[[Tensor], Tensor]] = {"min": weakest, "product": product, "last": last}


@dataclass(frozen=True, slots=True)
class Solution:
    """One encoded solution.

    Attributes:
        ids: token ids of the prompt and of every step with its separator.
        ends: place of the last token of each step's separator.
        is_right: the label of each step; () where there are none.
    """

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    is_right: tuple[bool, ...] = ()


def load_solutions(
    path: str, tokenizer: Any, config: PRMConfig, *, context: int | None, output_dir: str | None
) -> list[Solution]:
    """Read a file of stepwise rows and encode it.

    Args:
        context: most tokens the model takes; None is no limit.
        output_dir: where `rejected.jsonl` goes; None writes nothing.

    Raises:
        DataError: bad rows, steps that are no single text, solutions that are too long.
    """
    rows, _ = load_rows(path, config.data, (STEPWISE,), output_dir=output_dir)
    encoded: list[Solution] = []
    refused: list[Rejected] = []
    for index, row in enumerate(rows):
        try:
            steps = [step_text(step, path=f"/completions/{i}") for i, step in enumerate(row["completions"])]
            solution = encoded_solution(
                tokenizer, row["prompt"], steps, separator=config.step_separator, tools=row.get("tools")
            )
            n = len(solution.ids)
            refuse_long(n, max_length=config.max_length, context=context, path="/completions")
            if n > config.packing.token_budget:
                expected = f"at most packing.token_budget = {config.packing.token_budget} tokens (raise it)"
                raise DataError([Problem("too long", "/completions", expected, str(n))])
        except DataError as error:
            refused.append(Rejected(rows.raw(index), rows.place(index), error.at(rows.place(index)).problems))
            continue
        encoded.append(Solution(solution.ids, solution.ends, tuple(row["labels"])))
    set_aside(refused, config.data, output_dir=output_dir, is_all=not encoded)
    return encoded


def step_text(step: Any, *, path: str) -> str:
    """A step as text: a string, or a conversation of one assistant message.

    Args:
        path: JSON pointer of the step, for the error.

    Raises:
        DataError: several messages, or content that is no text.
    """
    if isinstance(step, str):
        return step
    if len(step) != 1 or not isinstance(step[0].get("content"), str):
        raise DataError([Problem("wrong type", path, "a text, or one message of the assistant", described(step))])
    content: str = step[0]["content"]
    return content


def encoded_solution(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, steps: Sequence[str], *, separator: str, tools: Any = None
) -> Solution:
    """Join a prompt and its steps, each tokenised on its own, so that borders do not depend on what follows.

    Args:
        steps: at least one.
        separator: text after every step, the last included.

    Raises:
        ValueError: the tokenizer makes nothing of the separator.
    """
    end: list[int] = tokenizer(separator, add_special_tokens=False)["input_ids"]
    if not end:
        raise ValueError(f"step_separator: the tokenizer makes no token of {separator!r}; choose another text")
    ids = [*render_prompt(tokenizer, prompt, tools=tools)]
    ends = []
    for step in steps:
        ids += [*tokenizer(step, add_special_tokens=False)["input_ids"], *end]
        ends.append(len(ids) - 1)
    return Solution(tuple(ids), tuple(ends))


def solution_sequence(solution: Solution, *, weight: float, last_step_only: bool = False) -> TokenSequence:
    """Lay a solution out for packing, with `weight` where the score of a step is read."""
    weights = [0.0] * len(solution.ids)
    for end in solution.ends[-1:] if last_step_only else solution.ends:
        weights[end] = weight
    return scored_sequence(solution.ids, weights)


@torch.no_grad()
def step_probabilities(
    model: PreTrainedModel, solutions: Sequence[Solution], *, token_budget: int, device: torch.device
) -> list[Tensor]:
    """P(step is right) of every step: one [K] f32 tensor on the CPU for each solution, in the order given."""
    sequences = [solution_sequence(solution, weight=1.0) for solution in solutions]
    result = [torch.empty(0)] * len(solutions)
    for batch in pack(sequences, token_budget=token_budget, device=device):
        scores, weights = unpack(token_scores(model, batch), batch), unpack(batch.weight, batch)
        for place, score, weight in zip(batch.sequence.tolist(), scores, weights, strict=True):
            result[place] = score[weight != 0].sigmoid().cpu()
    return result


class StepReward:
    """A reward function (`fastrl.rewards.protocol`): what a process reward model says of the steps of a completion.

    Completions are cut at the separator; one without any text between separators gets 0.

    Args:
        model: as `load_score_model` reads it.
        tokenizer: the model's.
        separator: what it was trained with.
        aggregate: [K] probabilities of the steps -> [] reward; `weakest`, `product` or `last`.
        token_budget: most tokens of a packed batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        separator: str = "\n",
        aggregate: Callable[[Tensor], Tensor] = weakest,
        token_budget: int = 8192,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._separator = separator
        self._aggregate = aggregate
        self._token_budget = token_budget

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """[S] prompts and completions, texts or messages -> [S] rewards in [0, 1]."""
        result = [0.0] * len(completions)
        places, solutions = [], []
        for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            text = step_text(completion, path=f"/completions/{place}")
            steps = [step for step in text.split(self._separator) if step.strip()]
            if steps:
                places.append(place)
                solutions.append(encoded_solution(self._tokenizer, prompt, steps, separator=self._separator))
        probabilities = step_probabilities(
            self._model, solutions, token_budget=self._token_budget, device=self._model.device
        )
        for place, probability in zip(places, probabilities, strict=True):
            result[place] = self._aggregate(probability).item()
        return result
