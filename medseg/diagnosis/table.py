"""A diagnosis as tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medseg.diagnosis import Diagnosis, Status

COLOURS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red"}
VERDICTS = {
    Status.OK: "all is well",
    Status.WARN: "it works; what could be better is marked",
    Status.FAIL: "it will not work before what is marked fail is mended",
}


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Each check with its status, what was found and what to do; then versions in one block."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold", ratio=1)
    for check in diagnosis.checks:
        colour = COLOURS[check.status]
        found = escape(check.found) + (f"\n[{colour}]→ {escape(check.remedy)}[/]" if check.remedy else "")
        table.add_row(f"[{colour}]{check.status}[/]", escape(check.name), found)
    console.print(table)
    console.print(
        "\n" + ", ".join(f"{name} {text}" for name, text in diagnosis.environment.items()),
        highlight=False,
        markup=False,
    )
    console.print(f"\n{VERDICTS[diagnosis.status]}", style=COLOURS[diagnosis.status], highlight=False)
