"""What a folder of predictions tells about itself: its `predictions.json` and `predictions.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medseg.documents import parse_json
from medseg.formats.label_table import read_cases
from medseg.labels import TABLE_FILE
from medseg.reports.html.page import Remark

MANIFEST_FILE = "predictions.jsonl"
"""As `medseg predict` names it: lines of sessions and of cases, of which the last one counts."""
TOLD = {"model": "model (SHA-256)", "device": "predicted on", "medseg": "predicted by medseg", "options": "options"}
"""What of a session stands in the report."""


def remarks_of(folder: Path) -> list[Remark]:
    """Bad cases with their codes, warnings, and what is to be known of scans.

    Raises:
        MedsegError: E_LABEL if predictions.json cannot be understood.
    """
    last = {str(line["case"]): line for line in _lines(folder) if "case" in line}
    found: list[Remark] = []
    for case, line in last.items():
        failed = line.get("failed")
        if isinstance(failed, dict):
            found.append(Remark("failure", f"not predicted: {failed.get('code')} {failed.get('message')}", [case]))
    warned: dict[str, list[str]] = {}
    for case, line in last.items():
        for text in line.get("warnings") or ():
            warned.setdefault(str(text), []).append(case)
    found += [Remark("warning", text, cases) for text, cases in warned.items()]
    noted: dict[str, list[str]] = {}
    for case, record in read_cases(folder / TABLE_FILE).items():
        for text in record.notes:
            noted.setdefault(text, []).append(case)
    return [*found, *(Remark("note", text, cases) for text, cases in noted.items())]


def manifest_of(folder: Path) -> dict[str, str]:
    """Model, device and options of the predictions; nothing where the folder does not tell, all where they are many."""
    sessions = {str(line["session"]): line for line in _lines(folder) if "case" not in line and "session" in line}
    found: dict[str, str] = {}
    for number, line in enumerate(sessions.values(), start=1):
        which = f"session {number}: " if len(sessions) > 1 else ""
        for key, title in TOLD.items():
            if key in line:
                value = line[key]
                found[which + title] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = parse_json(text)
            except ValueError:  # cut short by a crash: it counts as not there
                continue
            if isinstance(line, dict):
                yield line
