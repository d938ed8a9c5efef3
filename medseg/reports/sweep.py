"""The runs of a sweep side by side: a table of what differs between them and how good they became, and a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medseg.bundle import FOLDS_FILE
from medseg.documents import YAMLError, parse_json, parse_yaml
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.reports.curves import DICE_MEAN, Curve, read_history
from medseg.reports.evaluation import FOREGROUND

CONFIG_FILE, HISTORY_FILE, REFUSED_FILE = "config.yaml", "history.csv", "refused.txt"
FINAL_METRICS = "validation/metrics.json"
TABLE_FILE, PICTURE_FILE = "sweep.csv", "sweep.png"
MAX_KEYS = 4
"""Keys that get a panel of the picture."""
DPI = 150
DOT = "#0072B2"


@dataclass(frozen=True)
class SweepRun:
    """One run.

    Args:
        name: of its folder.
        settings: key with dots → value, of the whole configuration.
        dice: best mean Dice of its validations; of several folds the mean of theirs; NaN if there was none.
        final: mean Dice of the final validation over classes and cases; NaN without one.
        minutes: how long it trained.
        curve: minutes and Dice of its validations.
        refused: why it did not end well; None: it did, or goes on still.
    """

    name: str
    settings: Mapping[str, Any]
    dice: float
    final: float
    minutes: float
    curve: Curve
    refused: str | None


def read_sweep(folder: Path) -> list[SweepRun]:
    """The runs in a folder, by name.

    Raises:
        MedsegError: E_RUN if there is none.
    """
    names = (CONFIG_FILE, REFUSED_FILE)
    folders = [p for p in folder.iterdir() if any((p / n).is_file() for n in names)] if folder.is_dir() else []
    if not folders:
        raise MedsegError(
            Code.RUN,
            "there are no runs in this folder",
            where=folder,
            expected="the folder of a sweep: medseg train -m, or medseg tune",
        )
    return [_read(run) for run in sorted(folders)]


def differing(runs: Sequence[SweepRun]) -> list[str]:
    """The keys in which runs differ, in the order of the configuration; of another network its name alone."""
    read = [run.settings for run in runs if run.settings]
    keys = [key for key in read[0] if all(key in settings for settings in read)] if read else []
    found = [key for key in keys if len({_text(settings[key]) for settings in read}) > 1]
    others = tuple(key.removesuffix("name") for key in found if key.endswith(".name"))
    return [key for key in found if key.endswith(".name") or not key.startswith(others)]


def conclude_sweep(folder: Path, console: Console) -> list[SweepRun]:
    """Print the table of the runs in a folder, and write it and the picture there.

    Raises:
        MedsegError: E_RUN if there is no run, E_OUTPUT.
    """
    runs = read_sweep(folder)
    print_sweep(runs, console)
    write_table(folder / TABLE_FILE, runs)
    with whole_file(folder / PICTURE_FILE, ".png") as temporary:
        sweep_figure(runs).savefig(temporary, format="png", dpi=DPI)
    said = f"the {len(runs)} runs side by side: {folder / TABLE_FILE}, {folder / PICTURE_FILE}"
    console.print(said, highlight=False, soft_wrap=True, markup=False)
    return runs


def print_sweep(runs: Sequence[SweepRun], console: Console) -> None:
    """The table for the terminal, the best run first."""
    keys = differing(runs)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", no_wrap=True)
    for title in (key.rpartition(".")[2] if _is_alone(key, keys) else key for key in keys):
        table.add_column(escape(title), overflow="fold")
    for title in ("Dice", "final", "minutes"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for run in _ranked(runs):
        settings = (escape(_text(run.settings.get(key))) for key in keys)
        numbers = (_number(run.dice, ".4f"), _number(run.final, ".4f"), _number(run.minutes, ".1f"))
        refused = "" if run.refused is None else f"[red]{escape(run.refused.splitlines()[0])}[/red]"
        table.add_row(escape(run.name), *settings, *numbers, refused)
    console.print(table)
    console.print(
        "[dim]Dice: best of the validations during training; final: on the scans' own grids. The best of many runs on "
        "the same cases looks better than it is: judge it on others.[/dim]"
    )


def write_table(path: Path, runs: Sequence[SweepRun]) -> None:
    """The table as CSV, in the order of the folders.

    Raises:
        MedsegError: E_OUTPUT.
    """
    keys = differing(runs)
    with whole_file(path, ".csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *keys, "best_validation_dice", "final_dice", "minutes", "refused"])
        for run in runs:
            settings = [_text(run.settings.get(key)) for key in keys]
            numbers = [_number(value, ".6g") for value in (run.dice, run.final, run.minutes)]
            writer.writerow([run.name, *settings, *numbers, (run.refused or "").partition("\n")[0]])


def sweep_figure(runs: Sequence[SweepRun]) -> Figure:
    """Validation Dice over time of each run, and the best Dice over each key in which they differ."""
    keys = differing(runs)[:MAX_KEYS]
    figure = Figure(figsize=(5 + 3 * len(keys), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(keys), width_ratios=[5, *([3] * len(keys))], squeeze=False)[0]
    for run in runs:
        panels[0].plot(*run.curve, marker=".", linewidth=1, label=run.name)
    panels[0].set(xlabel="minutes", ylabel="validation Dice (mean)")
    if len(runs) <= 10 and any(run.curve[0] for run in runs):
        panels[0].legend(fontsize=6)
    for panel, key in zip(panels[1:], keys, strict=True):
        _draw_key(panel, key, runs)
    return figure


def _draw_key(panel: Axes, key: str, runs: Sequence[SweepRun]) -> None:
    shown = [(run.settings.get(key), run.dice) for run in runs if run.settings and not math.isnan(run.dice)]
    are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in shown)
    values: list[Any] = [value if are_numbers else _text(value) for value, _ in shown]
    panel.plot(values, [dice for _, dice in shown], "o", color=DOT, markersize=4)
    positive = [v for v in values if isinstance(v, int | float) and v > 0]
    if are_numbers and len(positive) == len(values) and values and max(positive) > 30 * min(positive):
        panel.set_xscale("log")
    panel.set(xlabel=key, ylabel="best Dice")


def _read(run: Path) -> SweepRun:
    """What can be read of a run: it may have been refused, or go on still."""
    refused = None
    with suppress(OSError):
        refused = (run / REFUSED_FILE).read_text(encoding="utf-8")
    settings: dict[str, Any] = {}
    with suppress(OSError, YAMLError, ValueError):
        settings = _flat(parse_yaml((run / CONFIG_FILE).read_text(encoding="utf-8")))
    parts = sorted(run.glob("fold_*")) if (run / FOLDS_FILE).is_file() else [run]
    best: list[float] = []
    finals: list[float] = []
    curve: Curve = ([], [])
    minutes = 0.0
    for part in parts:
        with suppress(MedsegError, OSError):
            history = read_history(part / HISTORY_FILE)
            clock = dict(zip(*history["minutes"], strict=True)) if "minutes" in history else {}
            minutes += max(clock.values(), default=0.0)
            steps, dices = history.get(DICE_MEAN, ([], []))
            best += [max(dices)] if dices else []
            curve = curve if curve[0] else ([clock.get(step, math.nan) for step in steps], dices)
        with suppress(OSError, ValueError, KeyError, TypeError):
            summary = parse_json((part / FINAL_METRICS).read_text(encoding="utf-8"))["summary"]
            entries = [summary[FOREGROUND]] if FOREGROUND in summary else list(summary.values())
            finals.append(float(entries[0]["metrics"]["dice"]["mean"]))
    return SweepRun(run.name, settings, _mean(best), _mean(finals), minutes, curve, refused)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _ranked(runs: Sequence[SweepRun]) -> list[SweepRun]:
    return sorted(runs, key=lambda run: (math.isnan(run.dice), -run.dice if not math.isnan(run.dice) else 0.0))


def _is_alone(key: str, keys: Sequence[str]) -> bool:
    last = key.rpartition(".")[2]
    return last != "name" and sum(other.rpartition(".")[2] == last for other in keys) == 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
