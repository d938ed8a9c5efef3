"""An evaluation as tables in the terminal."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from medseg.classification.evaluation import RATIOS, ClassificationEvaluation
from medseg.metrics.classification_intervals import Estimate
from medseg.statistics import FEW_PATIENTS

TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "kappa": "Cohen's kappa",
    "brier": "Brier score (0 best, 2 worst)",
    "ece": "expected calibration error",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
}
MAX_CONFUSED = 12
"""Classes of which the confusion matrix is printed; of more only the file has it."""


def print_evaluation(evaluation: ClassificationEvaluation, console: Console) -> None:
    """Areas, means and decisions with their intervals, and the confusion matrix."""
    table = Table("measure", "value (95 % interval)", title=f"{len(evaluation.cases)} images")
    for name, one in evaluation.aucs.items():
        title = f"AUC, mean over {len(evaluation.shown)} classes" if name == "macro" else f"AUC, {name}"
        table.add_row(Text(title), f"{one}" + (f" {one.reason}" if one.reason else ""))
    for name, one in evaluation.summary.items():
        table.add_row(TITLES[name], f"{one}" + (f" {one.reason}" if one.reason else ""))
    console.print(table)
    points = Table(title="decisions", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("class", "decided", "threshold", "sens.", "spec.", "PPV", "NPV"):
        points.add_column(title, overflow="fold")
    for row in evaluation.decisions:
        threshold = "" if math.isnan(row.threshold) else f"{row.threshold:.3f}"
        decided = row.point.replace(">=", "\n>= ")  # 80 columns hold it all so
        cells = [row.note] if row.note else [_narrow(row.values[name]) for name in RATIOS[:4]]
        points.add_row(Text(row.class_name), decided, threshold, *cells)
    console.print(points)
    if any(row.point != "most probable" for row in evaluation.decisions):
        console.print(f"thresholds: {evaluation.how_chosen}", highlight=False, soft_wrap=True)
    if len(evaluation.classes) <= MAX_CONFUSED:
        confusion = Table("is \\ predicted", *map(escape, evaluation.classes), title="confusion")
        for name, counts in zip(evaluation.classes, evaluation.confusion.tolist(), strict=True):
            confusion.add_row(Text(name), *map(str, counts))
        console.print(confusion)
    for name, reason in evaluation.undefined.items():
        console.print(f"warning    {name}: {reason}", highlight=False, soft_wrap=True, markup=False)
    console.print("\n".join(notes_on(evaluation)), highlight=False, soft_wrap=True, markup=False)


def notes_on(evaluation: ClassificationEvaluation) -> list[str]:
    """What a reader of the intervals must know."""
    lines = list(evaluation.remarks)
    if evaluation.clusters is None and not evaluation.patients:
        lines.append("intervals take each image for another patient: where patients have several, they are too narrow")
    if evaluation.num_patients < FEW_PATIENTS:
        lines.append(f"from {evaluation.num_patients} patients: read the numbers as a hint")
    return lines


def _narrow(one: Estimate) -> str:
    """A share, and its interval below it."""
    value = "–" if math.isnan(one.value) else f"{one.value:.3f}"
    return value if math.isnan(one.low) else f"{value}\n{one.low:.2f}–{one.high:.2f}"
