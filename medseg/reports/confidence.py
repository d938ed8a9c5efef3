"""What a summary says beyond means: intervals over patients, and how volumes agree."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from medseg.statistics import Agreement, Interval, agreement, bootstrap_means

if TYPE_CHECKING:
    from medseg.reports.evaluation import Evaluation

Intervals = dict[tuple[str, str], Interval]
"""(name of an entry of the summary, metric) → interval of its mean."""


def intervals(evaluation: Evaluation) -> Intervals:
    """Intervals of all means of a summary, over patients where they are known, else over cases."""
    columns: dict[tuple[str, str], list[float]] = {}
    of_row = {(row.case, row.class_name): row.values for row in evaluation.rows}
    for entry in evaluation.summary:
        for name in entry.statistics:
            if entry.class_name in evaluation.labels.foreground:
                values = [of_row[case, entry.class_name][name] for case in evaluation.cases]
            else:
                values = list(evaluation.case_means(name).values())
            columns[entry.class_name, name] = values
    if not columns:
        return {}
    patients = [evaluation.patients.get(case, case) for case in evaluation.cases]
    return dict(zip(columns, bootstrap_means(np.array(list(columns.values())).T, patients), strict=True))


def few(evaluation: Evaluation) -> str | None:
    """What to say of intervals from few patients, or from few cases where nothing is known of patients."""
    warning = next((i.warning for i in evaluation.intervals.values() if i.warning), None)
    return warning if warning is None or evaluation.patients else warning.replace(" patients", " cases", 1)


def numbered(evaluation: Evaluation) -> dict[str, int]:
    """Case id → a number for its patient, from 0 on in the order of the cases; only cases whose patient is known."""
    known = {case: evaluation.patients[case] for case in evaluation.cases if case in evaluation.patients}
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(known.values()))}
    return {case: numbers[patient] for case, patient in known.items()}


def volume_agreements(evaluation: Evaluation) -> dict[str, Agreement]:
    """For each class how predicted and reference volumes agree, over the cases that have it; else nothing.

    In ml (mm² or pixels for pictures). A missed structure has a predicted volume of 0.
    """
    found: dict[str, Agreement] = {}
    for name in evaluation.labels.foreground:
        rows = [row.values for row in evaluation.rows if row.class_name == name]
        pairs = [(v.get("predicted_volume", math.nan), v.get("reference_volume", math.nan)) for v in rows]
        table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        if not np.isnan(table).all():
            found[name] = agreement(table[:, 0], table[:, 1])
    return found
