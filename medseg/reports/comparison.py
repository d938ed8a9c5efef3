"""`medseg compare A B`: which of two models is better on the same cases, and whether that can be chance.

Only the same cases, classes and references are compared. A case counts for both or for none: where a structure is in
neither mask of one model (undefined) and spurious for the other, the first gets the perfect value, so that a false
alarm costs. All tests of one comparison are corrected together (Holm).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medseg import __version__
from medseg.documents import parse_json
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.labels import Labels
from medseg.metrics.masks import State
from medseg.metrics.metric import Metric, metrics
from medseg.reports.crossvalidation import METRICS_FILE, read_evaluation
from medseg.reports.evaluation import FOREGROUND, Evaluation
from medseg.statistics import LEVEL, PairedTest, holm, paired_test

VOLUME_TOLERANCE = 1e-4
"""References are the same if their volumes differ by no larger share: metrics.json holds them as they were computed."""
NUM_NAMED = 5
"""Case ids that a refusal names."""
UNDEFINED = "–"
WIDE = 100
"""Columns of a terminal that holds everything."""
NARROW_LEAVES_OUT = ("n", "effect")
"""What a narrower terminal does not show; the file has everything."""


@dataclass(frozen=True)
class Compared:
    """One metric of one class, or of the foreground.

    Args:
        class_name: name of the class, or `FOREGROUND`.
        metric: what was measured.
        n: number of cases.
        means: of the first and the second model, over these cases.
        test: second minus first.
        p_holm: the test's p, corrected for all tests of the comparison.
    """

    class_name: str
    metric: Metric
    n: int
    means: tuple[float, float]
    test: PairedTest
    p_holm: float

    @property
    def verdict(self) -> str:
        """ "second better", "second worse", or "" where it can be chance."""
        if not self.p_holm < 1 - LEVEL:
            return ""
        return "second better" if (self.test.effect > 0) == (self.metric.better == "higher") else "second worse"


@dataclass(frozen=True)
class Comparison:
    """Two evaluations, class by class and metric by metric.

    Args:
        rows: one per class and metric.
        frame: of the cases' grids, for units.
        num_cases: cases that both have.
        num_patients: patients that they are from; as many as cases where nothing is known of patients.
        units: what is drawn and ranked: "patients", or "cases" where nothing is known of patients.
    """

    rows: tuple[Compared, ...]
    frame: str
    num_cases: int
    num_patients: int
    units: str

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; NaN becomes None."""
        return {
            "medseg": __version__,
            "num_cases": self.num_cases,
            "num_patients": self.num_patients,
            "difference": f"second minus first; interval: BCa bootstrap over {self.units}",
            "p": f"Wilcoxon's signed-rank test over {self.units}, two-sided; p_holm: corrected for all rows",
            "effect": "matched-pairs rank-biserial correlation",
            "level": LEVEL,
            "rows": [
                {
                    "class": row.class_name,
                    "metric": row.metric.column(self.frame),
                    "better": row.metric.better,
                    "n": row.n,
                    "first": _plain(row.means[0]),
                    "second": _plain(row.means[1]),
                    "difference": _plain(row.test.difference.mean),
                    "low": _plain(row.test.difference.low),
                    "high": _plain(row.test.difference.high),
                    "num_higher": row.test.num_higher,
                    "num_lower": row.test.num_lower,
                    "effect": _plain(row.test.effect),
                    "p": _plain(row.test.p),
                    "p_holm": _plain(row.p_holm),
                    "verdict": row.verdict,
                }
                for row in self.rows
            ],
        }

    def write(self, path: Path) -> None:
        """Write it as JSON.

        Raises:
            MedsegError: E_OUTPUT.
        """
        with whole_file(path, ".json") as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_metrics(path: Path) -> Evaluation:
    """Read a metrics.json, or that of a folder.

    Raises:
        MedsegError: E_RUN if it is not there or not an evaluation.
    """
    folder = path if path.is_dir() else path.parent
    try:
        if path.is_file() and path.name != METRICS_FILE:
            raise ValueError(f"another file than {METRICS_FILE}")
        content = parse_json((folder / METRICS_FILE).read_text(encoding="utf-8"))
        labels = Labels.from_mapping(content["labels"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MedsegError(
            Code.RUN,
            "there is no evaluation that can be read",
            where=path.name,
            expected=f"{METRICS_FILE}, or a folder that holds it",
            got=f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else error.strerror,
            remedy="make one: medseg evaluate PREDICTIONS REFERENCES -o FOLDER",
        ) from error
    return read_evaluation(folder, labels)


def compare(
    first: Evaluation,
    second: Evaluation,
    *,
    names: Sequence[str] | None = None,
    patients: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare two evaluations of the same cases.

    Args:
        first: of one model.
        second: of the other.
        names: metrics to compare; by default all that rank and that both have.
        patients: case id → patient; by default as the evaluations know them. A case without one is one of its own.
    Raises:
        MedsegError: E_UNPAIRED if cases, classes, units, tolerance or references differ, E_NAME for a metric that one
            of them does not have.
    """
    _refuse_unpaired(first, second)
    both = [m for m in first.metrics if m in second.metrics]
    chosen = [m for m in both if m.better] if names is None else list(metrics(names))
    if absent := [m.name for m in chosen if m not in both]:
        raise MedsegError(
            Code.NAME,
            "a metric is not in both evaluations",
            got=", ".join(absent),
            expected=", ".join(m.name for m in both),
            remedy="evaluate again with --metrics",
        )
    cases = first.cases
    known = patients if patients is not None else first.patients or second.patients
    of_case = [known.get(case, case) for case in cases]
    tables = [_values(evaluation, cases, chosen) for evaluation in (first, second)]
    for metric in chosen:
        _settle(tables, metric)
    classes = list(first.labels.foreground)
    found = []
    for name in [*classes, FOREGROUND] if len(classes) > 1 else classes:
        for metric in chosen:
            if name == FOREGROUND and not metric.better:
                continue
            pair = [
                np.array(_column(table, cases, classes if name == FOREGROUND else [name], metric)) for table in tables
            ]
            defined = ~np.isnan(pair[0]) & ~np.isnan(pair[1])
            means = [float(values[defined].mean()) if defined.any() else math.nan for values in pair]
            test = paired_test(pair[0], pair[1], of_case)
            found.append((name, metric, int(defined.sum()), (means[0], means[1]), test))
    corrected = holm([test.p for *_, test in found])
    rows = tuple(Compared(*row, float(p)) for row, p in zip(found, corrected, strict=True))
    return Comparison(rows, first.frame, len(cases), len(set(of_case)), "patients" if known else "cases")


_Values = dict[tuple[str, str], dict[str, float]]
"""(case, class) → metric → value."""


def _values(evaluation: Evaluation, cases: Sequence[str], chosen: Sequence[Metric]) -> _Values:
    return {(row.case, row.class_name): {m.name: row.values[m.name] for m in chosen} for row in evaluation.rows}


def _settle(tables: Sequence[_Values], metric: Metric) -> None:
    """Where only one of the two is undefined (rightly nothing), it gets the perfect value, if the metric ranks."""
    if metric.better is None:
        return
    perfect = 1.0 if metric.better == "higher" else 0.0
    for one, other in (tables, tables[::-1]):
        for key, values in one.items():
            if math.isnan(values[metric.name]) and not math.isnan(other[key][metric.name]):
                values[metric.name] = perfect


def _column(table: _Values, cases: Sequence[str], classes: Sequence[str], metric: Metric) -> list[float]:
    """For each case the mean over these classes where the metric is defined."""
    column = []
    for case in cases:
        defined = [v for name in classes if not math.isnan(v := table[case, name][metric.name])]
        column.append(math.fsum(defined) / len(defined) if defined else math.nan)
    return column


def _refuse_unpaired(first: Evaluation, second: Evaluation) -> None:
    in_both = {
        "case": (first.cases, second.cases),
        "class": (first.labels.foreground, second.labels.foreground),
    }
    for what, (ours, theirs) in in_both.items():
        missing = [f"{_named(set(a) - set(b))} not in the {which}" for a, b, which in
                   ((ours, theirs, "second"), (theirs, ours, "first")) if set(a) - set(b)]  # fmt: skip
        if missing:
            raise MedsegError(
                Code.UNPAIRED,
                f"the two evaluations are not of the same {what}{'s' if what == 'case' else 'es'}",
                got="; ".join(missing),
                remedy="evaluate both models on the same files; means over different cases say nothing of the models",
            )
    for what, values in (
        ("unit", (first.frame, second.frame)),
        ("tolerance of the surface Dice", (first.tolerance_mm, second.tolerance_mm)),
    ):
        if values[0] != values[1]:
            raise MedsegError(
                Code.UNPAIRED,
                f"the two evaluations have another {what}",
                got=f"{values[0]} and {values[1]}",
                remedy="evaluate both alike",
            )
    volumes = {(row.case, row.class_name): row for row in second.rows}
    other = {
        row.case
        for row in first.rows
        if not _same_reference(row.state, row.values, (them := volumes[row.case, row.class_name]).state, them.values)
    }
    if other:
        raise MedsegError(
            Code.UNPAIRED,
            "the two evaluations are against other references: the volumes of the same case differ",
            got=_named(other),
            remedy="evaluate both against the same reference files",
        )


def _same_reference(state: State, values: Mapping[str, float], other_state: State, others: Mapping[str, float]) -> bool:
    has, other_has = (s in (State.PRESENT, State.MISSED) for s in (state, other_state))
    a, b = values.get("reference_volume", math.nan), others.get("reference_volume", math.nan)
    return has == other_has and (math.isnan(a) or math.isnan(b) or math.isclose(a, b, rel_tol=VOLUME_TOLERANCE))


def _named(ids: set[str]) -> str:
    """ "a, b, c and 4 more"."""
    names = sorted(ids)
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("class", overflow="fold")
    table.add_column("metric", no_wrap=True)
    wide = console.width >= WIDE
    shown = ("n", "first", "second", "difference", "95 % interval", "effect", "p (Holm)")
    left_out = () if wide else NARROW_LEAVES_OUT
    for title in shown:
        if title not in left_out:
            table.add_column(title if wide else title.removesuffix("erence"), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    last = None
    for row in comparison.rows:
        if last not in (None, row.class_name):
            table.add_section()
        title = "" if row.class_name == last else "mean" if row.class_name == FOREGROUND else escape(row.class_name)
        last, difference = row.class_name, row.test.difference
        interval = UNDEFINED if math.isnan(difference.low) else f"{difference.low:+.3f} … {difference.high:+.3f}"
        cells = [str(row.n), *(_number(v) for v in row.means), _number(difference.mean, "+")]
        colour = {"second better": "green", "second worse": "red"}.get(row.verdict)
        verdict = f"[{colour}]{row.verdict.removeprefix('second ')}[/{colour}]" if colour else ""
        tested = (_number(row.test.effect, "+"), UNDEFINED if math.isnan(row.p_holm) else f"{row.p_holm:.2g}")
        numbers = zip(shown, (*cells, interval, *tested), strict=True)
        table.add_row(title, row.metric.title, *(cell for name, cell in numbers if name not in left_out), verdict)
    console.print(table)
    console.print(
        "[dim]difference: second minus first, with a bootstrap interval. p: Wilcoxon's signed-rank test, corrected for "
        f"all rows (Holm); a verdict stands where it is below {1 - LEVEL:.2g}.[/dim]"
    )
    warning = comparison.rows[0].test.difference.warning if comparison.rows else None
    if warning:
        console.print(f"[yellow]{warning.replace(' patients', f' {comparison.units}', 1)}[/yellow]")


def _number(value: float, sign: str = "") -> str:
    return UNDEFINED if math.isnan(value) else f"{value:{sign}.3f}"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
