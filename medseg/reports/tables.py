"""An evaluation as tables for the terminal, readable at 100 columns."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medseg.metrics.masks import State
from medseg.metrics.metric import Metric
from medseg.reports.calibrated import NEAR_MM, interval_of, num_defined
from medseg.reports.evaluation import FOREGROUND, Evaluation, Summary
from medseg.volume import PIXEL_FRAME

COLUMNS = ("dice", "iou", "sensitivity", "precision", "hd95", "asd", "surface_dice", "relative_volume_error")
"""The metrics on the terminal, with those that were asked for by name; the files hold all."""
RANKED_BY = "dice"
WIDE = 100
"""Columns of a terminal that holds all metrics; each that was asked for by name takes `BY_NAME` more."""
BY_NAME = 8
NARROW_LEAVES_OUT = ("iou", "precision", "asd")
"""What a narrower terminal does not show; metrics.csv has everything."""
NUM_WORST = 3
UNDEFINED = "–"


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the means per class with the counts of empty masks, then the worst cases."""
    unit = "px" if evaluation.frame == PIXEL_FRAME else "mm"
    cases = len(evaluation.cases)
    whose = {evaluation.patients.get(case, case) for case in evaluation.cases} if evaluation.patients else ()
    of_patients = f" of {len(whose)} {'patient' if len(whose) == 1 else 'patients'}" if whose else ""
    counted = f"{cases} {'case' if cases == 1 else 'cases'}{of_patients}"
    console.print(f"\n[bold]{counted}[/bold]  mean over cases, ± standard deviation")
    console.print(_class_table(evaluation, console.width))
    distances = "HD95" if "asd" in _left_out(evaluation, console.width) else "HD95, ASD"
    console.print(
        f"[dim]{distances} in {unit}; NSD: surface Dice at {evaluation.tolerance_mm:g} {unit}; "
        "ΔV/V: signed volume error.\n"
        "Missed and spurious structures count as the worst; those absent from both are left out.[/dim]"
    )
    if evaluation.calibrations:
        console.print(f"[bold]calibration[/bold]  {calibration_line(evaluation)}")
    if cases > 1:
        console.print("\n[bold]worst cases[/bold]")
        console.print(_worst_table(evaluation))


def calibration_line(evaluation: Evaluation) -> str:
    """The mean ECE of the cases, over the scan and near the structures, with its interval."""
    unit = "px" if evaluation.frame == PIXEL_FRAME else "mm"
    parts = []
    for near, where in ((False, "over the scan"), (True, f"within {NEAR_MM:g} {unit} of the box of the structures")):
        mean = interval_of(evaluation.calibrations, evaluation.patients, near=near)
        defined, cases = num_defined(evaluation.calibrations, near=near), len(evaluation.calibrations)
        of_cases = f" in {defined} of {cases} cases" if defined < cases else ""
        parts.append(f"{mean.mean:.4f} ({mean.low:.4f} to {mean.high:.4f}) {where}{of_cases}")
    return f"ECE {', '.join(parts)}"


def _class_table(evaluation: Evaluation, width: int) -> Table:
    left_out = _left_out(evaluation, width)
    shown = [m for m in evaluation.metrics if (m.name in COLUMNS or not m.default) and m.name not in left_out]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("class", overflow="fold", min_width=8)
    for metric in shown:
        table.add_column(metric.title, justify="right", no_wrap=True)
    for title in ("n", "missed", "spur"):
        table.add_column(title, justify="right", no_wrap=True)
    for entry in evaluation.summary:
        if entry.class_name == FOREGROUND:
            if len(evaluation.labels.foreground) == 1:
                continue
            table.add_section()
        table.add_row(*_class_row(entry, shown))
    return table


def _left_out(evaluation: Evaluation, width: int) -> tuple[str, ...]:
    """What a terminal of this width does not show."""
    by_name = sum(not metric.default for metric in evaluation.metrics)
    return () if width >= WIDE + BY_NAME * by_name else NARROW_LEAVES_OUT


def _class_row(entry: Summary, shown: list[Metric]) -> list[str]:
    dice = entry.statistics[RANKED_BY]
    cells = ["mean" if entry.class_name == FOREGROUND else escape(entry.class_name)]
    for metric in shown:
        statistic = entry.statistics.get(metric.name)
        cell = UNDEFINED if statistic is None else _number(metric, statistic.mean)
        if metric.name == RANKED_BY and not math.isnan(dice.std):
            cell += f" ±{dice.std:.3f}"
        cells.append(cell)
    missed, spurious = entry.counts[State.MISSED], entry.counts[State.SPURIOUS]
    return [*cells, str(dice.n), _warned(missed), _warned(spurious)]


def _worst_table(evaluation: Evaluation) -> Table:
    """The cases with the lowest mean Dice, with the Dice of their worst class."""
    means = {case: mean for case, mean in evaluation.case_means(RANKED_BY).items() if not math.isnan(mean)}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("case", overflow="fold")
    table.add_column("mean Dice", justify="right")
    table.add_column("worst class", overflow="fold")
    table.add_column("Dice", justify="right")
    table.add_column("")
    for case in sorted(means, key=lambda c: means[c])[:NUM_WORST]:
        rows = [r for r in evaluation.rows if r.case == case and not math.isnan(r.values[RANKED_BY])]
        worst = min(rows, key=lambda row: row.values[RANKED_BY])
        state = "" if worst.state is State.PRESENT else f"[yellow]{worst.state.value}[/yellow]"
        table.add_row(
            escape(case), f"{means[case]:.3f}", escape(worst.class_name), f"{worst.values[RANKED_BY]:.3f}", state
        )
    return table


def _number(metric: Metric, value: float) -> str:
    if math.isnan(value):
        return UNDEFINED
    if metric.name == "relative_volume_error":
        return f"{100 * value:+.1f}%"
    return f"{value:.3f}" if metric.dimension == "ratio" else f"{value:.2f}"


def _warned(count: int) -> str:
    return f"[yellow]{count}[/yellow]" if count else "0"
