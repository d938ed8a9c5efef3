#!/usr/bin/env python3
"""docs/reliability.md from the figures in docs/reliability/*.json, which the programs named there write.

python scripts/make_reliability.py           write the page
python scripts/make_reliability.py --check   say whether it is up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
FIGURES = ROOT / "docs" / "reliability"
NOT_MEASURED = "not measured yet"
READERS = "nothing: readers write nothing"
FUZZ = "python scripts/fuzz_readers.py --minutes 60 --write"
FAULTS = "python scripts/inject_faults.py --every 1 --write"
OTHER_FAULTS = "python scripts/inject_faults.py --tests --write"
KILLS = "python scripts/kill_training.py --write"
GUIDED = "python scripts/fuzz_readers.py --engine atheris --minutes 5 --write"
KILLS_OF_PROCESSES = "python scripts/kill_training.py --devices 2 --kills 10 --write"

HEAD = """\
# What medseg withstands

Made by `python scripts/make_reliability.py` from the figures in `docs/reliability/`; the command of each row makes its
figures again. With every run of the tests some inputs of each format are damaged (`tests/test_fuzz.py`) and some faults
injected (`tests/test_faults.py`); short forms of the others, atheris and the kills, run where slow tests are asked for:
`python -m pytest -m slow tests/test_fuzz.py tests/test_resume.py`.
"""
MEANING = """\
## What the rows mean

- **Damaged inputs**: valid files of each format are damaged (bits, fields, elements, tables, members of archives;
  packed and checksummed again where the format does that) and read by everything that reads them, in a process with a
  limit of memory and a limit of time for each input. A failure is anything that comes out but a refusal with a code: an
  exception of another kind, too much memory, too much time, the end of the process. Failures that were mended are
  counted beside those that are open. An input follows from its number:
  `python scripts/fuzz_readers.py --repeat FORMAT NUMBER`. With atheris the damage is not drawn at random, but from
  bytes that libFuzzer mutates: what reaches new edges of medseg's code is kept and mutated further.
- **Injected faults**: from the k-th operation on, the disk takes nothing any more. *Refused*: the verb ended with a
  status other than 0 and a message with a code; *handled*: it ended well all the same. Harm would be a file under its
  final name that is not whole (its bytes are counted as lost), a temporary file left behind, a message without a code,
  success without the outputs, work that cannot go on, or results that differ from those without the fault.
- **Kills**: `medseg train` ended by SIGKILL at random times and, where the figures have kills aimed at saves, when the
  temporary file of a checkpoint is there; each time a checkpoint must load, and no more may be lost than was done since
  the last save (`trainer.save_minutes`, here half a second). Of a training by two processes (`trainer.devices=2`) the
  main one, the one that started them, or the follower is killed: the others must end by themselves.
- What is written line by line may end anywhere after a crash, and is read accordingly: `train.log`, event files of
  TensorBoard, `history.csv` (rows after the checkpoint are dropped on resume) and `predictions.jsonl` (a line that was
  cut counts as not there).
"""


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = page(FIGURES)
    if options.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print("up to date" if same else "docs/reliability.md is old: python scripts/make_reliability.py")
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page(figures: Path) -> str:
    """The page of the figures in a folder."""
    fuzz, guided, faults, kills, of_processes = (
        read(figures / f"{name}.json") for name in ("fuzz", "atheris", "faults", "kills", "kills_of_processes")
    )
    rows = [fuzz_row(fuzz), guided_row(guided), *fault_rows(faults)]
    rows.append(kill_row("kills of a training", kills, KILLS))
    rows.append(kill_row("kills of one of the two processes of a training", of_processes, KILLS_OF_PROCESSES))
    sections = [
        HEAD,
        table(["what", "tried", "did harm", "finished work lost", "again by"], rows),
        fuzz_table(fuzz),
        guided_table(guided),
        fault_tables(faults),
        kill_table("Kills", kills),
        kill_table("Kills of one of two processes", of_processes),
        MEANING,
    ]
    return "\n".join(section for section in sections if section)


def read(path: Path) -> dict[str, Any] | None:
    """The figures of one program; None where it did not run yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(header: list[str], rows: list[list[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def fuzz_row(fuzz: dict[str, Any] | None) -> list[object]:
    """Inputs that were damaged at random."""
    tried = failed = NOT_MEASURED
    if fuzz is not None:
        tried = f"{sum(entry['inputs'] for entry in fuzz.values()):,} in {len(fuzz)} formats"
        failed = str(sum(len(entry["failures"]) for entry in fuzz.values()))
    return ["damaged inputs read", tried, failed, READERS, f"`{FUZZ}`"]


def guided_row(guided: dict[str, Any] | None) -> list[object]:
    """Inputs whose damage atheris chose."""
    tried = failed = NOT_MEASURED
    if guided is not None:
        tried = f"{sum(entry['inputs'] for entry in guided.values()):,} in {len(guided)} formats"
        failed = str(sum(len(entry["failures"]) for entry in guided.values()))
    return ["inputs damaged as coverage guides (atheris)", tried, failed, READERS, f"`{GUIDED}`"]


def fault_rows(faults: dict[str, Any] | None) -> list[list[object]]:
    """Disks that fail, and the tests of what else does."""
    tried = failed = NOT_MEASURED
    if faults is not None:
        tried = f"{sum(entry['faults'] for entry in faults['injected'].values()):,}"
        failed = str(sum(len(entry["harm"]) for entry in faults["injected"].values()))
    disks: list[object] = ["disks full, read-only or failing", tried, failed, lost_by_faults(faults), f"`{FAULTS}`"]
    tried = failed = NOT_MEASURED
    if faults is not None and faults["tests"]:
        results = list(faults["tests"].values())
        tried, failed = str(len(results) - results.count("skipped")), str(results.count("failed"))
    return [disks, ["tests of other faults", tried, failed, "", f"`{OTHER_FAULTS}`"]]


def kill_row(what: str, kills: dict[str, Any] | None, command: str) -> list[object]:
    """Trainings that were killed."""
    tried = failed = NOT_MEASURED
    if kills is not None:
        tried, failed = str(kills["kills"]), str(kills["failures"])
    return [what, tried, failed, lost_by_kills(kills), f"`{command}`"]


def lost_by_faults(faults: dict[str, Any] | None) -> str:
    """Bytes under final names that were not whole after a fault, which are those of the faults that did harm."""
    if faults is None:
        return NOT_MEASURED
    return f"{sum(entry.get('lost_bytes', 0) for entry in faults['injected'].values()):,} bytes"


def lost_by_kills(kills: dict[str, Any] | None) -> str:
    """Bytes of checkpoints that could not be read again, and the steps that were done since the last save."""
    if kills is None:
        return NOT_MEASURED
    # Figures of before bytes were counted say how many checkpoints were damaged.
    found = kills.get("checkpoint_bytes_damaged", 0 if not kills.get("checkpoints_damaged") else "some")
    text = f"{found} bytes of what was saved"
    if "most_lost_steps" in kills:
        text += f"; at most {kills['most_lost_steps']} steps ({kills['most_lost_seconds']} s) since the last save"
    return text


def fuzz_table(fuzz: dict[str, Any] | None) -> str:
    """Damaged inputs by format."""
    if fuzz is None:
        return ""
    rows: list[list[object]] = [
        [name, f"{e['inputs']:,}", len(e["failures"]), e["mended"], f"{e['peak_mb']} MB", f"{e['slowest_s']:.2f} s"]
        for name, e in sorted(fuzz.items())
    ]
    header = ["format", "inputs", "open failures", "found and mended", "most memory taken", "slowest, processor time"]
    return "## Damaged inputs\n\n" + table(header, rows)


def guided_table(guided: dict[str, Any] | None) -> str:
    """What atheris reached, by format."""
    if guided is None:
        return ""
    rows: list[list[object]] = [
        [name, f"{e['inputs']:,}", len(e["failures"]), f"{e['first_edges']:,}", f"{e['edges']:,}", f"{e['seconds']} s"]
        for name, e in sorted(guided.items())
    ]
    header = ["format", "inputs", "open failures", "edges of the code reached at first", "in the end", "time"]
    return "## Inputs damaged as coverage guides\n\n" + table(header, rows)


def fault_tables(faults: dict[str, Any] | None) -> str:
    """Injected faults by verb, and the tests by their names."""
    if faults is None:
        return ""
    rows: list[list[object]] = [
        [name, e["operations"], e["faults"], e["refused"], e["handled"], len(e["harm"])]
        for name, e in faults["injected"].items()
    ]
    text = "## Injected faults\n\n" + table(["fault", "operations", "faults", "refused", "handled", "did harm"], rows)
    if faults["tests"]:
        named = [[f"`{name}`", result] for name, result in faults["tests"].items()]
        text += "\n" + table(["test", "result"], named)
    return text


def kill_table(title: str, kills: dict[str, Any] | None) -> str:
    """What scripts/kill_training.py wrote, as it stands there."""
    if kills is None:
        return ""
    rows: list[list[object]] = [
        [name.replace("_", " "), value] for name, value in kills.items() if isinstance(value, (int, float, str))
    ]
    return f"## {title}\n\n" + table(["figure", "value"], rows)


if __name__ == "__main__":
    sys.exit(main())
