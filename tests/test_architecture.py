"""The import table, the size limits and the house rules that a reviewer would otherwise repeat."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastrl"

# part -> parts of fastrl it may import besides itself
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "types": set(),
    "ops": {"kernels", "_C"},
    "losses": {"ops"},
    "algorithms": {"types", "ops", "losses"},
    "data": {"types"},
    "rollout": {"types", "_C"},
    "rewards": {"types"},
    "integrations": {"types", "ops", "losses", "data"},
    "train": {"types", "ops", "losses", "algorithms", "data", "rollout", "rewards", "integrations", "report"},
    "report": {"types", "ops", "losses", "algorithms", "data", "rollout", "rewards", "integrations"},
    "recipes": {
        "types",
        "ops",
        "losses",
        "algorithms",
        "data",
        "rollout",
        "rewards",
        "integrations",
        "train",
        "report",
    },
    "plan": set(),
    "testing": {"types", "ops"},
    "cli": {"recipes", "train", "ops", "command"},
    "__main__": {"cli"},
    "command": {"recipes", "train", "ops", "cli", "testing", "rewards", "plan"},
}
# Parts whose imports of fastrl must sit inside functions, so that importing them stays light.
LAZY_ONLY = {
    ("ops", "kernels"),
    ("ops", "_C"),
    ("rollout", "_C"),
    ("cli", "recipes"),
    ("command", "recipes"),
    ("command", "rewards"),
}
FORBIDDEN_NAMES = {"utils.py", "util.py", "common.py", "base.py", "helpers.py", "misc.py"}
KERNELS_MAY_IMPORT = {
    "__future__",
    "triton",
    "torch",
    "math",
    "typing",
    "collections",
    "dataclasses",
    "functools",
    "os",
}

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_modules(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}: write the full name"
            found += [(f"{node.module}.{alias.name}", node) for alias in node.names]
    return found


def is_type_checking_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def run_time_top_level(tree: ast.Module) -> set[ast.stmt]:
    return {node for node in tree.body if not is_type_checking_block(node)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_the_table(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    assert part in MAY_IMPORT, f"fastrl/{part} has no row in the import table"
    tree = ast.parse(path.read_text())
    top_level = run_time_top_level(tree)
    for module, node in imported_modules(tree):
        if not module.startswith("fastrl."):
            continue
        target = module.split(".")[1]
        if target in (part, "__version__"):
            continue
        assert target in MAY_IMPORT[part], f"{path.name}:{node.lineno}: {part} may not import {target}"
        if (part, target) in LAZY_ONLY:
            assert node not in top_level, (
                f"{path.name}:{node.lineno}: import {target} inside the function that needs it"
            )


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    for module, node in imported_modules(ast.parse(path.read_text())):
        top = module.split(".")[0]
        is_ours = module.startswith("fastrl.kernels")
        assert top in KERNELS_MAY_IMPORT or is_ours, f"{path.name}:{node.lineno}: kernels may not import {module}"


def test_the_kernels_folder_is_no_package_and_is_reached_through_the_symlink() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's `kernels` distribution"
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "kernels").readlink() == Path("../kernels")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small_and_are_named_after_an_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400, "look for two ideas in one place"
    assert path.name not in FORBIDDEN_NAMES


def public_ops() -> list[str]:
    source = (PACKAGE / "ops" / "__init__.py").read_text()
    modules = re.findall(r"^from fastrl\.ops\.(\w+) import", source, flags=re.MULTILINE)
    has_reference = [name for name in modules if "def reference(" in (PACKAGE / "ops" / f"{name}.py").read_text()]
    assert has_reference, "fastrl.ops exports no op"
    return has_reference


@pytest.mark.parametrize("op", public_ops())
def test_every_op_has_a_test_and_a_bench_row(op: str) -> None:
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file()
    assert (ROOT / "bench" / f"{op}.py").is_file()


def test_labels_are_shifted_only_in_pack() -> None:
    shift = re.compile(r"\[[^\]]*(\.\.\.|:),\s*1:[^\]]*\]")
    for path in SOURCES:
        if path.name == "pack.py" or "kernels" in path.parts:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not shift.search(line), (
                f"{path.relative_to(ROOT)}:{number}: labels are shifted in fastrl/data/pack.py only"
            )


def test_importing_the_package_imports_neither_torch_nor_the_parser() -> None:
    import subprocess
    import sys

    code = "import sys, fastrl; print(sorted({'torch', 'transformers', 'jsonargparse', 'triton'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
