#!/usr/bin/env python3
"""Damaged files of every format, read under limits of memory and time: only a `MedsegError` may come out.

    python scripts/fuzz_readers.py --minutes 60 --write      all formats, an hour; writes docs/reliability/fuzz.json
    python scripts/fuzz_readers.py --format nifti            one format, a minute
    python scripts/fuzz_readers.py --repeat nifti 4711       one input again, with its traceback
    python scripts/fuzz_readers.py --engine atheris --minutes 5 --write
                                                             guided by coverage: docs/reliability/atheris.json
                                                             (pip install "medseg[fuzz]": Linux)

An input follows from its format and number alone (tests/fuzz_damage.py, tests/fuzz_formats.py), so that the number
repeats it; atheris' inputs follow from bytes (tests/fuzz_guided.py), which stand in the place of the number. Each
process reads some hundred inputs; one that dies or gets stuck is itself a failure of the input that it was at. Figures
add up over calls with --write: numbers go on where the last call ended, and what failed before is read again first;
what does not fail any more counts as mended. Of atheris the last call's figures stand.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
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
GUIDED = ROOT / "docs" / "reliability" / "atheris.json"
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
    parser.add_argument("--engine", default="random", choices=["random", "atheris"], help="what chooses the damage")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(TESTS))
    if options.repeat:
        return repeat(*options.repeat)
    from fuzz_formats import FORMATS

    names = options.formats or list(FORMATS)
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        parser.error(f"not known: {', '.join(unknown)}; formats: {', '.join(FORMATS)}")
    if options.engine == "atheris":
        return guided(names, options.minutes, writes=options.write)
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


def repeat(name: str, number: str) -> int:
    """Read one input again in this process, and let its error through."""
    from fuzz_formats import FORMATS
    from fuzz_guided import Drawn

    form = FORMATS[name]
    choices = Drawn(bytes.fromhex(number[1:])) if number.startswith("x") else Random(f"{name} {int(number)}")
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz_{name}_"))
    form.make(folder / "seeds" / name / "inputs")
    place = folder / f"{name}_0"
    form.mutant(folder / "seeds" / name / "inputs", place, choices)
    print(f"the input: {place}")
    form.read(place)
    return 0


def guided(names: Sequence[str], minutes: float, *, writes: bool) -> int:
    """Let atheris choose the damage, format after format; the status is 1 where something failed."""
    if importlib.util.find_spec("atheris") is None:
        print('atheris is not installed: pip install "medseg[fuzz]" (Linux)')
        return 2
    figures: dict[str, dict[str, Any]] = json.loads(GUIDED.read_text()) if writes and GUIDED.exists() else {}
    seconds = max(1, round(60 * minutes / len(names)))
    for name in names:
        figures[name] = guided_once(name, seconds)
        print(f"{name:14} {figures[name]}", flush=True)
        if writes:
            GUIDED.parent.mkdir(exist_ok=True)
            GUIDED.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if writes:
        subprocess.run([sys.executable, PAGE], check=True)
    return 1 if any(figures[name]["failures"] for name in names) else 0


def guided_once(name: str, seconds: int) -> dict[str, Any]:
    """What one process finds: inputs, edges of medseg that the first of them and all of them reached, failures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TESTS / "fuzz_guided.py"), folder, name, str(seconds)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + STUCK_S)
            said, found, status = done.stderr, done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            said, found, status = (error.stderr or b"").decode(), (error.stdout or b"").decode(), -1
    failures = [json.loads(line.partition(" ")[2]) for line in found.splitlines() if line.startswith("found {")]
    inputs = re.findall(r"^stat::number_of_executed_units: (\d+)", said, re.MULTILINE)
    edges = re.findall(r"^#\d+\s+\w+ +cov: (\d+)", said, re.MULTILINE)
    if not inputs or not edges:
        last = " ".join(said.split()[-30:])
        failures.append({"number": "", "error": f"the process ended with status {status}", "at": last})
    return {
        "inputs": int(inputs[-1]) if inputs else 0,
        "seconds": seconds,
        "first_edges": int(edges[0]) if edges else 0,
        "edges": int(edges[-1]) if edges else 0,
        "failures": failures,
    }


if __name__ == "__main__":
    sys.exit(main())
