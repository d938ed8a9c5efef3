"""The folds of a cross-validation together: every case scored once, by the model that has not seen it.

Written to a folder: metrics.csv (per case and class, with the fold), summary.csv (over all cases), summary.json and
crossvalidation.md (per fold and class, over all cases, best and worst cases).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medseg.documents import parse_json
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.labels import Labels
from medseg.metrics.masks import State
from medseg.metrics.metric import known_metrics
from medseg.reports.evaluation import FOREGROUND, Evaluation, Row, Statistic
from medseg.volume import PIXEL_FRAME, PLANE_FRAME, WORLD_FRAME

METRICS_FILE = "metrics.json"
TABLE_FILE = "crossvalidation.md"
RANKED_BY = "dice"
NUM_EXTREMES = 5
"""Best and worst cases that are named."""
OPTIMISTIC = (
    "The checkpoint of each training was chosen by its Dice on the same validation cases that it is scored on here, "
    "which flatters it a little; only cases that were set aside tell more."
)


@dataclass(frozen=True)
class CrossValidation:
    """Evaluations of folds.

    Args:
        folds: number of the fold → evaluation of its validation cases. No case is in two of them.
    """

    folds: Mapping[int, Evaluation]

    @cached_property
    def pooled(self) -> Evaluation:
        """All cases as one evaluation."""
        first = next(iter(self.folds.values()))
        rows = tuple(row for evaluation in self.folds.values() for row in evaluation.rows)
        # The numbers of patients begin anew in each fold, and no patient is in two of them
        patients = {
            case: f"{patient} of fold {number}"
            for number, evaluation in self.folds.items()
            for case, patient in evaluation.patients.items()
        }
        return replace(first, rows=rows, patients=patients)

    @cached_property
    def fold_of(self) -> dict[str, int]:
        """Case id → fold that validated it."""
        return {case: number for number, evaluation in self.folds.items() for case in evaluation.cases}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Rows of the table: the foreground classes, and the foreground where there are several."""
        names = self.pooled.labels.foreground
        return (*names, FOREGROUND) if len(names) > 1 else names

    def over_cases(self, class_name: str, metric: str = RANKED_BY) -> Statistic:
        """A metric of a class (or the foreground) over all cases."""
        return next(s for s in self.pooled.summary if s.class_name == class_name).statistics[metric]

    def ranked(self) -> list[tuple[str, float]]:
        """Case ids with their mean Dice, the worst first; cases where nothing is defined are left out."""
        means = self.pooled.case_means(RANKED_BY).items()
        return sorted(((case, mean) for case, mean in means if not math.isnan(mean)), key=lambda item: item[1])

    def table(self) -> list[list[str]]:
        """Mean Dice per class and fold, and over all cases with its standard deviation; the first row is the head."""
        head = ["class", *(f"fold {number}" for number in self.folds), "all cases", "n", "missed"]
        lines = [head]
        for name in self.class_names:
            entry = next(s for s in self.pooled.summary if s.class_name == name)
            over_all = entry.statistics[RANKED_BY]
            cells = [_number(evaluation.mean(RANKED_BY, name)) for evaluation in self.folds.values()]
            spread = "" if math.isnan(over_all.std) else f" ± {over_all.std:.3f}"
            title = "mean" if name == FOREGROUND else name
            missed = str(entry.counts[State.MISSED])
            lines.append([title, *cells, _number(over_all.mean) + spread, str(over_all.n), missed])
        return lines

    def write(self, folder: Path) -> None:
        """Write the files that the module's head names.

        Raises:
            MedsegError: E_OUTPUT.
        """
        self.pooled.write(folder)
        path = folder / "metrics.csv"
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = list(csv.reader(file))
        with whole_file(path, ".csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["fold", *head])
            writer.writerows([self.fold_of[row[0]], *row] for row in rows)
        with whole_file(folder / "summary.json", ".json") as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        with whole_file(folder / TABLE_FILE, ".md") as temporary:
            temporary.write_text(self.to_markdown(), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """Means of Dice per fold and class, and its statistics over all cases; null where undefined."""
        names = self.class_names
        return {
            "metric": RANKED_BY,
            "num_cases": len(self.pooled.cases),
            "folds": {
                str(number): {
                    "cases": list(evaluation.cases),
                    "mean": {name: _plain(evaluation.mean(RANKED_BY, name)) for name in names},
                }
                for number, evaluation in self.folds.items()
            },
            "all_cases": {
                name: {key: _plain(value) for key, value in vars(self.over_cases(name)).items()} for name in names
            },
        }

    def to_markdown(self) -> str:
        """The table, and the worst and best cases."""
        ranked = self.ranked()
        worst = ranked[:NUM_EXTREMES]
        best = ranked[::-1][: max(0, min(NUM_EXTREMES, len(ranked) - len(worst)))]
        lines = [
            "# Cross-validation",
            "",
            f"{len(self.pooled.cases)} cases, each predicted by the fold that did not train on it. Mean Dice of the "
            f"cases of each fold; over all cases ± standard deviation. {OPTIMISTIC}",
            "",
            *markdown_table(self.table()),
        ]
        for title, cases in (("Worst cases", worst), ("Best cases", best)):
            if cases:
                table = [["case", "fold", "mean Dice"], *([c, str(self.fold_of[c]), f"{m:.3f}"] for c, m in cases)]
                lines += ["", f"## {title}", "", *markdown_table(table)]
        return "\n".join(lines) + "\n"


def read_evaluation(folder: Path, labels: Labels) -> Evaluation:
    """Read the evaluation that `Evaluation.write` wrote.

    Args:
        folder: with metrics.json.
        labels: the classes, as the run's bundle has them.
    Raises:
        MedsegError: E_RUN if the file is not there or is no such evaluation.
    """
    path = folder / METRICS_FILE
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        columns = list(content["definitions"])
        frame, names = next(
            (frame, names)
            for frame in (WORLD_FRAME, PLANE_FRAME, PIXEL_FRAME)
            if set(names := {m.column(frame): m.name for m in known_metrics()}).issuperset(columns)
        )
        rows = tuple(
            Row(
                row["case"],
                row["class"],
                State(row["state"]),
                {names[column]: math.nan if row[column] is None else float(row[column]) for column in columns},
            )
            for row in content["cases"]
        )
        scored = [(row.case, row.class_name) for row in rows]
        if len({*scored}) < len(scored) or {*scored} != {(c, n) for c, _ in scored for n in labels.foreground}:
            raise ValueError("not one row for each case and class")
        tolerance = float(content["tolerance_px" if frame == PIXEL_FRAME else "tolerance_mm"])
        patients = {str(case): f"patient {number}" for case, number in content["patients"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise MedsegError(
            Code.RUN,
            "the evaluation of the run cannot be read",
            where=f"{folder.parent.name}/{folder.name}/{METRICS_FILE}",
            got=f"{type(error).__name__}: {error}",
            remedy="evaluate its predictions again: medseg evaluate",
        ) from error
    return Evaluation(rows, labels, tolerance, frame, patients=patients)


def print_crossvalidation(result: CrossValidation, console: Console) -> None:
    """Print the table of `crossvalidation.md`, and the worst cases."""
    head, *rows = result.table()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in head:
        table.add_column(title, justify="left" if title == "class" else "right", overflow="fold")
    for row in rows:
        if row[0] == "mean" and len(rows) > 1:
            table.add_section()
        table.add_row(*(escape(cell) for cell in row))
    console.print(f"\n[bold]cross-validation[/bold]  mean Dice of {len(result.pooled.cases)} cases, ± over cases")
    console.print(table)
    worst = ", ".join(f"{case} {mean:.3f} (fold {result.fold_of[case]})" for case, mean in result.ranked()[:3])
    console.print(f"worst cases: {worst}", highlight=False, soft_wrap=True, markup=False)


def markdown_table(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is the head, the first column is text and the others numbers."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
