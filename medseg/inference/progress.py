"""The bar of `medseg predict`: which case, how many, how fast, and how long it takes yet."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class RateColumn(ProgressColumn):
    """Cases a second, or seconds a case where they take longer."""

    def render(self, task: Task) -> Text:
        """The cell."""
        rate = task.finished_speed or task.speed
        if not rate:
            return Text("")
        return Text(f"{rate:.1f} cases/s" if rate >= 1 else f"{1 / rate:.1f} s/case", style="progress.data.speed")


def cases_bar(console: Console, total: int) -> Progress:
    """A bar with one task, to be used in a `with` statement; it goes when that ends."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bar.add_task("", total=total)
    return bar
