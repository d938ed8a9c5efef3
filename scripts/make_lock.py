#!/usr/bin/env python3
"""Pin what the Docker image holds: every package by version and by the SHA-256 of its files.

python scripts/make_lock.py              follow pyproject.toml; what is pinned and still fits stays as it is
python scripts/make_lock.py --upgrade    take the newest version of everything

Two files are written. `requirements.lock` holds what medseg runs with, the extras of `EXTRAS` included, for every
Python and platform that medseg supports; torch in it is PyPI's build, which on Linux carries CUDA.
`requirements-build.lock` holds what builds medseg's wheel and the packages that come as source only. pip takes them
with --require-hashes, which refuses files with any other content.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNTIME, BUILD = ROOT / "requirements.lock", ROOT / "requirements-build.lock"
BUILDERS = ("build", "setuptools")
"""Beside pyproject's own build system: the front end, and what packages that come as source (antlr4-python3-runtime, of
Hydra) are built with."""
EXTRAS = ("codecs", "dicomweb", "s3")
"""Of medseg, in the image: a container is what predicts a hospital's archive."""
OPTIONS = ("--universal", "--generate-hashes", "--no-config", "--custom-compile-command", "make lock")


def compile_lock(python: str, source: str, target: Path, *options: str, given: str | None = None) -> None:
    """Resolve requirements and write them with their hashes.

    Args:
        python: the first version that must work.
        source: a file that pip understands, or "-" for `given`.
        target: the lock.
        options: more of `uv pip compile`.
        given: requirements, one a line.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", source, "--output-file", str(target), "--quiet"]
    command += ["--python-version", python, *OPTIONS, *options]
    # The registry of this machine's owner, and files that lie at hand, must not get into the lock.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("UV_", "PIP_"))}
    subprocess.run(command, cwd=ROOT, check=True, input=given, text=True, env=environment)


def main() -> None:
    """Write both locks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest version of everything")
    upgrade = ["--upgrade"] if parser.parse_args().upgrade else []
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    first = re.search(r">=\s*([\d.]+)", pyproject["project"]["requires-python"])
    if first is None:
        sys.exit("requires-python in pyproject.toml states no first version")
    extras = [option for extra in EXTRAS for option in ("--extra", extra)]
    compile_lock(first[1], "pyproject.toml", RUNTIME, *extras, *upgrade)
    builders = "\n".join([*BUILDERS, *pyproject["build-system"]["requires"]])
    compile_lock(first[1], "-", BUILD, "--constraint", RUNTIME.name, *upgrade, given=builders)
    for path in (RUNTIME, BUILD):
        pins = re.findall(r"^[\w.-]+==", path.read_text(encoding="utf-8"), re.MULTILINE)
        print(f"{path.name}: {len(pins)} packages")


if __name__ == "__main__":
    main()
