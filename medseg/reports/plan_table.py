"""A plan and the unusual cases as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medseg.data.facts import Anomaly
from medseg.data.plan import Plan

MAX_ANOMALIES = 30
"""Most cases that are listed; survey.json has all."""


def print_plan(plan: Plan, console: Console) -> None:
    """Each value with its reason."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("plan", no_wrap=True)
    table.add_column("value", overflow="fold", ratio=2)
    table.add_column("because", overflow="fold", ratio=3)
    for field in fields(plan):
        if field.name != "reasons":
            value = _text(getattr(plan, field.name))
            value = value.replace("×", ", ") if field.name in ("intensity", "widths") else value
            table.add_row(field.name, escape(value), escape(plan.reasons[field.name]))
    console.print(table)


def print_anomalies(anomalies: Sequence[Anomaly], console: Console) -> None:
    """One row for each case that is unlike the rest."""
    if not anomalies:
        console.print("no case is unlike the rest")
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("unusual case", overflow="fold")
    table.add_column("because", overflow="fold", ratio=1)
    for anomaly in anomalies[:MAX_ANOMALIES]:
        table.add_row(escape(anomaly.case_id), escape("; ".join(anomaly.reasons)))
    console.print(table)
    if len(anomalies) > MAX_ANOMALIES:
        console.print(f"and {len(anomalies) - MAX_ANOMALIES} more in survey.json", highlight=False)


def _text(value: object) -> str:
    """A value as people write it: sizes along axes with ×, lists with commas; plan.yaml has all digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if not isinstance(value, tuple):
        return str(value) or "–"
    if value and isinstance(value[0], tuple):
        return "  ".join(_text(item) for item in value)
    if value and all(isinstance(item, (int, float)) for item in value):
        return "×".join(str(item) if isinstance(item, int) else f"{item:.4g}" for item in value)
    return ", ".join(map(str, value))
