"""What a run writes about itself while it trains: history.csv, TensorBoard, progress bar, log."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from medseg.formats.atomic import whole_file

log = logging.getLogger(__name__)

HISTORY_FILE = "history.csv"
DICE_PREFIX = "val_dice_"
"""Columns of the validation's Dice: of each class, and "mean"."""
TENSORBOARD_FOLDER = "tensorboard"


class Journal:
    """The run's diary. Use as a context manager.

    Args:
        run: the run's folder.
        console: where the user reads.
        columns: columns of history.csv after step and minutes.
        from_step: rows of a resumed run after this step are dropped: they will be written again.
        validates: the resumed run begins with the validation of that step: a row of it is dropped too.
    """

    def __init__(
        self, run: Path, console: Console, columns: list[str], *, from_step: int = 0, validates: bool = False
    ) -> None:
        self.console = console
        self.path = run / HISTORY_FILE
        self.columns = ["step", "minutes", *columns]
        kept = [row for row in _rows(self.path) if int(row["step"]) <= from_step]
        if validates:
            kept = [row for row in kept if int(row["step"]) < from_step or not row.get("val_loss")]
        # Whole or not at all: a full disk must not take the rows of a run that goes on.
        with whole_file(self.path, ".csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(kept)
        self.board = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=from_step or None)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Journal:
        self.progress.start()
        self._task = self.progress.add_task("training", total=1.0, status="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.board.close()

    def advance(self, share: float, status: str) -> None:
        """Move the bar to a share of the budget and say how it goes."""
        if self._task is not None:
            self.progress.update(self._task, completed=min(share, 1.0), status=status)

    def say(self, text: str) -> None:
        """A line for the user, and for the log."""
        self.console.print(text, highlight=False, soft_wrap=True)
        log.info(text)

    def record(self, step: int, minutes: float, values: Mapping[str, float]) -> None:
        """One row of history.csv and the same scalars in TensorBoard."""
        row = {"step": step, "minutes": f"{minutes:.4f}", **{k: f"{v:.6g}" for k, v in values.items()}}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore", restval="").writerow(row)
        for key, value in values.items():
            self.board.add_scalar(_tag(key), value, step)

    def picture(self, name: str, array: np.ndarray, step: int) -> None:
        """A picture (H, W, 3) uint8 for TensorBoard."""
        self.board.add_image(name, array, step, dataformats="HWC")

    def settings(self, name: str, values: Mapping[str, object]) -> None:
        """A configuration as text in TensorBoard."""
        text = yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=100)
        self.board.add_text(name, "```yaml\n" + text + "```")


def _tag(column: str) -> str:
    """TensorBoard's section and name of a column: losses side by side, one section for Dice."""
    if column.startswith(DICE_PREFIX):
        return f"dice/{column.removeprefix(DICE_PREFIX)}"
    named = {"train_loss": "loss/training", "val_loss": "loss/validation"}
    section, name = ("validation", column.removeprefix("val_")) if column.startswith("val_") else ("training", column)
    return named.get(column, f"{section}/{name}")


def _rows(path: Path) -> list[dict[str, str]]:
    """Rows of a history.csv; [] if there is none. One that a kill cut short is none."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    return [row for row in csv.DictReader(lines) if (row.get("step") or "").isdecimal() and None not in row.values()]
