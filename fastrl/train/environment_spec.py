"""Environments and tools from their names in a configuration.

A spec is one of
    calculator                      a built-in tool
    search(corpus=corpus.jsonl)     a built-in tool, or any class or factory, with literal options
    verifiers(id="wordle")          an environment of the package verifiers
    package.module:name             a function or class that can be imported
    environments/mine.py:name       one in a file
A class is an environment or a set of tools: its public methods. A function is a tool; as a factory, it makes one.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from fastrl.rewards.spec import imported, parsed
from fastrl.rollout.environment import Environment, Tool, methods_of
from fastrl.rollout.tools import Search, calculator
from fastrl.train.config import EnvironmentBlock
from fastrl.train.environment_verifiers import Verifiers
from fastrl.train.python_tool import Python

BUILT_IN: Mapping[str, Tool | type] = {"calculator": calculator, "search": Search, "python": Python}
FACTORIES: Mapping[str, type] = {"verifiers": Verifiers}


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """What makes an environment of a run, anywhere.

    Attributes:
        factory: makes the instance; None when there are tools alone.
        owner: the class of the instance.
        tools: functions, or classes made without further arguments, whose public methods are tools.
    """

    factory: Callable[[], Any] | None
    owner: type | None
    tools: tuple[Callable[..., Any], ...]

    def make(self) -> Environment:
        """Return a fresh environment; what the user's constructor raises goes through."""
        tools = [tool for each in self.tools for tool in (methods_of(each()) if _is_class(each) else [each])]
        return Environment(None if self.factory is None else self.factory(), tools)

    def functions(self) -> list[Tool]:
        """The tools for their signatures and docstrings, without making an instance of anything."""
        owners = [_class_of(each) for each in self.tools if _is_class(each)]
        found: list[Tool] = [each for each in self.tools if not _is_class(each)]
        for owner in [*owners, *([] if self.owner is None else [self.owner])]:
            found += [_described(method, owner) for method in methods_of(owner)]
        return found

    @property
    def replies(self) -> bool:
        """Whether the environment answers turns itself."""
        return callable(getattr(self.owner, "get_reply", None))

    def schemas(self) -> list[dict[str, Any]]:
        """What prompts show of the tools; [] for an environment that replies and has none.

        Raises:
            ValueError: as `schemas_of`.
        """
        if not callable(getattr(self.owner, "get_tool_schemas", None)):
            return [] if self.replies and not self.functions() else schemas_of(self.functions())
        assert self.factory is not None
        found = _made(self.factory, "of this run").get_tool_schemas()
        schemas: list[dict[str, Any]] = asyncio.run(found) if inspect.iscoroutine(found) else found
        if not isinstance(schemas, list) or not all(isinstance(each, dict) and "function" in each for each in schemas):
            raise ValueError(
                "get_tool_schemas of the environment must return a list of JSON schemas, each with a key "
                f'"function"; got {schemas!r:.80}'
            )
        return schemas


def environment_spec(block: EnvironmentBlock) -> EnvironmentSpec:
    """Resolve the names in a configuration.

    Raises:
        ValueError: a name, module or file that does not exist, or an environment without `reset`.
    """
    factory = None if block.factory is None else _resolved(block.factory, "environment.factory")
    owner: type | None = None
    if factory is not None:
        owner = _class_of(factory) if _is_class(factory) else type(_made(factory, block.factory))
        if not callable(getattr(owner, "reset", None)):
            raise ValueError(f"environment.factory {block.factory!r} needs a method reset; {owner.__name__} has none")
    spec = EnvironmentSpec(factory, owner, tuple(_resolved(each, "environment.tools") for each in block.tools))
    if spec.replies and spec.tools:
        raise ValueError("environment.tools: an environment with get_reply runs its tools itself; remove them")
    return spec


def is_built_in(spec: str) -> bool:
    """Whether a tool comes with fastrl: bounded, so that it needs no process of its own."""
    return spec.partition("(")[0] in BUILT_IN


def schemas_of(functions: Sequence[Tool]) -> list[dict[str, Any]]:
    """JSON schemas of tools from their type hints and Google-style docstrings, as chat templates take them.

    Raises:
        ValueError: a parameter without a type or a description, two tools of one name, or no tool.
    """
    names = [function.__name__ for function in functions]
    if not names:
        raise ValueError("the environment has no tool: give its class a public method, or set environment.tools")
    if len(set(names)) != len(names):
        raise ValueError(f"tools need different names, got {', '.join(names)}; rename one")
    from transformers.utils import get_json_schema  # lazily: workers import this module, and have no use for it

    schemas = []
    for function in functions:
        try:
            schemas.append(get_json_schema(function))
        except Exception as error:  # of several kinds, all about the user's docstring
            raise ValueError(
                f"the tool {function.__name__} needs a type for each parameter and a Google-style docstring that "
                f"describes each under Args: {error}"
            ) from error
    return schemas


def _resolved(spec: str, key: str) -> Callable[..., Any]:
    target, options = parsed(spec, key)
    found = (FACTORIES if key == "environment.factory" else BUILT_IN).get(target)
    if found is None:
        if ":" not in target:
            near = difflib.get_close_matches(target, BUILT_IN, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{key}: unknown tool {target!r}. {hint}Built in: {', '.join(BUILT_IN)}; others are "
                "package.module:name or path/to/file.py:name"
            )
        found = imported(target, key)
    if not callable(found):
        raise ValueError(f"{key} {spec!r} is not a class or function but {type(found).__name__}")
    if options or isinstance(found, type) or key == "environment.factory":
        bound(found, options or {}, spec, key)
    return partial(found, **options) if options else found


def bound(found: Callable[..., Any], options: Mapping[str, Any], spec: str, key: str) -> None:
    """Refuse options that a class or factory does not take, and the lack of those it needs; a bare function needs none.

    Raises:
        ValueError: naming the first.
    """
    if not options and not isinstance(found, type) and key == "environment.tools":
        return
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        raise ValueError(
            f"{key}: {spec!r} cannot be made: {error}; options go in parentheses, as in {spec.partition('(')[0]}"
            "(name=value)"
        ) from error


def _made(factory: Callable[[], Any], name: str | None) -> Any:
    """An instance, to ask what it is."""
    try:
        return factory()
    except Exception as error:  # the user's code
        raise ValueError(
            f"environment.factory {name} cannot be made: it raised {type(error).__name__}: {error}; mend it, or its "
            "options"
        ) from error


def _described(method: Tool, owner: type) -> Tool:
    """A tool of a class as its instance would have it: without `self`, which neither of the other kinds shows."""
    is_static = isinstance(inspect.getattr_static(owner, method.__name__, None), staticmethod)
    return method if is_static or inspect.ismethod(method) else MethodType(method, owner)


def _is_class(found: Callable[..., Any]) -> bool:
    return isinstance(found.func if isinstance(found, partial) else found, type)


def _class_of(found: Callable[..., Any]) -> type:
    inner = found.func if isinstance(found, partial) else found
    assert isinstance(inner, type)
    return inner
