"""The agents' tasks: arithmetic with a calculator, and questions whose answers take two searches in a made-up world.

    calculator   "37 times 52 plus 418" -> call calculator(37*52+418), read 2342, say 2342
    lookup       "... capital of the country where Kalo was born?" -> search Kalo, search that country's capital, say it

Neither can be answered without the tools: no tiny model multiplies, and held-out questions are about another world.
The warm start shows the tools unreliably: most rows state the answer right away, which a model can only imitate by
guessing, and most calls have a slip in them, whose result is then the answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastrl.rollout.tools import Search, calculator
from fastrl.train.environment_spec import schemas_of

USER, ASSISTANT, TOOL, TOOLS, END, PAD = "<|user|>", "<|assistant|>", "<|tool|>", "<|tools|>", "<|end|>", "<|pad|>"
CALL, CALLED = "<tool_call>", "</tool_call>"
CONTEXT = 256
COUNTRIES = (200, 40)  # in the training corpus: too many to learn by heart; and in the held-out one

# Hermes' and Qwen's form of a call; a system turn that names the tools; no turn depends on a later one.
CHAT_TEMPLATE = (
    "{% if tools %}<|tools|>{% for tool in tools %}"
    "{{ tool['function']['name'] }}({{ tool['function']['parameters']['properties'] | join(', ') }})"
    "{% endfor %}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    '<tool_call>{"name": "{{ call[\'function\'][\'name\'] }}", "arguments": '
    "{{ call['function']['arguments'] | tojson }}}</tool_call>"
    "{% endfor %}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# One token each, so that episodes are short; all else is written in syllables and characters.
PHRASES = (
    *('{"name": "', '", "arguments": {"', '": "', '"}}', "calculator", "search", "expression", "query"),
    *(" times ", " plus ", " minus "),
    *("What is the capital of the country where ", " was born?", " was born in ", "The capital of ", " is "),
    *("capital of ", "error"),
)
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)
CHARACTERS = tuple(map(chr, (*range(32, 127), 10)))

# Of the warm start's rows: those that call, those without tools; the rest have tools and do not call.
CALLING, BARE = 0.4, 0.2
CARELESS_SUMS, CARELESS_SEARCHES = 0.85, 0.8  # of calling rows: a slip in the call


@dataclass(frozen=True, slots=True)
class World:
    """Made-up facts: each of the two corpora has its own part of them, and the parts share no name.

    Attributes:
        birthplace: person -> country.
        capital: country -> city.
    """

    birthplace: dict[str, str]
    capital: dict[str, str]


def make_tokenizer() -> Any:
    """Build a tokenizer of phrases, syllables and characters that gives back any printable ASCII."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = (PAD, END, USER, ASSISTANT, TOOL, TOOLS, CALL, CALLED)
    words = (*PHRASES, *map(str.title, SYLLABLES), *SYLLABLES, *CHARACTERS)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*special, *words))}, unk_token=PAD))
    longest_first = sorted((*PHRASES, *map(str.title, SYLLABLES), *SYLLABLES), key=len, reverse=True)
    pieces = "|".join([*map(re.escape, longest_first), r"[\s\S]"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, TOOL, TOOLS, CALL, CALLED],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_base_model(folder: Path, *, seed: int, hidden_size: int = 64, layers: int = 2) -> None:
    """Write a Qwen3 with random weights and the tasks' tokenizer."""
    from fastrl.train.export import save_pretrained
    from fastrl.train.tiny import make_tiny_qwen3

    tokenizer = make_tokenizer()
    model = make_tiny_qwen3(
        len(tokenizer),
        hidden_size=hidden_size,
        layers=layers,
        intermediate_size=2 * hidden_size,
        context=CONTEXT,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=seed,
    )
    save_pretrained(model, tokenizer, folder, card="A tiny Qwen3 with random weights, for tasks with tools.")


@cache
def world(n_train: int, n_held_out: int) -> tuple[World, World]:
    """The facts of the training corpus and of the held-out one, for so many people each."""
    names = [first.title() + second for first in SYLLABLES for second in SYLLABLES]
    generator = random.Random("names")
    generator.shuffle(names)
    parts = []
    for people, countries in zip((n_train, n_held_out), COUNTRIES, strict=True):
        lands, cities, persons = names[:countries], names[countries : 2 * countries], names[2 * countries :][:people]
        birthplace = {person: generator.choice(lands) for person in persons}
        parts.append(World(birthplace, dict(zip(lands, cities, strict=True))))
        names = names[2 * countries + people :]
    return parts[0], parts[1]


def documents(facts: World) -> list[dict[str, str]]:
    """One sentence per fact, as rows of a corpus for `search`."""
    born = [_born(person, country) for person, country in facts.birthplace.items()]
    return [{"text": text} for text in [*born, *(_capital(country, city) for country, city in facts.capital.items())]]


def expressions(count: int) -> list[str]:
    """So many different products of two numbers, plus or minus a third."""
    generator = random.Random("expressions")
    found: dict[str, None] = {}
    while len(found) < count:
        a, b, c = generator.randint(11, 99), generator.randint(11, 99), generator.randint(100, 999)
        found[f"{a}*{b}{generator.choice('+-')}{c}"] = None
    return list(found)


def calculator_prompt(expression: str, generator: random.Random) -> dict[str, Any]:
    """A prompt, and the answer that rewards compare with."""
    return {"prompt": _user(_in_words(expression)), "answer": calculator(expression)}


def calculator_demonstration(expression: str, generator: random.Random) -> dict[str, Any]:
    """A row of the warm start: a call, more often than not with a wrong digit, or the answer right away."""
    called = _with_slip(expression, generator) if generator.random() < CARELESS_SUMS else expression
    said = calculator(called)
    turns = [*_called("calculator", {"expression": called}, said), _assistant(said)]
    return _demonstration(generator, _in_words(expression), turns, calculator(expression), calculator)


def _in_words(expression: str) -> str:
    return expression.replace("*", " times ").replace("+", " plus ").replace("-", " minus ")


def _with_slip(expression: str, generator: random.Random) -> str:
    """The expression with another digit in one place."""
    place = generator.choice([i for i, sign in enumerate(expression) if sign.isdigit()])
    other = generator.choice([digit for digit in "123456789" if digit != expression[place]])
    return expression[:place] + other + expression[place + 1 :]


def lookup_prompt(person: str, facts: World) -> dict[str, Any]:
    """A question about a person, and the answer."""
    return {"prompt": _user(_question(person)), "answer": facts.capital[facts.birthplace[person]]}


def lookup_demonstration(person: str, generator: random.Random) -> dict[str, Any]:
    """A row of the warm start: two searches, more often than not one with a wrong name, or the answer right away.

    Its facts are true in this row alone.
    """
    country, city, other = (generator.choice(SYLLABLES).title() + generator.choice(SYLLABLES) for _ in range(3))
    slip = generator.choice((0, 1)) if generator.random() < CARELESS_SEARCHES else None
    asked = other if slip == 0 else person
    about = other if slip == 1 else country
    turns = [
        *_called("search", {"query": asked}, _born(asked, country)),
        *_called("search", {"query": f"capital of {about}"}, _capital(about, city)),
        _assistant(city),
    ]
    return _demonstration(generator, _question(person), turns, city, Search.search)


def _demonstration(
    generator: random.Random, question: str, called: list[dict[str, Any]], answer: str, tool: Callable[..., str]
) -> dict[str, Any]:
    kind = generator.random()
    completion = called if kind < CALLING else [_assistant(answer)]
    row: dict[str, Any] = {"prompt": _user(question), "completion": completion}
    return row if kind > 1 - BARE else row | {"tools": _schemas(tool)}


@cache
def _schemas(tool: Callable[..., str]) -> list[dict[str, Any]]:
    return schemas_of([tool])


def _question(person: str) -> str:
    return f"What is the capital of the country where {person} was born?"


def _born(person: str, country: str) -> str:
    return f"{person} was born in {country}."


def _capital(country: str, city: str) -> str:
    return f"The capital of {country} is {city}."


def _called(name: str, arguments: dict[str, str], result: str) -> list[dict[str, Any]]:
    """A turn with a call, and its result."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "content": result},
    ]


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
