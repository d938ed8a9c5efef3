"""The files of an evaluation: tables for spreadsheets, and one JSON file with everything."""

from __future__ import annotations

import csv
import inspect
import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy

import medseg
from medseg.formats.atomic import make_folder, whole_file
from medseg.metrics.masks import State
from medseg.reports import calibrated
from medseg.reports.confidence import few, numbered, volume_agreements
from medseg.statistics import LEVEL
from medseg.volume import PIXEL_FRAME

if TYPE_CHECKING:
    from medseg.reports.evaluation import Evaluation

EMPTY_MASKS = (
    "absent (no voxel in reference and prediction): undefined, left out of means. "
    "missed (reference only): metrics of which more is better 0, distances the diagonal of the volume. spurious "
    "(prediction only): the same, and what only the reference can define (sensitivity, relative volume error) is "
    "undefined. Specificity, volumes and counts do not rank predictions."
)
_COUNTED = [f"num_{state.value}" for state in State]


def write_files(evaluation: Evaluation, folder: Path) -> None:
    """`Evaluation.write`.

    Raises:
        MedsegError: E_OUTPUT.
    """
    make_folder(folder)
    columns = {m.name: m.column(evaluation.frame) for m in evaluation.metrics}
    table = [["case", "class", "state", *columns.values()]]
    for row in evaluation.rows:
        table.append([row.case, row.class_name, row.state.value, *(_cell(row.values[name]) for name in columns)])
    _write_csv(folder / "metrics.csv", table)

    table = [["class", "metric", "mean", "median", "std", "n", "low", "high", *_COUNTED]]
    for entry in evaluation.summary:
        counts = [str(entry.counts[state]) for state in State]
        for name, s in entry.statistics.items():
            interval = evaluation.intervals[entry.class_name, name]
            numbers = [_cell(s.mean), _cell(s.median), _cell(s.std), str(s.n)]
            numbers += [_cell(interval.low), _cell(interval.high)]
            table.append([entry.class_name, columns[name], *numbers, *counts])
    _write_csv(folder / "summary.csv", table)
    if evaluation.calibrations:
        _write_csv(folder / calibrated.CALIBRATION_FILE, calibrated.calibration_table(evaluation.calibrations))

    with whole_file(folder / "metrics.json", ".json") as temporary:
        temporary.write_text(json.dumps(to_json(evaluation), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything as plain values: definitions, versions, summary and rows; NaN becomes None."""
    columns = {m.name: m.column(evaluation.frame) for m in evaluation.metrics}
    return {
        "tolerance_px" if evaluation.frame == PIXEL_FRAME else "tolerance_mm": evaluation.tolerance_mm,
        "labels": evaluation.labels.to_json(),
        "num_cases": len(evaluation.cases),
        "patients": numbered(evaluation),
        "definitions": {columns[m.name]: inspect.getdoc(m.function) or "" for m in evaluation.metrics},
        "better": {columns[m.name]: m.better for m in evaluation.metrics},
        "empty_masks": EMPTY_MASKS,
        "low, high": f"{LEVEL:.0%} intervals of means, BCa bootstrap over patients where known, else over cases",
        "warning": few(evaluation),
        "volume_agreement": {
            name: {key: _plain(value) for key, value in asdict(agreement).items()}
            for name, agreement in volume_agreements(evaluation).items()
        },
        **(
            {"calibration": calibrated.to_json(evaluation.calibrations, evaluation.patients)}
            if evaluation.calibrations
            else {}
        ),
        "foreground_mean": "over the classes of a case where the metric is defined, then over the cases",
        "versions": {
            "medseg": medseg.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
        "summary": {
            entry.class_name: {
                **{name: entry.counts[state] for name, state in zip(_COUNTED, State, strict=True)},
                "metrics": {
                    columns[name]: {
                        "mean": _plain(s.mean),
                        "median": _plain(s.median),
                        "std": _plain(s.std),
                        "n": s.n,
                        "low": _plain(evaluation.intervals[entry.class_name, name].low),
                        "high": _plain(evaluation.intervals[entry.class_name, name].high),
                    }
                    for name, s in entry.statistics.items()
                },
            }
            for entry in evaluation.summary
        },
        "cases": [
            {
                "case": row.case,
                "class": row.class_name,
                "state": row.state.value,
                **{columns[name]: _plain(value) for name, value in row.values.items()},
            }
            for row in evaluation.rows
        ],
    }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _write_csv(path: Path, table: list[list[str]]) -> None:
    with whole_file(path, ".csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
