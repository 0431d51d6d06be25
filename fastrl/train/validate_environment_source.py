"""What the source of an environment or a tool tells without being imported: it may import torch, or play at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from fastrl.rollout.environment import NOT_TOOLS
from fastrl.train.validate_rewards import source_of

Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_problems(key: str, spec: str, place: str, name: str) -> Iterator[str]:
    """Problems of an entry whose file and name exist: no `reset`, a tool that cannot be described to a model.

    Only what is sure: a class with bases may inherit, a decorator may rewrite, and a factory returns what it likes.
    """
    source = source_of(place)
    if source is None:
        return
    for node in ast.parse(Path(source).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield from (f"{key}: {spec}: {problem}" for problem in _of_class(node, is_owner=key.endswith("factory")))
        elif isinstance(node, Function) and node.name == name and key.endswith("tools") and "(" not in spec:
            yield from (f"{key}: {spec}: {problem}" for problem in _of_tool(node, is_method=False))


def _of_class(node: ast.ClassDef, *, is_owner: bool) -> Iterator[str]:
    if node.bases or node.keywords or node.decorator_list:
        return
    methods = {each.name: each for each in node.body if isinstance(each, Function)}
    bound = {target.id for each in ast.walk(node) if isinstance(target := each, ast.Name)}
    if is_owner and "reset" not in methods and "reset" not in bound:
        yield f"{node.name} needs a method reset(self, **columns), which begins an episode"
    if "get_tool_schemas" in methods:
        return
    for name, method in methods.items():
        if not name.startswith("_") and name not in NOT_TOOLS:
            yield from _of_tool(method, is_method=True)


def _of_tool(node: Function, *, is_method: bool) -> Iterator[str]:
    if node.decorator_list:
        return
    arguments = [*node.args.posonlyargs, *node.args.args][is_method:] + node.args.kwonlyargs
    untyped = [each.arg for each in arguments if each.annotation is None]
    if untyped:
        yield f"the tool {node.name} needs a type for its parameter {untyped[0]}, as in {untyped[0]}: int"
    elif ast.get_docstring(node) is None:
        yield f"the tool {node.name} needs a docstring that says what it does, and each parameter under Args:"
