"""What a GPU machine without network needs, in pieces that fit through a small door.

    python bench/offline.py pack FOLDER [--python 3.12] [--package NAME ...]    where there is a network
    python bench/offline.py unpack FOLDER SITE                                  where there is none

`pack` downloads wheels of the contenders for Linux x86-64, without what the machine has already (torch and its
libraries), puts them into one archive and cuts it into pieces of at most 60 MB with their SHA-256 in manifest.json.
`unpack` checks the pieces, joins them and unpacks every wheel into SITE, which goes on PYTHONPATH; nothing is
installed. bench/gpu_session.py --wheels FOLDER does it before its first stage. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PIECE = 60_000_000  # bytes
MANIFEST = "manifest.json"
# Contenders and what they and fastrl's recipes import at once; torch, triton, transformers and numpy are the machine's.
PACKAGES = (
    "trl==1.16.0",
    "liger-kernel==0.8.2",
    "cut-cross-entropy==25.1.1",
    "datasets>=4.7",
    "accelerate",
    "jsonargparse>=4.49,<5",
    "peft",
    "rich",
    "markdown-it-py",
    "mdurl",
    "pygments",
    "dill",
    "multiprocess",
    "xxhash",
    "pandas",
    "pyarrow",
    "fsspec",
    "python-dateutil",
    "pytz",
    "tzdata",
    "six",
    "psutil",
)


def main() -> int:
    """Pack or unpack.

    Returns:
        0; 1 with a sentence on stderr when a package cannot be had or a piece is missing or damaged.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="download, archive and cut")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--python", default="3.12", help="version of the GPU machine's Python")
    packing.add_argument("--package", action="append", help=f"default: {' '.join(PACKAGES)}")
    unpacking = commands.add_parser("unpack", help="check, join and unpack")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("site", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "pack":
            for piece in pack(options.folder, python=options.python, packages=options.package or PACKAGES):
                print(f"{piece} {piece.stat().st_size / 1e6:.1f} MB")
        else:
            print(unpack(options.folder, options.site))
    except ValueError as error:
        print(f"offline: {error}", file=sys.stderr)
        return 1
    return 0


def pack(folder: Path, *, python: str, packages: tuple[str, ...] | list[str]) -> list[Path]:
    """Download wheels and write `manifest.json` and the pieces into `folder`.

    Raises:
        ValueError: pip finds no wheel for a package.
    """
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", python, "--implementation", "cp", "--dest", wheels]
        # Newest first: pip takes the best match.
        for tag in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64", "any"):
            command += ["--platform", tag]
        done = subprocess.run([*command, *packages], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ValueError(f"pip cannot download the wheels: {done.stderr.strip().splitlines()[-1:]}")
        return cut(sorted(Path(wheels).glob("*.whl")), folder)


def cut(wheels: list[Path], folder: Path, *, piece: int = PIECE) -> list[Path]:
    """Put the wheels into one archive and cut it into pieces of at most `piece` bytes.

    Returns:
        The pieces, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("piece-*"):
        old.unlink()
    archive = folder / "wheels.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:  # wheels are compressed already
        for wheel in wheels:
            file.write(wheel, wheel.name)
    pieces: list[Path] = []
    digests: list[dict[str, str | int]] = []
    with archive.open("rb") as whole:
        while part := whole.read(piece):
            path = folder / f"piece-{len(pieces):03d}"
            path.write_bytes(part)
            pieces.append(path)
            digests.append({"name": path.name, "bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()})
    archive.unlink()
    content = {"pieces": digests, "wheels": [wheel.name for wheel in wheels]}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
    return pieces


def unpack(folder: Path, site: Path) -> Path:
    """Join the pieces of `folder` and unpack every wheel into `site`; return `site`.

    Raises:
        ValueError: no manifest, a damaged one, or a piece that is missing or is not the one that was packed.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}; make it with `python bench/offline.py pack {folder}`")
    try:
        content = json.loads(manifest.read_text())
        pieces = [(str(entry["name"]), str(entry["sha256"])) for entry in content["pieces"]]
        wheels = [str(name) for name in content["wheels"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{manifest} is damaged; copy it again") from None
    if site.exists() and not site.is_dir():
        raise ValueError(f"{site} is a file; name a folder for the packages")
    site.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as whole:
        for name, digest in pieces:
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing; bring all {len(pieces)} pieces")
            part = path.read_bytes()
            if hashlib.sha256(part).hexdigest() != digest:
                raise ValueError(f"{path} is damaged; copy it again")
            whole.write(part)
        whole.seek(0)
        try:
            with zipfile.ZipFile(whole) as archive:
                for name in wheels:
                    with archive.open(name) as stored, zipfile.ZipFile(stored) as wheel:
                        wheel.extractall(site)
        except (zipfile.BadZipFile, KeyError):  # each piece is whole: the list of them is not
            raise ValueError(f"{manifest} is damaged; copy it again") from None
    return site


if __name__ == "__main__":
    sys.exit(main())
