"""Whether the rewards a configuration names exist, without importing their modules, which may import torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from fastrl.train.validate_files import model_problem


def reward_problem(spec: str, *, key: str = "reward_funcs") -> Iterator[str]:
    """Problem with one entry of the option `key`; see `fastrl.rewards.resolve` for its forms."""
    from fastrl.rewards.learned import ProcessRewardModel, RewardModel
    from fastrl.rewards.resolve import resolve_reward

    target = spec.removeprefix("verl:").partition("(")[0]
    place, colon, name = target.rpartition(":")
    if colon:
        yield from imported_problem(key, spec, place, name)
        return
    try:
        found = resolve_reward(spec)  # a built-in, so nothing of the user's is imported
    except ValueError as error:
        names = [name.strip() for name in target.split(",")]
        listed = f"; write a list: {key}: [{', '.join(names)}], or --{key} {' '.join(names)}"
        yield f"{key}: {error}" + (listed if len(names) > 1 else "")
        return
    if isinstance(found, RewardModel | ProcessRewardModel):
        wrong = model_problem(found.path)
        yield from (problem.replace("model_name_or_path", f"{key}: {target}", 1) for problem in wrong)


def imported_problem(key: str, spec: str, place: str, name: str) -> Iterator[str]:
    """Problem with `place:name`, a name in a module or file, for the entry `spec` of the option `key`."""
    source = source_of(place)
    if source is None:
        if _find(place) is None:
            yield f"{key}: {spec}: there is no module {place!r}; is its folder on PYTHONPATH?"
        return  # a compiled module tells nothing before it is imported
    if not Path(source).is_file():
        yield f"{key}: {spec}: the file {source} does not exist"
        return
    try:
        names = _top_level_names(ast.parse(Path(source).read_text(encoding="utf-8")))
    except SyntaxError as error:
        yield f"{key}: {spec}: {source}:{error.lineno}: {error.msg}"
        return
    if name not in names and "*" not in names:
        near = get_close_matches(name, names, n=1)
        yield f"{key}: {spec}: {source} has no {name}" + (f"; did you mean {near[0]}?" if near else "")


def source_of(place: str) -> str | None:
    """The Python file that `place` names, by itself or as a module; None for a module that has none."""
    if place.endswith(".py"):
        return place
    module = _find(place)
    return module.origin if module is not None and (module.origin or "").endswith(".py") else None


def _find(module: str) -> ModuleSpec | None:
    """The module's spec. Unlike find_spec on a dotted name, this does not import its packages."""
    first, *rest = module.split(".")
    if not first.isidentifier():
        return None
    spec = find_spec(first)
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # By its bare name: under its full one a folder without __init__.py asks sys.modules for the folder above.
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec


def _top_level_names(tree: ast.Module) -> set[str]:
    """What a module's statements bind, those inside top-level `if` and `try` included."""
    names: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            waiting += ast.iter_child_nodes(node)
    return {name for name in names if not name.startswith("_")}  # the resolver offers no private names
