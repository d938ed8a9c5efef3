#!/usr/bin/env python3
"""Make an environment of its own for the programs that medseg is compared with (`.peers`, ignored by git).

    python scripts/make_peers.py            make it where it is not there yet: minutes, torch is among the packages
    python scripts/make_peers.py --again    make it anew

Peers never go into medseg's own environment: what they pin must not change what medseg runs with, and nobody who uses
medseg needs them. The benchmarks run their code with `.peers/bin/python`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".peers"
PACKAGES = ("monai>=1.6.1", "nibabel", "pydicom>=3.0.2", "pyjpegls", "dcm2niix", "SimpleITK", "nnunetv2>=2.8.1")
"""What is compared, and the decoder of JPEG-LS that pydicom takes up by itself."""


def python() -> Path:
    """The interpreter of the peers' environment, whether it is there or not."""
    return PEERS / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def make() -> None:
    """Make the environment. torch goes first and alone, in medseg's own range, as in the Makefile."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    torch, vision = (next(d for d in dependencies if d.startswith(f"{name}>")) for name in ("torch", "torchvision"))
    subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
    for packages in ((torch,), (torch, vision, *PACKAGES)):
        subprocess.run([str(python()), "-m", "pip", "install", "--quiet", *packages], check=True)


def main() -> None:
    """Make the environment, or say that it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="throw an existing environment away first")
    if parser.parse_args().again:
        shutil.rmtree(PEERS, ignore_errors=True)
    if python().exists():
        print(f"{PEERS.name} is there")
        return
    try:
        make()
    except subprocess.CalledProcessError as error:
        shutil.rmtree(PEERS, ignore_errors=True)  # half an environment would look like a whole one
        sys.exit(f"{PEERS.name} was not made: {error}")
    print(f"{PEERS.name} is made")


if __name__ == "__main__":
    main()
