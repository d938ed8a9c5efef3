"""The runs of a sweep side by side: a table of what differs between them and how good they became, and a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

SCORES = {DICE_MEAN: "Dice", "val_auc": "AUC", "val_explained": "explained variance"}
"""Columns of histories that tell how good a run is, of each task one; larger is better."""
CONFIG_FILE, HISTORY_FILE, REFUSED_FILE = "config.yaml", "history.csv", "refused.txt"
FINAL_METRICS = "validation/metrics.json"
TABLE_FILE, PICTURE_FILE = "sweep.csv", "sweep.png"
MAX_KEYS = 4
"""Keys that get a panel of the picture."""
DPI = 150
DOT, OTHERS = "#0072B2", "#BBBBBB"
NAMED = 7
"""Runs that get a colour and their name, the best ones; the others are grey."""


@dataclass(frozen=True)
class SweepRun:
    """One run.

    Args:
        name: of its folder.
        settings: key with dots → value, of the whole configuration.
        measure: what its validations are judged by, in a word.
        score: the best of its validations; of several folds the mean of theirs; NaN if there was none.
        final: mean Dice of the final validation over classes and cases; NaN without one.
        minutes: how long it trained.
        curve: minutes and scores of its validations.
        refused: why it did not end well; None: it did, or goes on still.
    """

    name: str
    settings: Mapping[str, Any]
    measure: str
    score: float
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
    measure = _measure(runs)
    for title in (measure, "final", "minutes"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for run in _ranked(runs):
        settings = (escape(_short(run.settings.get(key))) for key in keys)
        numbers = (_number(run.score, ".4f"), _number(run.final, ".4f"), _number(run.minutes, ".1f"))
        refused = "" if run.refused is None else f"[red]{escape(run.refused.splitlines()[0])}[/red]"
        table.add_row(escape(run.name), *settings, *numbers, refused)
    console.print(table)
    console.print(
        f"[dim]{measure}: best of the validations during training; final: Dice on the scans' own grids. The best of "
        "many runs on the same cases looks better than it is: judge it on others.[/dim]"
    )


def write_table(path: Path, runs: Sequence[SweepRun]) -> None:
    """The table as CSV, in the order of the folders.

    Raises:
        MedsegError: E_OUTPUT.
    """
    keys = differing(runs)
    with whole_file(path, ".csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        measure = _measure(runs).lower().replace(" ", "_")
        writer.writerow(["run", *keys, f"best_validation_{measure}", "final_dice", "minutes", "refused"])
        for run in runs:
            settings = [_text(run.settings.get(key)) for key in keys]
            numbers = [_number(value, ".6g") for value in (run.score, run.final, run.minutes)]
            writer.writerow([run.name, *settings, *numbers, (run.refused or "").partition("\n")[0]])


def sweep_figure(runs: Sequence[SweepRun]) -> Figure:
    """The validations of each run over time, and the best of them over each key in which the runs differ."""
    keys = differing(runs)[:MAX_KEYS]
    figure = Figure(figsize=(5 + 3 * len(keys), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + len(keys), width_ratios=[5, *([3] * len(keys))], squeeze=False)[0]
    curves = [run for run in _ranked(runs) if run.curve[0]]
    for place, run in reversed([*enumerate(curves)]):  # the best ones above the others
        named = place < NAMED
        label = run.name if named else f"{len(curves) - NAMED} others" if place == NAMED else None
        panels[0].plot(*run.curve, ".-", linewidth=1, color=f"C{place}" if named else OTHERS, label=label)
        if run.refused is not None:
            panels[0].plot(run.curve[0][-1], run.curve[1][-1], "x", color="black", markersize=5)
    panels[0].set(xlabel="minutes (×: ended early)", ylabel=f"validation {_measure(runs)} (mean)")
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:
        panels[0].legend(handles[::-1], labels[::-1], fontsize=6)
    for panel, key in zip(panels[1:], keys, strict=True):
        _draw_key(panel, key, runs)
    return figure


def _draw_key(panel: Axes, key: str, runs: Sequence[SweepRun]) -> None:
    drawn = [run for run in runs if run.settings and not math.isnan(run.score)]
    shown = [run.settings.get(key) for run in drawn]
    are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in shown)
    values: list[Any] = [value if are_numbers else _text(value) for value in shown]
    for value, run in zip(values, drawn, strict=True):
        fill: Literal["none", "full"] = "full" if run.refused is None else "none"  # what ended early might have risen
        panel.plot([value], [run.score], "o", color=DOT, markersize=4, fillstyle=fill)
    positive = [v for v in values if isinstance(v, int | float) and v > 0]
    if are_numbers and len(positive) == len(values) and values and max(positive) > 30 * min(positive):
        panel.set_xscale("log")
    panel.set(xlabel=key, ylabel=f"best {_measure(runs)}")


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
    measure = SCORES[DICE_MEAN]
    for part in parts:
        with suppress(MedsegError, OSError):
            history = read_history(part / HISTORY_FILE)
            clock = dict(zip(*history["minutes"], strict=True)) if "minutes" in history else {}
            minutes += max(clock.values(), default=0.0)
            column = next((name for name in SCORES if name in history), DICE_MEAN)
            steps, scores = history.get(column, ([], []))
            measure = SCORES[column]
            best += [max(scores)] if scores else []
            curve = curve if curve[0] else ([clock.get(step, math.nan) for step in steps], scores)
        with suppress(OSError, ValueError, KeyError, TypeError):
            summary = parse_json((part / FINAL_METRICS).read_text(encoding="utf-8"))["summary"]
            entries = [summary[FOREGROUND]] if FOREGROUND in summary else list(summary.values())
            finals.append(float(entries[0]["metrics"]["dice"]["mean"]))
    return SweepRun(run.name, settings, measure, _mean(best), _mean(finals), minutes, curve, refused)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values} if prefix else {}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _ranked(runs: Sequence[SweepRun]) -> list[SweepRun]:
    return sorted(runs, key=lambda run: (math.isnan(run.score), -run.score if not math.isnan(run.score) else 0.0))


def _measure(runs: Sequence[SweepRun]) -> str:
    """What they are compared by: runs of one sweep learn one task."""
    return next((run.measure for run in runs if not math.isnan(run.score)), SCORES[DICE_MEAN])


def _is_alone(key: str, keys: Sequence[str]) -> bool:
    last = key.rpartition(".")[2]
    return last != "name" and sum(other.rpartition(".")[2] == last for other in keys) == 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
