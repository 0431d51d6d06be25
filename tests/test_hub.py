"""The kernels as a repository of Hugging Face's `kernels`: its rules, and one function under Triton's interpreter."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub.assemble import PACKAGE, VARIANTS, assemble

# As the loader does: by file, under the unique name, with nothing of ours on the path.
LOADED = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location({identity!r}, {path!r})
module = importlib.util.module_from_spec(spec)
sys.modules[{identity!r}] = module
spec.loader.exec_module(module)
raw, target = torch.randn(3, 37, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 36, -100])
map_arguments = module.logit_map.map_arguments(1.0, None, 0.7, torch.float32)
logprob, entropy, lse = module.token_stats.forward(raw, target, map_arguments)
z = (raw / 0.7).log_softmax(-1)
torch.testing.assert_close(logprob, torch.stack([z[0, 1], z[1, 36], torch.zeros(())]))
torch.testing.assert_close(entropy, -(z.exp() * z).sum(-1))
torch.testing.assert_close(lse, (raw / 0.7).logsumexp(-1))
assert "fastrl" not in sys.modules
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("hub")
    return folder, assemble(folder)


@pytest.mark.parametrize("inside", ["", f"{PACKAGE}/"])
def test_a_loader_runs_a_kernel_of_the_package(repository: tuple[Path, str], inside: str, tmp_path: Path) -> None:
    folder, identity = repository
    path = str(folder / "build" / "torch-universal" / f"{inside}__init__.py")
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"}
    code = LOADED.format(identity=identity, path=path)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr


def test_imports_are_of_the_package_itself_torch_triton_and_the_library(repository: tuple[Path, str]) -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in (repository[0] / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path.name
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module is not None
                assert node.module.split(".")[0] in allowed, path.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_metadata_names_the_kernel_and_every_file_by_its_hash(repository: tuple[Path, str], variant: str) -> None:
    folder, identity = repository
    folder = folder / "build" / variant
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["id"] == identity
    assert identity.isidentifier()
    assert metadata["name"].replace("-", "_") == PACKAGE
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*.py")}
    hashes = {name: base64.b64encode(hashlib.sha256(x.read_bytes()).digest()).decode() for name, x in files.items()}
    assert metadata["digest"] == {"algorithm": "sha256", "files": hashes}


def test_the_identity_follows_the_content(repository: tuple[Path, str], tmp_path: Path) -> None:
    assert assemble(tmp_path) == repository[1]
