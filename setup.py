"""Build fastrl._C from csrc/ when a C++ compiler and torch are there; else install pure Python and say so in one line.

All metadata is in pyproject.toml. torch is not a build requirement: to build the extension, install torch first and
then `pip install --no-build-isolation -e .`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# `omp simd` without OpenMP. Nobody reads floating-point exception flags, and while they must be right, gcc turns no
# comparison into a vector's select: loops with a clamp would stay scalar on everything but AVX-512.
VECTOR_FLAGS = ["-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno"]


def notice(reason: str) -> None:
    """One line, which pip shows with -v; not while it only asks for metadata."""
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(f"fastrl: installing without the native CPU ops ({reason}); everything works on torch", file=sys.stderr)


class BuildOrGoWithout(build_ext):
    """The extension is an accelerator: no trouble in building it may stop the installation."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            notice(f"the C++ build failed with {type(error).__name__}: {str(error)[-80:]}")
            self.extensions: list[Extension] = []


def extensions() -> list[Extension]:
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        notice("torch is not importable here; use pip install --no-build-isolation")
        return []
    if sys.platform == "win32":
        notice("not built on Windows")
        return []
    torch_root = Path(torch.origin).parent
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    return [
        Extension(
            "fastrl._C",
            sources,
            depends=["csrc/fastrl.h", "csrc/vectors.h"],
            include_dirs=[str(torch_root / "include")],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", *VECTOR_FLAGS],
            library_dirs=[str(torch_root / "lib")],
            libraries=["torch_cpu"],
            py_limited_api=True,
            language="c++",
        )
    ]


if not (ROOT / "fastrl" / "kernels").is_dir():
    raise SystemExit(
        "fastrl/kernels must be a symbolic link to the folder ../kernels; where git checked it out as a file, "
        "run `git config core.symlinks true && git checkout -- fastrl/kernels` (on Windows with developer mode on)"
    )
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOrGoWithout},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for every Python from 3.11 on
)
