"""Functions and classes by their names in a configuration: `module:name`, `file.py:name`, options in parentheses."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any


def parsed(spec: str, what: str) -> tuple[str, dict[str, Any] | None]:
    """A spec's target, and its options when it has parentheses.

    Args:
        what: it is, for messages: "reward", say.

    Raises:
        ValueError: options that are not `name=value` with literal values.
    """
    target, parenthesis, rest = spec.partition("(")
    if not parenthesis:
        return spec, None
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(option.arg is None for option in call.keywords):
            raise ValueError
        return target, {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"{what} {spec!r}: write options as name=value with literal values, as length(limit=200)"
        ) from error


def imported(target: str, what: str) -> Any:
    """What `package.module:name` or `file.py:name` stands for.

    Args:
        what: it is, for messages.

    Raises:
        ValueError: there is no such module, file or name; or the name is private.
    """
    place, _, attribute = target.rpartition(":")
    module = _module_from_file(Path(place), what) if place.endswith(".py") else _module(place, what)
    names = [name for name in vars(module) if not name.startswith("_")]
    if attribute not in names:
        near = difflib.get_close_matches(attribute, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} {target!r}: {place} has no {attribute!r}{hint}")
    return getattr(module, attribute)


def _module(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"the {what} module {name!r} cannot be imported: {error}") from error


def _module_from_file(path: Path, what: str) -> Any:
    if not path.is_file():
        raise ValueError(f"the {what} file {path} does not exist")
    # One module per file, findable by name: what it defines can then be pickled.
    name = f"fastrl_reward_{path.resolve().as_posix().replace('/', '_').replace('.', '_')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
