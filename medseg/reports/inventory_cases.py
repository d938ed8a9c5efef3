"""`medseg inspect` of a training data folder: every case is read once, and all that is wrong is said at once.

It is what a training does before its first step (`medseg.data.survey`), as a report: what is wrong stands in it, with
all that the refusals say, however many there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from medseg.data.cases import Case, find_cases
from medseg.data.facts import Survey
from medseg.data.splits import SplitConfig, make_split
from medseg.data.summary import anomaly_lines, summary_lines
from medseg.data.survey import survey
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading
from medseg.formats.remarks import gathered_warnings
from medseg.reports.inventory import printable
from medseg.reports.progress import counting_bar

SCHEMA = 1
"""Of the JSON; another number where a key changes its meaning."""
WHOLE = "data set"
"""Stands for a case's id where a problem is of all of them."""


@dataclass(frozen=True)
class Preflight:
    """What reading every case once told."""

    layout: str
    """What kind of folder it is, in words."""
    num_cases: int
    """Good and bad ones."""
    found: Survey | None
    """Of the good cases; None where there is none, or they do not fit together."""
    problems: Mapping[str, MedsegError]
    """Case id → why it cannot be used, sorted; `WHOLE` where it is none of one case."""


def inspect_cases(
    path: Path,
    console: Console,
    *,
    as_json: bool = False,
    labels: Mapping[str, Any] | None = None,
    modality: str | None = None,
    reading: Reading = STRICT,
    num_threads: int = 2,
) -> int:
    """Read every case of a data folder once and say what is there and what is wrong; progress goes to standard error.

    Args:
        path: as `find_cases` takes it.
        console: where the report or the JSON goes.
        as_json: print JSON.
        labels: as `data.labels` of a training.
        modality: as `data.modality`.
        reading: how files are read.
        num_threads: cases that are read at a time; memory holds as many.
    Returns:
        How many problems there are.
    Raises:
        MedsegError: E_MISSING, E_NO_CASES and whatever leaves no case to read.
    """
    flight = preflight(path, labels=labels, modality=modality, reading=reading, num_threads=num_threads)
    if as_json:
        console.out(json.dumps(preflight_json(flight), indent=2), highlight=False)
    else:
        show_preflight(flight, console)
    return len(flight.problems)


def preflight(
    path: Path,
    *,
    labels: Mapping[str, Any] | None = None,
    modality: str | None = None,
    reading: Reading = STRICT,
    num_threads: int = 2,
) -> Preflight:
    """Read every case of a data folder once. Arguments and refusals as `inspect_cases`."""
    teller = Console(stderr=True)
    with gathered_warnings(), counting_bar(teller, "looking for cases") as progress:
        folder = find_cases(path, labels=labels, modality=modality, reading=reading, progress=progress, strict=False)
    problems: dict[str, MedsegError] = {}
    found = None
    try:
        with gathered_warnings(), counting_bar(teller, "reading every case once") as progress:
            found = survey(
                folder,
                labels,
                num_threads=num_threads,
                progress=progress,
                on_bad_case="skip",
                reading=reading,
                refused=problems,
            )
    except MedsegError as error:
        if not all(case.case_id in problems for case in folder.cases):  # else it sums up what `problems` holds
            problems[WHOLE] = error
    num_cases = len({*(case.case_id for case in folder.cases), *problems} - {WHOLE})
    leak = _leak(folder.cases)
    if leak is not None:
        problems[WHOLE] = leak
    return Preflight(folder.layout, num_cases, found, dict(sorted(problems.items())))


def _leak(cases: Sequence[Case]) -> MedsegError | None:
    """A patient on two sides of the split that a manifest states."""
    try:
        make_split(cases, SplitConfig(), seed=0)
    except MedsegError as error:
        return error if error.code is Code.LEAK else None  # whether folds can be made depends on settings of a training
    return None


def preflight_json(flight: Preflight) -> dict[str, Any]:
    """The report for programs."""
    keys = ("message", "where", "expected", "got", "remedy")
    return {
        "schema": SCHEMA,
        "layout": flight.layout,
        "num_cases": flight.num_cases,
        "problems": [
            {"case_id": case_id, "code": str(error.code), **{key: _told(getattr(error, key)) for key in keys}}
            for case_id, error in flight.problems.items()
        ],
        "survey": None if flight.found is None else flight.found.to_json(),
    }


def show_preflight(flight: Preflight, console: Console) -> None:
    """Print the report: what was found, then every problem, then what to do about each kind."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    if flight.found is None:
        say(f"layout     {escape(flight.layout)}")
    else:
        bad = {problem.case_id for problem in flight.found.quarantine}
        for line in (*summary_lines(flight.found), *anomaly_lines(flight.found)):
            if not any(line.startswith(f"left out   {case_id}: ") for case_id in bad):  # the list below says more
                say(escape(printable(line)))
    for case_id, error in flight.problems.items():
        say(f"\n[red]{error.code}[/red]  [bold]{escape(printable(case_id))}[/bold]  {escape(printable(error.message))}")
        for key in ("expected", "got"):
            value = _told(getattr(error, key))
            if value is not None:
                say(f"    {key + ':':<10}{escape(printable(value))}")
    remedies = dict.fromkeys((str(e.code), e.remedy) for e in flight.problems.values() if e.remedy)
    if remedies:
        say("\n[bold]what to do[/bold]")
    for code, remedy in remedies:
        say(f"  [red]{code}[/red]  {escape(printable(str(remedy)))}")
    count = len(flight.problems)
    cases = f"{flight.num_cases} {'case' if flight.num_cases == 1 else 'cases'}"
    problems = f"{count or 'no'} {'problem' if count == 1 else 'problems'}"
    say(f"\n[bold]{cases}, {problems}[/bold]")


def _told(value: object) -> str | None:
    return None if value is None else str(value)
