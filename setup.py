"""Build fastrl._C from csrc/ when a C++ compiler and torch are there; else install pure Python and say so in one line.

Where nvcc is too and torch has CUDA, the scans and the group statistics are built for GPUs as well.

All metadata is in pyproject.toml. torch is not a build requirement: to build the extension, install torch first and
then `pip install --no-build-isolation -e .`.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# `omp simd` without OpenMP. Nobody reads floating-point exception flags, and while they must be right, gcc turns no
# comparison into a vector's select: loops with a clamp would stay scalar on everything but AVX-512.
VECTOR_FLAGS = ["-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xcompiler", "-fPIC"]
GPU_CHIPS = ("80", "90", "100")  # of these, what nvcc knows


def notice(reason: str) -> None:
    """One line, which pip shows with -v; not while it only asks for metadata."""
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(f"fastrl: installing without the native CPU ops ({reason}); everything works on torch", file=sys.stderr)


class BuildOrGoWithout(build_ext):
    """The extension is an accelerator: no trouble in building it may stop the installation."""

    def run(self) -> None:
        try:
            self._add_cuda()
            super().run()
        except Exception as error:
            notice(f"the C++ build failed with {type(error).__name__}: {str(error)[-80:]}")
            self.extensions: list[Extension] = []

    def _add_cuda(self) -> None:
        nvcc, torch_root = shutil.which("nvcc"), Path(self.extensions[0].include_dirs[0]).parent
        if nvcc is None or runpy.run_path(str(torch_root / "version.py"))["cuda"] is None:
            return
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            paths = [*sorted((ROOT / "csrc").glob("*.cu")), ROOT / "csrc" / "cuda.cpp"]
            objects = [cuda_object(nvcc, path, folder, torch_root / "include") for path in paths]
        except subprocess.CalledProcessError as error:
            print(f"fastrl: installing without the native CUDA ops: {error.stderr.strip()[-200:]}", file=sys.stderr)
            return
        self.extensions[0].extra_objects += objects
        self.extensions[0].libraries += ["torch_cuda"]


def cuda_object(nvcc: str, source: Path, folder: Path, headers: Path) -> str:
    """Compile one file of the GPU ops for GPU_CHIPS; returns the object's path."""
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    chips = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in GPU_CHIPS if f"sm_{chip}" in known]
    target = folder / f"{source.stem}.cuda.o"
    command = [nvcc, *NVCC_FLAGS, *chips, "-I", str(headers), "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return str(target)


def extensions() -> list[Extension]:
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        notice("torch is not importable here; use pip install --no-build-isolation")
        return []
    if sys.platform == "win32":
        notice("not built on Windows")
        return []
    torch_root = Path(torch.origin).parent
    sources = sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cpp") if path.name != "cuda.cpp")
    return [
        Extension(
            "fastrl._C",
            sources,
            depends=["csrc/fastrl.h", "csrc/vectors.h", "csrc/cuda_launchers.h"],
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
