"""What the benchmarks have in common: where they ran, and how their pages are written. Not a program."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make_peers

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MEDSEG_DATA", ROOT.parent / "shared" / "data"))
"""Where the real images lie."""
PAGES = ROOT / "docs" / "benchmarks"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(ours: Sequence[str], peers: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures depend on, with versions of packages of either environment; nothing that names the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {
        "cores": num_cores(),
        "processor": next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine()),
        "python": platform.python_version(),
        "load": os.getloadavg()[2] if hasattr(os, "getloadavg") else 0.0,
        "medseg": _versions(sys.executable, ours),
        "peers": _versions(str(make_peers.python()), peers) if peers else {},
    }


def _versions(python: str, names: Sequence[str]) -> dict[str, str]:
    ask = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    asked = subprocess.run([python, "-c", ask, *names], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(asked.stdout)
    return found


def where(facts: dict[str, Any]) -> list[str]:
    """Lines of a page: where `environment` was taken."""
    lines = [
        f"{facts['cores']} cores of {facts['processor']}, Python {facts['python']}; mean load of the quarter of an",
        f"hour before the end {facts['load']:.1f} (more than {facts['cores']}: other programs ran beside it).",
    ]
    for name, packages in {"medseg's environment": facts["medseg"], "the peers'": facts["peers"]}.items():
        if packages:
            lines.append(f"In {name}: " + ", ".join(f"{n} {v}" for n, v in packages.items()) + ".")
    return lines


def parser_of(description: str | None, page: Path) -> argparse.ArgumentParser:
    """A command line with `--write`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {page.relative_to(ROOT)} and .json")
    return parser


def need_peers(parser: argparse.ArgumentParser) -> None:
    """End where the peers' environment is not there."""
    if not make_peers.python().exists():
        parser.error("the peers are not there: python scripts/make_peers.py")


def show(page: Path, text: str, results: dict[str, Any], *, write: bool) -> None:
    """Print a page, and write it with its figures beside it."""
    print("\n" + text)
    if write:
        page.write_text(text, encoding="utf-8")
        page.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
