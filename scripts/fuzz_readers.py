#!/usr/bin/env python3
"""Damaged files of every format, read under limits of memory and time: only a `MedsegError` may come out.

    python scripts/fuzz_readers.py --minutes 60 --write      all formats, an hour; writes docs/reliability/fuzz.json
    python scripts/fuzz_readers.py --format nifti            one format, a minute
    python scripts/fuzz_readers.py --repeat nifti 4711       one input again, with its traceback
    python scripts/fuzz_readers.py --atheris --format plan   guided by coverage (pip install atheris; Linux)

An input follows from its format and number alone (tests/fuzz_damage.py, tests/fuzz_formats.py), so that the number
repeats it. Each process reads some hundred inputs; one that dies or gets stuck is itself a failure of the input that
it was at. Figures add up over calls with --write: numbers go on where the last call ended, and what failed before is
read again first; what does not fail any more counts as mended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
FIGURES = ROOT / "docs" / "reliability" / "fuzz.json"
PAGE = ROOT / "scripts" / "make_reliability.py"
"""Writes docs/reliability.md from the figures."""
INPUTS_EACH = 400
"""Of one process."""
SECONDS_EACH = 60.0
"""After which a process is followed by one of the next format."""
STUCK_S = 600.0
"""Wall-clock seconds after which a process that says nothing is ended."""


NOTHING = {"inputs": 0, "mended": 0, "peak_mb": 0, "slowest_s": 0.0}
"""Figures of a format that was not tried yet."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz until the time is up; the status is 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--format", action="append", dest="formats", metavar="NAME", help="again for several")
    parser.add_argument("--write", action="store_true", help=f"add the figures to {FIGURES.relative_to(ROOT)}")
    parser.add_argument("--repeat", nargs=2, metavar=("FORMAT", "NUMBER"))
    parser.add_argument("--atheris", action="store_true", help="let coverage choose the damage")
    options, rest = parser.parse_known_args(arguments)
    sys.path.insert(0, str(TESTS))
    if options.repeat:
        return repeat(options.repeat[0], int(options.repeat[1]))
    if options.atheris:
        return guided((options.formats or ["plan"])[0], rest)
    from fuzz_formats import FORMATS

    names = options.formats or list(FORMATS)
    unknown = [name for name in names if name not in FORMATS]
    if unknown or rest:
        parser.error(f"not known: {', '.join(unknown + rest)}; formats: {', '.join(FORMATS)}")
    figures: dict[str, dict[str, Any]] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name in names if options.write else ():
        read_again(figures.get(name, {"failures": []}), name)
    end = time.monotonic() + 60 * options.minutes
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        while (left := end - time.monotonic()) > 0:
            for name in names:
                entry = figures.setdefault(name, {**NOTHING, "failures": []})
                share = max(min(SECONDS_EACH, left / len(names)), 1.0)
                failed = add(entry, name, Path(folder), share)
                found += failed
                print(f"{name:14} {entry['inputs']:>8} inputs, {len(entry['failures'])} failures", flush=True)
                if options.write:
                    FIGURES.parent.mkdir(exist_ok=True)
                    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.write:
        subprocess.run([sys.executable, PAGE], check=True)
    for name in names:
        for failure in figures[name]["failures"]:
            print(f"{name} {failure['number']}: {failure['error']}  ({failure['at']})")
    return 1 if found else 0


def read_again(entry: dict[str, Any], name: str) -> None:
    """Count as mended what failed before and does not any more."""
    with tempfile.TemporaryDirectory() as folder:
        for failure in list(entry["failures"]):
            once: dict[str, Any] = {**NOTHING, "inputs": failure["number"], "failures": []}
            add(once, name, Path(folder), SECONDS_EACH, inputs=1)
            if not once["failures"]:
                entry["failures"].remove(failure)
                entry["mended"] += 1


def add(entry: dict[str, Any], name: str, folder: Path, seconds: float, *, inputs: int = INPUTS_EACH) -> int:
    """Let one process read the next inputs of a format; how many of them failed."""
    first = entry["inputs"]
    whole = int(max(seconds, 1))
    command = [sys.executable, str(TESTS / "fuzz_worker.py"), str(folder), f"{name}:{first}:{inputs}:{whole}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + STUCK_S)
        output, status = done.stdout, done.returncode
        last = (done.stderr.strip().splitlines() or [""])[-1]
    except subprocess.TimeoutExpired as error:
        output, status, last = (error.stdout or b"").decode(), -1, "stuck"
    lines = output.splitlines()
    if lines and lines[-1].startswith("{"):
        outcome = json.loads(lines[-1])
        entry["inputs"] += outcome["inputs"]
        entry["failures"] += outcome["failures"]
        entry["peak_mb"] = max(entry["peak_mb"], round(outcome["peak_bytes"] / 1e6))
        entry["slowest_s"] = max(entry["slowest_s"], outcome["slowest_s"])
        return len(outcome["failures"])
    at = [int(line.split()[-1]) for line in lines if line.startswith("at ")]
    if not at:
        raise SystemExit(f"the process for {name} did not begin: {last}")
    entry["inputs"] = at[-1] + 1  # the numbers go on behind the input that ended the process
    entry["failures"].append({"number": at[-1], "error": f"the process ended with status {status}", "at": last})
    return 1


def repeat(name: str, number: int) -> int:
    """Read one input again in this process, and let its error through."""
    from fuzz_formats import FORMATS

    form = FORMATS[name]
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz_{name}_{number}_"))
    form.make(folder / "seeds" / name / "inputs")
    place = folder / f"{name}_{number}"
    form.mutant(folder / "seeds" / name / "inputs", place, Random(f"{name} {number}"))
    print(f"the input: {place}")
    form.read(place)
    return 0


def guided(name: str, rest: Sequence[str]) -> int:
    """Let atheris choose the bytes that the damage is drawn from, by what they reach in medseg."""
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: pip install atheris (Linux, Python 3.11 or later)")
        return 2
    folder = Path(tempfile.mkdtemp(prefix=f"atheris_{name}_"))
    seeds = folder / "seeds" / name / "inputs"
    with atheris.instrument_imports(include=["medseg"]):
        from fuzz_formats import FORMATS

        form = FORMATS[name]
        form.make(seeds)
        for seed in seeds.iterdir():  # readers import what they need when they are called
            form.read(seed)

    def one(data: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            target = Path(place) / f"{name}_0"
            form.mutant(seeds, target, Drawn(data))
            form.read(target)

    atheris.Setup([sys.argv[0], *rest], one)
    atheris.Fuzz()
    return 0


class Drawn(Random):
    """Choices from bytes, which a fuzzer changes a few of at a time; zeros where they end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._place = data, 0

    def getrandbits(self, k: int, /) -> int:
        """The next bits."""
        size = (k + 7) // 8
        taken = self._data[self._place : self._place + size]
        self._place += size
        return int.from_bytes(taken.ljust(size, b"\0"), "little") & ((1 << k) - 1)

    def random(self) -> float:
        """From 0 to 1."""
        return self.getrandbits(16) / 65536


if __name__ == "__main__":
    sys.exit(main())
