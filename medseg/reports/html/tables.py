"""The report's tables: text and numbers of an evaluation, row by row, as the template prints them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medseg.metrics.masks import State
from medseg.metrics.metric import Metric
from medseg.reports.confidence import volume_agreements
from medseg.reports.evaluation import FOREGROUND, Evaluation
from medseg.reports.html.figures import VOLUMES
from medseg.reports.palette import class_colours
from medseg.reports.tables import COLUMNS, RANKED_BY, UNDEFINED
from medseg.statistics import LEVEL, Interval

CASE_METRICS = ("dice", "surface_dice", "hd95")
"""Means over the classes of a case, in the table of cases."""
MAX_ROWS = 5000
"""Of a table; the worst come first, and metrics.csv has all."""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: what it says.
        small: a second line.
        warn: whether it stands out.
        colour: of a class, as "#RRGGBB".
        href: where it leads within the page.
    """

    text: str
    small: str = ""
    warn: bool = False
    colour: str = ""
    href: str = ""


@dataclass(frozen=True)
class Column:
    """A heading.

    Args:
        title: what it says.
        is_number: numbers stand on the right, and are sorted as numbers.
    """

    title: str
    is_number: bool = True


@dataclass(frozen=True)
class ReportTable:
    """A table.

    Args:
        name: its id in the page.
        columns: headings.
        rows: cells of each row.
        anchors: ids of the rows, or nothing.
        note: a sentence below it.
        is_long: it is sorted and filtered by the reader.
        has_total: the last row sums up the others.
    """

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    anchors: Sequence[str] = ()
    note: str = ""
    is_long: bool = False
    has_total: bool = False


@dataclass(frozen=True)
class Tile:
    """A number of the summary."""

    title: str
    value: str
    small: str = ""
    warn: bool = False


def number(metric: Metric, value: float) -> str:
    """A value as people read it; `UNDEFINED` for NaN."""
    if not math.isfinite(value):
        return UNDEFINED
    if metric.name == "relative_volume_error":
        return f"{100 * value:+.1f}%"
    if metric.dimension == "count":
        return f"{value:.3g}"
    return f"{value:.3f}" if metric.dimension == "ratio" else f"{value:.2f}"


def shown_metrics(evaluation: Evaluation) -> list[Metric]:
    """Those of the terminal's table, and those that were asked for by name."""
    return [m for m in evaluation.metrics if m.name in COLUMNS or not m.default]


def heading(metric: Metric, frame: str) -> str:
    """The metric's title with its unit."""
    unit = metric.unit(frame)
    return f"{metric.title} ({unit})" if unit else metric.title


def tiles(evaluation: Evaluation) -> list[Tile]:
    """The numbers that come first: counts, and means with their intervals."""
    patients = {evaluation.patients.get(case, case) for case in evaluation.cases}
    of_patients = f"of {_count(len(patients), 'patient')}" if evaluation.patients else ""
    found = [Tile("cases", str(len(evaluation.cases)), of_patients)]
    total = evaluation.summary[-1]
    for metric in evaluation.metrics:
        if metric.name in CASE_METRICS:
            interval = evaluation.intervals[FOREGROUND, metric.name]
            value = number(metric, total.statistics[metric.name].mean)
            title = f"mean {heading(metric, evaluation.frame)}"
            found.append(Tile(title, value, _interval(metric, interval, f"{LEVEL:.0%} CI ")))
    missed, spurious = total.counts[State.MISSED], total.counts[State.SPURIOUS]
    with_it = missed + total.counts[State.PRESENT]
    without = spurious + total.counts[State.ABSENT]
    return [
        *found,
        Tile("missed structures", str(missed), f"of {with_it} in the references", missed > 0),
        Tile("spurious structures", str(spurious), f"of {without} that are absent", spurious > 0),
    ]


def classes_table(evaluation: Evaluation) -> ReportTable:
    """Means and their intervals, and counts of empty masks, per class; the last row is the mean over classes."""
    metrics = shown_metrics(evaluation)
    names = evaluation.labels.foreground
    colours = dict(zip(names, class_colours(len(names)), strict=True))
    rows = []
    for entry in evaluation.summary:
        if entry.class_name == FOREGROUND and len(names) == 1:
            continue
        cells = [Cell("mean" if entry.class_name == FOREGROUND else entry.class_name,
                      colour=colours.get(entry.class_name, ""))]  # fmt: skip
        cells += [Cell(str(entry.statistics[RANKED_BY].n))]
        cells += [Cell(str(n := entry.counts[state]), warn=n > 0) for state in (State.MISSED, State.SPURIOUS)]
        for metric in metrics:
            statistic = entry.statistics.get(metric.name)
            if statistic is None:
                cells.append(Cell(UNDEFINED))
                continue
            cells.append(
                Cell(
                    number(metric, statistic.mean),
                    _interval(metric, evaluation.intervals[entry.class_name, metric.name]),
                )
            )
            if metric.name == RANKED_BY:
                cells += [Cell(number(metric, statistic.median)), Cell(number(metric, statistic.std))]
        rows.append(cells)
    columns = [Column("class", False), Column("n"), Column("missed"), Column("spurious")]
    for metric in metrics:
        columns.append(Column(heading(metric, evaluation.frame)))
        if metric.name == RANKED_BY:
            columns += [Column("median"), Column("SD")]
    return ReportTable("classes", columns, rows, has_total=len(names) > 1)


def cases_table(
    evaluation: Evaluation, fold_of: Mapping[str, int] | None = None, pictured: Mapping[str, str] | None = None
) -> ReportTable:
    """A row per case, the lowest mean Dice first.

    Args:
        evaluation: the cases.
        fold_of: case → fold, where there are several.
        pictured: case → id of its picture in the page.
    """
    metrics = [m for m in evaluation.metrics if m.name in CASE_METRICS]
    means = {m.name: evaluation.case_means(m.name) for m in metrics}
    dice = next(m for m in evaluation.metrics if m.name == RANKED_BY)
    by_case: dict[str, list[tuple[str, State, float]]] = {case: [] for case in evaluation.cases}
    for row in evaluation.rows:
        by_case[row.case].append((row.class_name, row.state, row.values[RANKED_BY]))
    numbers = {case: i for i, case in enumerate(evaluation.cases)}
    ranked = sorted(numbers, key=lambda case: _last(means[RANKED_BY][case]))
    rows = []
    for case in ranked[:MAX_ROWS]:
        scored = [entry for entry in by_case[case] if not math.isnan(entry[2])]
        lowest = min(scored, key=lambda entry: entry[2], default=None)
        cells = [Cell(case, href=(pictured or {}).get(case, ""))]
        cells += [Cell(str(fold_of[case]))] if fold_of else []
        cells += [Cell(number(m, means[m.name][case])) for m in metrics]
        if len(evaluation.labels.foreground) > 1:
            cells += (
                [Cell(UNDEFINED), Cell(UNDEFINED)]
                if lowest is None
                else [Cell(lowest[0]), Cell(number(dice, lowest[2]))]
            )
        for state in (State.MISSED, State.SPURIOUS):
            named = ", ".join(name for name, of, _ in by_case[case] if of is state)
            cells.append(Cell(named, warn=bool(named)))
        rows.append(cells)
    several = len(evaluation.labels.foreground) > 1
    columns = [Column("case", False), *([Column("fold")] if fold_of else [])]
    columns += [Column(("mean " if several else "") + heading(m, evaluation.frame)) for m in metrics]
    columns += [Column("worst class", False), Column("its Dice")] if several else []
    columns += [Column("missed", False), Column("spurious", False)]
    anchors = [f"case-{numbers[case]}" for case in ranked[:MAX_ROWS]]
    return ReportTable("cases", columns, rows, anchors, _cut(len(ranked), "cases"), is_long=True)


def rows_table(evaluation: Evaluation) -> ReportTable:
    """A row per case and class, the lowest Dice first, those that are absent from both last."""
    metrics = shown_metrics(evaluation) + [m for m in evaluation.metrics if m.name in VOLUMES and m.default]
    ranked = sorted(evaluation.rows, key=lambda row: _last(row.values[RANKED_BY]))
    names = evaluation.labels.foreground
    colours = dict(zip(names, class_colours(len(names)), strict=True))
    rows = [
        [
            Cell(row.case),
            Cell(row.class_name, colour=colours[row.class_name]),
            Cell(row.state.value, warn=row.state in (State.MISSED, State.SPURIOUS)),
            *(Cell(number(m, row.values[m.name])) for m in metrics),
        ]
        for row in ranked[:MAX_ROWS]
    ]
    columns = [Column("case", False), Column("class", False), Column("structure", False)]
    columns += [Column(heading(m, evaluation.frame)) for m in metrics]
    return ReportTable("rows", columns, rows, note=_cut(len(ranked), "rows"), is_long=True)


def volumes_table(evaluation: Evaluation) -> ReportTable | None:
    """Agreement of predicted and reference volumes per class; None where they were not measured."""
    agreements = volume_agreements(evaluation)
    if not agreements:
        return None
    names = evaluation.labels.foreground
    colours = dict(zip(names, class_colours(len(names)), strict=True))
    volume = next(m for m in evaluation.metrics if m.name == "predicted_volume")
    rows = [
        [
            Cell(name, colour=colours[name]),
            Cell(str(a.n)),
            *(Cell(UNDEFINED if math.isnan(v) else f"{v:+.3g}") for v in (a.bias, a.low, a.high)),
            *(Cell(UNDEFINED if math.isnan(v) else f"{v:.3f}") for v in (a.pearson, a.icc)),
        ]
        for name, a in agreements.items()
    ]
    unit = volume.unit(evaluation.frame)
    titles = ("n", f"bias ({unit})", f"lower limit ({unit})", f"upper limit ({unit})", "Pearson", "ICC(A,1)")
    return ReportTable("volumes", [Column("class", False), *(Column(t) for t in titles)], rows)


def _interval(metric: Metric, interval: Interval, before: str = "") -> str:
    if math.isnan(interval.low):
        return ""
    dash = "–" if interval.low >= 0 and metric.name != "relative_volume_error" else " to "
    return f"{before}{number(metric, interval.low)}{dash}{number(metric, interval.high)}"


def _last(value: float) -> float:
    """For sorting: undefined values behind all others."""
    return math.inf if math.isnan(value) else value


def _cut(total: int, what: str) -> str:
    return f"The {MAX_ROWS} {what} with the lowest Dice of {total}; metrics.csv has all." if total > MAX_ROWS else ""


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
