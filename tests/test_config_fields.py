"""No option is parsed and ignored: every field of every configuration is read by the code that runs.

A read is an attribute access on a value whose type is known from an annotation: a parameter `config: GRPOConfig`,
what is reached from it (`config.overlong.buffer`), or a name or attribute that one of these was assigned to.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fastrl.train import config as records

ROOT = Path(__file__).resolve().parent.parent / "fastrl"
CONFIGS = {name: value for name, value in vars(records).items() if is_dataclass(value)}


def is_user(path: Path) -> bool:
    """What checks a field does not use it."""
    return "config" not in path.parts and not path.name.startswith("validate")


Types = frozenset[Any]
NOTHING: Types = frozenset()


def owner(config_type: Any, name: str) -> Any:
    """The class that introduces a field; a subclass that only changes its default does not."""
    return next(cls for cls in reversed(config_type.__mro__) if name in cls.__dict__.get("__dataclass_fields__", ()))


def annotated(node: ast.expr | None) -> Types:
    """The configuration dataclasses an annotation names."""
    if node is None:
        return NOTHING
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return frozenset(CONFIGS[name] for name in names & CONFIGS.keys())


class Reads(ast.NodeVisitor):
    """Collects (class, field) for every read of a field in one module."""

    def __init__(self) -> None:
        self.found: set[tuple[Any, str]] = set()
        self.scopes: list[dict[str, Types]] = [{}]
        self.attributes: dict[str, Types] = {}

    def types(self, node: ast.AST) -> Types:
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), NOTHING)
        if not isinstance(node, ast.Attribute):
            return NOTHING
        hints = [get_type_hints(owner)[node.attr] for owner in self.types(node.value) if self.has(owner, node.attr)]
        blocks = frozenset(hint for hint in hints if is_dataclass(hint))
        return blocks or (NOTHING if hints else self.attributes.get(node.attr, NOTHING))

    @staticmethod
    def has(config_type: Any, name: str) -> bool:
        return name in {field.name for field in fields(config_type)}

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for config_type in self.types(node.value):
            if self.has(config_type, node.attr):
                self.found.add((owner(config_type, node.attr), node.attr))
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.scopes.append({argument.arg: annotated(argument.annotation) for argument in arguments})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.attributes[node.target.id] = annotated(node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for place, value in pairs:
                if isinstance(place, ast.Name):
                    self.scopes[-1][place.id] = self.types(value)
                elif isinstance(place, ast.Attribute) and self.types(value):
                    self.attributes[place.attr] = self.types(value)
        self.generic_visit(node)


def reads_in(source: str) -> set[tuple[Any, str]]:
    visitor = Reads()
    visitor.visit(ast.parse(source))
    return visitor.found


def users() -> Iterator[Path]:
    for part in ("recipes", "train", "algorithms"):
        yield from (path for path in sorted((ROOT / part).rglob("*.py")) if is_user(path))


def test_a_read_is_seen_through_annotations_blocks_and_assignments() -> None:
    source = """
def f(config: GRPOConfig, other, *, block: OverlongBlock):
    beta = other.beta
    correction = config.sampler_correction
    return config.data.max_rows, correction.low, block.buffer
class Collector:
    def __init__(self, config: TrainConfig): self._config = config
    def g(self): return self._config.seed
"""
    assert reads_in(source) == {
        (records.GRPOConfig, "sampler_correction"),
        (records.SamplerCorrectionBlock, "low"),
        (records.TrainConfig, "data"),
        (records.DataBlock, "max_rows"),
        (records.OverlongBlock, "buffer"),
        (records.TrainConfig, "seed"),
    }


def test_every_field_of_every_configuration_is_read_by_what_runs() -> None:
    found = set().union(*(reads_in(path.read_text()) for path in users()))
    every = {(owner(cls, field.name), field.name) for cls in CONFIGS.values() for field in fields(cls)}
    assert sorted(f"{cls.__name__}.{name}" for cls, name in every - found) == []
