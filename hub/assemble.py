"""Assembles the Triton kernels as a kernel repository for Hugging Face's `kernels`: no compiler, nothing is uploaded.

    python hub/assemble.py build/hub
    python -c "from pathlib import Path; from kernels import get_local_kernel; get_local_kernel(Path('build/hub'))"

    build/hub/build.toml                     for kernel-builder, which publishes
    build/hub/torch-ext/fastrl_kernels/      its sources: kernels/*.py with relative imports
    build/hub/build/torch-cuda/ ..           what a loader imports: the same files and metadata.json

The second is what the first becomes; torch-universal is where older versions of `kernels` look.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fastrl_kernels"
VARIANTS = {"torch-cuda": "cuda", "torch-rocm": "rocm", "torch-cpu": "cpu", "torch-universal": "cpu"}
OF_THE_PACKAGE = re.compile(r"^(\s*)from fastrl\.kernels\.(\w+) import", flags=re.MULTILINE)
# Old loaders import a folder of the package's name inside the variant; its module must be the variant's own.
FORWARDER = '''"""Names of the folder above, for loaders that look here."""

import importlib.util
import sys
from pathlib import Path

_above = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("{identity}_above", _above / "__init__.py")
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
'''


def sources() -> dict[str, str]:
    """File name -> text of the package, which imports torch, triton, the standard library and itself, relatively."""
    kernels = sorted((ROOT / "kernels").glob("*.py"))
    texts = {path.name: OF_THE_PACKAGE.sub(r"\1from .\2 import", path.read_text()) for path in kernels}
    absolute = [name for name, text in texts.items() if re.search(r"^\s*(import|from) fastrl", text, re.MULTILINE)]
    if absolute:
        raise ValueError(
            f"{', '.join(absolute)} import fastrl in a way that has no relative form: use from .. import .."
        )
    names = [path.stem for path in kernels]
    listed = "\n".join(f"from . import {name}" for name in names)
    documented = '"""fastrl\'s Triton kernels: tensors in, tensors out; see each module."""'
    quoted = ", ".join(f'"{name}"' for name in names)
    return {"__init__.py": f"{documented}\n\n{listed}\n\n__all__ = [{quoted}]\n", **texts}


def assemble(target: Path) -> str:
    """Write the repository into `target`, whose earlier content is replaced; returns the kernel's unique identity."""
    general = tomllib.loads((ROOT / "hub" / "build.toml").read_text())["general"]
    texts = sources()
    content = hashlib.sha256("".join(f"{name}\n{text}" for name, text in sorted(texts.items())).encode())
    identity = f"_{PACKAGE}_{content.hexdigest()[:8]}"
    for folder in ("torch-ext", "build"):
        shutil.rmtree(target / folder, ignore_errors=True)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "hub" / "build.toml", target / "build.toml")
    _write(target / "torch-ext" / PACKAGE, texts)
    for variant, backend in VARIANTS.items():
        files = {**texts, f"{PACKAGE}/__init__.py": FORWARDER.format(identity=identity)}
        metadata = {
            "name": general["name"],
            "id": identity,
            "version": general["version"],
            "license": general["license"],
            "backend": {"type": backend},
            "python-depends": [],
            "digest": {"algorithm": "sha256", "files": {name: _digest(text) for name, text in sorted(files.items())}},
        }
        _write(target / "build" / variant, {**files, "metadata.json": json.dumps(metadata, indent=2) + "\n"})
    return identity


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder of the repository, made when missing")
    print(assemble(parser.parse_args().target))
