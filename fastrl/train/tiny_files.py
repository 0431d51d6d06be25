"""Names of what is made on the spot: `tiny:NAME` stands for a model directory or a data file of a small task.

With them every recipe can be tried without downloading anything: `--model_name_or_path tiny:warm --train_dataset
tiny:preference`. `fastrl.recipes.tiny` makes them, after the configuration has been checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

PREFIX = "tiny:"

# name -> what it is; each data file also exists as NAME_held_out, with other questions.
MODELS = {
    "base": "a Qwen3 of 0.1 M parameters with random weights, and its tokenizer",
    "warm": "base after 60 steps of SFT: sorts some of the numbers",
    "sorted": "base after 160 steps of SFT: sorts nearly all of them",
    "reward_model": "warm with a scalar head, after 60 steps on ranked: scores sorted digits higher",
    "critic": "base after 500 steps of SFT on critiques: says whether digits are sorted, and sorts them",
    "student": "a Qwen3 of an eighth of base's size with random weights, and the same tokenizer",
    "wide": "warm with two attention heads of 32 numbers in place of four of 16: vLLM's CPU kernels begin there",
    "agent": "a Qwen3 of 0.1 M parameters with random weights, and a tokenizer for the tasks with tools",
}
FILES = {
    "sft": "prompt and completion: six digits, and the digits sorted",
    "reverse": "prompt and completion of another task: the digits sorted from large to small",
    "prompts": "prompt and answer, for rewards such as exact_match",
    "preference": "prompt, chosen (sorted) and rejected (two digits changed places)",
    "unpaired": "prompt, completion (as in preference) and label: is it sorted?",
    "ranked": "prompt, four completions and their scores: the share of digits in the right place",
    "steps": "prompt, six steps of one digit, and a label for each: is it the next digit in order?",
    "judgements": "a question with an answer as the prompt; completion 1 when it is sorted, else 0",
    "critiques": "judgements, and the same with the verdict in the prompt and the digits sorted as completion",
    "calculator_sft": "sums in words, answered at once or with a call of the calculator that often has a wrong digit",
    "calculator": "sums in words and their values, for an agent with a calculator",
    "lookup_sft": "questions answered at once or with two searches, of which one often asks for a wrong name",
    "lookup": "questions whose answers take two searches in lookup_corpus",
}
CORPORA = {"lookup_corpus": "made-up facts for the tool search; other ones in lookup_corpus_held_out"}


def is_tiny(value: object) -> bool:
    """Whether a value of a configuration is made on the spot."""
    return isinstance(value, str) and value.startswith(PREFIX)


def tiny_problem(key: str, value: str, known: dict[str, str]) -> Iterator[str]:
    """One line when `value` names nothing of `known`, which is MODELS, FILES or CORPORA."""
    name = value.removeprefix(PREFIX)
    if name in known or (known is not MODELS and name.removesuffix("_held_out") in known):
        return
    meant = get_close_matches(name, known, n=1)
    guess = f" (did you mean {PREFIX}{meant[0]}?)" if meant else ""
    yield f"{key}: {value} is not known; expected one of {', '.join(PREFIX + each for each in known)}{guess}"
