#!/usr/bin/env python3
"""Faults of the machine at every write of every verb: nothing partial may be left, and the work must go on.

    python scripts/inject_faults.py                          25 operations of each verb
    python scripts/inject_faults.py --every 1 --write        every operation; writes docs/reliability/faults.json
    python scripts/inject_faults.py --verb tune --write      of one verb; the figures of the others stay as they are
    python scripts/inject_faults.py --tests --write          the tests of other faults alone, counted again
    python scripts/inject_faults.py --verb predict --at 17   one fault, with all that is said

A disk is full (or read-only, or failing) from the k-th operation on: k-th file that begins, bytes that reach it, folder
that is made. `--every N` is of full disks; read-only and failing ones, which take the same ways through the code, are
tried at a fifth as many operations. On one calm core `--every 1` takes about half an hour, nearly all of it `train`:
four seconds a fault. The figures are written after each fault; those of a verb (and of the tests, which a call with
--verb leaves out) take the place of what an earlier call wrote.

After each fault the exit status, the message and every file are looked at; then the same is done again with room. The
other faults (memory, threads, NaN, clocks, cases that vanish, small file systems) are tests/test_faults.py, which
`--write` runs and counts.
"""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
FIGURES = ROOT / "docs" / "reliability" / "faults.json"
PAGE = ROOT / "scripts" / "make_reliability.py"
"""Writes docs/reliability.md from the figures."""
CODES = {"a full disk": errno.ENOSPC, "a read-only disk": errno.EROFS, "a failing disk": errno.EIO}
FEWER = 5
"""Full disks are tried at as many more operations than read-only and failing ones."""
POINTS = 25
"""Operations of a verb that are tried unless told."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Inject the faults; the status is 1 where one did harm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verb", action="append", dest="verbs", metavar="NAME", help="again for several")
    parser.add_argument("--every", type=int, help="try each N-th operation; 1: all")
    parser.add_argument("--at", type=int, help="try this operation only")
    parser.add_argument("--write", action="store_true", help=f"write {FIGURES.relative_to(ROOT)}")
    parser.add_argument("--tests", action="store_true", help="count the tests of other faults, and inject nothing")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(TESTS))
    from faults import SCENARIOS, count, inject, materials

    unknown = sorted(set(options.verbs or ()) - set(SCENARIOS))
    if options.tests and (options.verbs or options.every or options.at):
        parser.error("--tests injects nothing: leave --verb, --every and --at out")
    if unknown or (options.write and options.at):
        parser.error(f"not known: {unknown}; verbs: {', '.join(SCENARIOS)}" if unknown else "--at writes no figures")
    figures = earlier(SCENARIOS) if options.write else {"injected": {}, "tests": {}}
    if options.tests:
        figures["tests"] = counted_tests()
        if options.write:
            write(figures)
            subprocess.run([sys.executable, PAGE], check=True)
        return 1 if "failed" in figures["tests"].values() else 0
    harmed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = materials(folder / "given")
        for verb in options.verbs or SCENARIOS:
            reference = folder / f"reference {verb}"
            reference.mkdir()
            total = count(SCENARIOS[verb], reference, given)
            for fault, code in CODES.items():
                entry: dict[str, Any] = {"operations": total, "faults": 0, "refused": 0, "handled": 0, "lost_bytes": 0}
                figures["injected"][f"{verb}: {fault}"] = entry | {"harm": []}
                entry = figures["injected"][f"{verb}: {fault}"]
                step = options.every or max(1, total // POINTS)
                if code != errno.ENOSPC:
                    step *= FEWER
                for fails_at in [options.at] if options.at else range(1, total + 1, step):
                    disk = Path(tempfile.mkdtemp(dir=folder))
                    outcome = inject(SCENARIOS[verb], disk, given, reference, fails_at, code)
                    entry["faults"] += 1
                    entry["refused" if outcome.status else "handled"] += 1
                    entry["lost_bytes"] += outcome.lost_bytes
                    entry["harm"] += [f"operation {fails_at}: {text}" for text in outcome.wrong]
                    shutil.rmtree(disk)
                    if options.at:
                        print(outcome.said)
                    if options.write:  # what was done stands there also where the rest is cut short
                        write(figures)
                print(
                    f"{verb}: {fault}, {total} operations, {entry['faults']} faults, harm: {entry['harm']}", flush=True
                )
                harmed |= bool(entry["harm"])
                if options.at:
                    break
    if options.write:
        if not options.verbs:
            figures["tests"] = counted_tests()
            write(figures)
        subprocess.run([sys.executable, PAGE], check=True)
    return 1 if harmed else 0


def earlier(verbs: Container[str]) -> dict[str, Any]:
    """What earlier calls wrote, of the verbs that there still are."""
    if not FIGURES.exists():
        return {"injected": {}, "tests": {}}
    figures: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    kept = {name: entry for name, entry in figures["injected"].items() if name.partition(":")[0] in verbs}
    return {"injected": kept, "tests": figures["tests"]}


def write(figures: dict[str, Any]) -> None:
    """Write the figures."""
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def counted_tests() -> dict[str, str]:
    """Each test of tests/test_faults.py, slow ones too but those that inject what was injected here: passed, failed or
    skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", str(TESTS / "test_faults.py"), f"--junitxml={report}", "-m", "",
             "-k", "not at_many_operations"], cwd=ROOT, check=False,
        )  # fmt: skip
        cases = ElementTree.parse(report).iter("testcase")
        return {
            case.attrib["name"]: "failed"
            if case.find("failure") is not None or case.find("error") is not None
            else "skipped"
            if case.find("skipped") is not None
            else "passed"
            for case in cases
        }


if __name__ == "__main__":
    sys.exit(main())
