"""What a judge is: the YAML file that names the endpoint, the question, the limits and the ledger."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Criterion:
    """One line of a rubric.

    Attributes:
        name: its key in the verdict.
        text: the question the judge answers with a number.
        weight: its share of the score is weight over the sum of the weights.
    """

    name: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Budget:
    """Most that may ever be spent through one ledger; None is no limit.

    Attributes:
        calls: HTTP requests, retries and re-asks included.
        tokens: of prompts and replies.
        cost: in the currency of `price`.
    """

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class Price:
    """What a million tokens cost.

    Attributes:
        input: of the prompt.
        output: of the reply.
    """

    input: float = 0.0
    output: float = 0.0


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """A judge behind an OpenAI-compatible endpoint.

    Attributes:
        base_url: of the endpoint, as http://127.0.0.1:8000/v1.
        model: the name it serves the judge under.
        api_key_env: name of the environment variable with the key; None sends no key of yours.
        instruction: the question: what a good answer is.
        rubric: several questions in place of one number; their weighted mean is the score.
        scale: smallest and largest number a verdict may give; they become 0 and 1.
        reference: column with a reference answer, shown to the judge.
        against: column with answers to compare with, or "group": the other completions of the same prompt. None gives
            every completion scores of its own.
        opponents: with "group", completions each one is compared with on its right, in a ring.
        temperature: of the judge.
        max_tokens: longest reply.
        concurrency: requests under way at a time.
        timeout: seconds of one request, connection to last byte.
        deadline: seconds of one verdict from its first request, retries included.
        max_retries: of one question, for statuses 408, 409, 425, 429 and 5xx, time-outs and broken connections.
        backoff: seconds; retry k waits a random time up to backoff * 2^k, and at least what Retry-After says.
        breaker_failures: failures in a row, over all requests, after which the endpoint counts as down.
        breaker_seconds: how long nothing is sent then; afterwards one request tries.
        budget: see `Budget`.
        price: see `Price`; needed for budget.cost.
        ledger: SQLite file with what was spent and every verdict; it outlives runs and killed workers.
    """

    base_url: str
    model: str
    ledger: str
    api_key_env: str | None = None
    instruction: str = "How good is the answer: is it correct, complete and helpful?"
    rubric: tuple[Criterion, ...] = ()
    scale: tuple[float, float] = (0.0, 10.0)
    reference: str | None = None
    against: str | None = None
    opponents: int = 1
    temperature: float = 0.0
    max_tokens: int = 512
    concurrency: int = 8
    timeout: float = 60.0
    deadline: float = 300.0
    max_retries: int = 4
    backoff: float = 0.5
    breaker_failures: int = 10
    breaker_seconds: float = 30.0
    budget: Budget = Budget()
    price: Price = Price()

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """The rubric; without one, a single question called score."""
        return self.rubric or (Criterion("score", self.instruction),)

    @property
    def api_key(self) -> str:
        """The key, read from the environment at this moment; "none" for an endpoint that wants none."""
        return os.environ[self.api_key_env].strip() if self.api_key_env is not None else "none"


_POSITIVE = ("max_tokens", "concurrency", "timeout", "deadline", "breaker_failures", "breaker_seconds", "opponents")
_NOT_NEGATIVE = ("temperature", "max_retries", "backoff")


def read_judge(path: str) -> JudgeConfig:
    """Read and check a judge's file; the package and the key must be there too.

    Raises:
        ValueError: the file is missing, is no mapping, has an unknown key or a wrong value; or the environment variable
            or the package `openai` is missing.
    """
    if not Path(path).is_file():
        raise ValueError(f"the judge file {path} does not exist; paths start at the current directory")
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no YAML: {str(error).splitlines()[0]}") from None
    config: JudgeConfig = _record(JudgeConfig, found, path)
    _check(config, path)
    if find_spec("openai") is None:
        raise ValueError("a judge needs the package openai, which is not installed; pip install 'openai>=2'")
    if config.api_key_env is not None and not os.environ.get(config.api_key_env, "").strip():
        raise ValueError(f"{path}: api_key_env: the environment variable {config.api_key_env} is not set")
    return config


def _record(kind: type[Any], found: Any, place: str) -> Any:
    """A frozen record from a mapping; nested records and rubric lists included."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{place}: must be a mapping of options, got {type(found).__name__}")
    known = {field.name: field for field in fields(kind)}
    types = get_type_hints(kind)
    values = {}
    for name, value in found.items():
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            guess = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
            raise ValueError(f"{place}: unknown key {name!r}{guess}")
        values[name] = _value(types[name], value, f"{place}: {name}")
    missing = [name for name, field in known.items() if name not in values and field.default is MISSING]
    if missing:
        raise ValueError(f"{place}: missing: {missing[0]}")
    return kind(**values)


def _value(kind: Any, value: Any, place: str) -> Any:
    if kind in (Budget, Price):
        return _record(kind, value, place)
    if kind == tuple[Criterion, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{place}: must be a list of {{name, text, weight}}")
        return tuple(_record(Criterion, each, f"{place}[{i}]") for i, each in enumerate(value))
    if kind == tuple[float, float]:
        if not isinstance(value, list) or len(value) != 2:
            raise ValueError(f"{place}: must be two numbers, [smallest, largest], got {value!r}")
        return tuple(_value(float, each, place) for each in value)
    accepted = getattr(kind, "__args__", (kind,))
    if value is None and type(None) in accepted:
        return None
    if str in accepted and isinstance(value, str) and value:
        return value
    if not isinstance(value, bool):  # YAML's `yes` is no number
        if int in accepted and isinstance(value, int):
            return value
        if float in accepted and isinstance(value, int | float) and isfinite(value):
            return float(value)
    names = " or ".join(each.__name__ for each in accepted if each is not type(None))
    raise ValueError(f"{place}: must be a {names}, got {value!r}")


def _check(config: JudgeConfig, path: str) -> None:
    url = urlsplit(config.base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"{path}: base_url: must be an http or https address, got {config.base_url!r}")
    if url.username is not None or url.password is not None:
        raise ValueError(f"{path}: base_url: holds a password, which would be logged; use api_key_env")
    for name in _POSITIVE:
        if getattr(config, name) <= 0:
            raise ValueError(f"{path}: {name}: must be above 0, got {getattr(config, name)}")
    for name in _NOT_NEGATIVE:
        if getattr(config, name) < 0:
            raise ValueError(f"{path}: {name}: must be at least 0, got {getattr(config, name)}")
    if config.scale[0] >= config.scale[1]:
        raise ValueError(f"{path}: scale: the second number must be larger, got {list(config.scale)}")
    names = [criterion.name for criterion in config.rubric]
    if len(set(names)) != len(names) or any(criterion.weight <= 0 for criterion in config.rubric):
        raise ValueError(f"{path}: rubric: names must differ and weights be above 0")
    if config.against is not None and config.rubric:
        raise ValueError(f"{path}: rubric: has no effect on comparisons; put it into instruction, or remove against")
    if config.against != "group" and config.opponents != 1:
        raise ValueError(f"{path}: opponents: has no effect without against: group")
    if any(part < 0 for part in (config.price.input, config.price.output)):
        raise ValueError(f"{path}: price: must not be negative")
    if any(
        limit is not None and limit < 0 for limit in (config.budget.calls, config.budget.tokens, config.budget.cost)
    ):
        raise ValueError(f"{path}: budget: must not be negative")
    if config.budget.cost is not None and config.price == Price():
        raise ValueError(f"{path}: budget.cost: needs price: {{input: ..., output: ...}} per million tokens")
