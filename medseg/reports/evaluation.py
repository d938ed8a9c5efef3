"""`medseg evaluate PRED REF`: predictions against references, per case and class, and their summary.

Means over classes and cases: per class, the mean over the cases in which the metric is defined; over the foreground,
first the mean over the classes of a case, then over the cases, so that every case weighs the same. What empty masks
get is written in `medseg.metrics`; they are counted beside every mean.
"""

from __future__ import annotations

import csv
import inspect
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy

import medseg
from medseg.errors import Code, MedsegError
from medseg.formats import open_label
from medseg.formats.atomic import whole_file
from medseg.labels import Labels
from medseg.metrics.case import DEFAULT_TOLERANCE_MM, measure_case
from medseg.metrics.masks import State
from medseg.metrics.metric import Metric, metrics
from medseg.reports.confidence import Intervals, few, intervals, numbered, volume_agreements
from medseg.reports.pairs import MissingPolicy, Pair, labels_of, match_pairs
from medseg.statistics import LEVEL
from medseg.volume import PIXEL_FRAME, WORLD_FRAME, Grid, Volume

FOREGROUND = "(foreground)"
"""The row of the summary that is the mean over the foreground classes; no class can be meant by it."""
DEFAULT_NUM_THREADS = 4
"""Cases in work at a time; each holds two label maps in memory."""
EMPTY_MASKS = (
    "absent (no voxel in reference and prediction): undefined, left out of means. "
    "missed (reference only): metrics of which more is better 0, distances the diagonal of the volume. spurious "
    "(prediction only): the same, and what only the reference can define (sensitivity, relative volume error) is "
    "undefined. Specificity, volumes and counts do not rank predictions."
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """One class of one case.

    Args:
        case: case id.
        class_name: name of the class.
        state: which of the two masks has voxels.
        values: metric name → value, NaN where undefined.
    """

    case: str
    class_name: str
    state: State
    values: dict[str, float]


@dataclass(frozen=True)
class Statistic:
    """A metric over the cases where it is defined; NaN where there are none.

    Args:
        mean: arithmetic mean.
        median: median.
        std: standard deviation of the sample (n - 1); NaN for a single case.
        n: number of cases.
    """

    mean: float
    median: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """The statistic of the values that are not NaN."""
        defined = np.array([v for v in values if not math.isnan(v)], dtype=np.float64)
        if not defined.size:
            return cls(math.nan, math.nan, math.nan, 0)
        std = float(defined.std(ddof=1)) if defined.size > 1 else math.nan
        return cls(float(defined.mean()), float(np.median(defined)), std, int(defined.size))


@dataclass(frozen=True)
class Summary:
    """One class over all cases, or the foreground.

    Args:
        class_name: name of the class, or `FOREGROUND`.
        counts: state → number of cases (of cases and classes for the foreground).
        statistics: metric name → statistic. The foreground has only metrics that rank.
    """

    class_name: str
    counts: dict[State, int]
    statistics: dict[str, Statistic]


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a set of cases.

    Args:
        rows: one per case and foreground class or region.
        labels: the classes.
        tolerance_mm: what the surface Dice forgave (pixels for pictures).
        frame: of the cases' grids: `WORLD_FRAME` (mm, ml), `PLANE_FRAME` (mm) or `PIXEL_FRAME` (pixels).
        patients: case id → patient, where it is known: intervals of means draw patients.
    """

    rows: tuple[Row, ...]
    labels: Labels
    tolerance_mm: float = DEFAULT_TOLERANCE_MM
    frame: str = WORLD_FRAME
    patients: Mapping[str, str] = field(default_factory=dict)

    @property
    def cases(self) -> tuple[str, ...]:
        """Case ids in the order of the rows."""
        return tuple(dict.fromkeys(row.case for row in self.rows))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that the rows hold."""
        return metrics(tuple(self.rows[0].values)) if self.rows else ()

    @cached_property
    def summary(self) -> tuple[Summary, ...]:
        """One entry per foreground class, then the foreground."""
        entries = [
            self._summarize(name, [r for r in self.rows if r.class_name == name]) for name in self.labels.foreground
        ]
        foreground = {m.name: Statistic.of(list(self.case_means(m.name).values())) for m in self.metrics if m.better}
        return (*entries, Summary(FOREGROUND, _counts(self.rows), foreground))

    @cached_property
    def intervals(self) -> Intervals:
        """(entry of the summary, metric) → bootstrap interval of its mean."""
        return intervals(self)

    def case_means(self, metric: str) -> dict[str, float]:
        """Case id → mean of the metric over the foreground classes where it is defined, NaN if there are none."""
        values: dict[str, list[float]] = {case: [] for case in self.cases}
        for row in self.rows:
            values[row.case].append(row.values[metric])
        return {case: Statistic.of(of_case).mean for case, of_case in values.items()}

    def mean(self, metric: str, class_name: str = FOREGROUND) -> float:
        """The mean of a metric for a class, by default over the foreground."""
        return next(s for s in self.summary if s.class_name == class_name).statistics[metric].mean

    def write(self, folder: Path) -> None:
        """Write `metrics.csv` (per case and class), `summary.csv` and `metrics.json` (everything, with definitions).

        Undefined values are empty cells and null.

        Raises:
            MedsegError: E_OUTPUT.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MedsegError(
                Code.OUTPUT,
                "the folder cannot be made",
                where=folder.name,
                got=error.strerror,
                remedy="choose another folder",
            ) from error
        columns = {m.name: m.column(self.frame) for m in self.metrics}
        table = [["case", "class", "state", *columns.values()]]
        for row in self.rows:
            table.append([row.case, row.class_name, row.state.value, *(_cell(row.values[name]) for name in columns)])
        _write_csv(folder / "metrics.csv", table)

        table = [["class", "metric", "mean", "median", "std", "n", "low", "high", *_COUNTED]]
        for entry in self.summary:
            counts = [str(entry.counts[state]) for state in State]
            for name, s in entry.statistics.items():
                interval = self.intervals[entry.class_name, name]
                numbers = [_cell(s.mean), _cell(s.median), _cell(s.std), str(s.n)]
                numbers += [_cell(interval.low), _cell(interval.high)]
                table.append([entry.class_name, columns[name], *numbers, *counts])
        _write_csv(folder / "summary.csv", table)

        with whole_file(folder / "metrics.json", ".json") as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values: definitions, versions, summary and rows; NaN becomes None."""
        columns = {m.name: m.column(self.frame) for m in self.metrics}
        return {
            "tolerance_px" if self.frame == PIXEL_FRAME else "tolerance_mm": self.tolerance_mm,
            "labels": self.labels.to_json(),
            "num_cases": len(self.cases),
            "patients": numbered(self),
            "definitions": {columns[m.name]: inspect.getdoc(m.function) or "" for m in self.metrics},
            "better": {columns[m.name]: m.better for m in self.metrics},
            "empty_masks": EMPTY_MASKS,
            "low, high": f"{LEVEL:.0%} intervals of means, BCa bootstrap over patients where known, else over cases",
            "warning": few(self),
            "volume_agreement": {
                name: {key: _plain(value) for key, value in asdict(agreement).items()}
                for name, agreement in volume_agreements(self).items()
            },
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
                            "low": _plain(self.intervals[entry.class_name, name].low),
                            "high": _plain(self.intervals[entry.class_name, name].high),
                        }
                        for name, s in entry.statistics.items()
                    },
                }
                for entry in self.summary
            },
            "cases": [
                {
                    "case": row.case,
                    "class": row.class_name,
                    "state": row.state.value,
                    **{columns[name]: _plain(value) for name, value in row.values.items()},
                }
                for row in self.rows
            ],
        }

    def _summarize(self, class_name: str, rows: list[Row]) -> Summary:
        statistics = {m.name: Statistic.of([row.values[m.name] for row in rows]) for m in self.metrics}
        return Summary(class_name, _counts(rows), statistics)


_COUNTED = [f"num_{state.value}" for state in State]


def evaluate_pair(
    predicted: Volume,
    reference: Volume,
    labels: Labels,
    *,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    names: Sequence[str] | None = None,
    case: str = "",
) -> list[Row]:
    """Measure one prediction.

    Args:
        predicted: label map with the values of files, on the reference's grid; its axes may be flipped or permuted.
        reference: label map with the values of files.
        labels: what the values mean.
        tolerance_mm: what the surface Dice forgives (pixels for pictures).
        names: metrics to compute; None for those that are computed by default.
        case: id for the rows and for messages.
    Returns:
        One row per foreground class, or per region where there are regions. Voxels whose reference is ignored are left
        out.
    Raises:
        MedsegError: E_GRID if the two do not lie on one grid, E_LABEL for values that `labels` does not know.
    """
    predicted = _aligned(predicted, reference.grid, case)
    results = measure_case(
        labels.to_index(predicted.array, where=f"{case} (prediction)"),
        labels.to_index(reference.array, where=f"{case} (reference)"),
        reference.grid,
        num_classes=labels.num_classes,
        regions=labels.regions,
        tolerance_mm=tolerance_mm,
        names=names,
    )
    return [Row(case, labels.declared[r.index], r.state, r.values) for r in results]


def evaluate_folders(
    predicted: Path,
    reference: Path,
    *,
    labels: Labels | None = None,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    names: Sequence[str] | None = None,
    missing: MissingPolicy = "error",
    num_threads: int = DEFAULT_NUM_THREADS,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a folder of predictions, or one file, against references.

    Args:
        predicted: a label file, or a folder of them named by case ("case.nii.gz", "case_seg.nii.gz").
        reference: the same for the references; the file types may differ.
        labels: the classes; by default those that a table or a dataset.json beside the predictions or the references
            declares, else one class per value of the references.
        tolerance_mm: what the surface Dice forgives (pixels for pictures).
        names: metrics to compute; None for those that are computed by default.
        missing: "error", or "count" to score a reference without a prediction as an empty prediction.
        num_threads: cases in work at a time.
        progress: called with (cases done, cases in all) after each case.
    Raises:
        MedsegError: E_MISSING for cases without a partner, E_NO_CASES, E_DUPLICATE_ID, E_GRID, E_LABEL, and what
            reading the files raises. No case is left out silently.
    """
    pairs = match_pairs(predicted, reference, missing=missing)
    if labels is None:
        labels = labels_of(predicted, reference, [pair.reference for pair in pairs])
    table = labels

    def evaluate(pair: Pair) -> tuple[list[Row], str]:
        truth = open_label(pair.reference)
        if pair.predicted is None:
            prediction = Volume(table.to_values(np.zeros(truth.grid.shape, dtype=np.uint8)), truth.grid)
        else:
            prediction = open_label(pair.predicted)
        rows = evaluate_pair(prediction, truth, table, tolerance_mm=tolerance_mm, names=names, case=pair.case)
        return rows, truth.grid.frame

    results: dict[str, tuple[list[Row], str]] = {}
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        futures = {pool.submit(evaluate, pair): pair.case for pair in pairs}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                if progress is not None:
                    progress(len(results), len(pairs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    frames = {frame for _, frame in results.values()}
    if len(frames) > 1:
        raise MedsegError(
            Code.MIXED,
            "the folder mixes volumes and pictures, whose distances have no common unit",
            where=reference.name,
            remedy="evaluate them apart",
        )
    rows = tuple(row for pair in pairs for row in results[pair.case][0])
    return Evaluation(rows, labels, tolerance_mm, frames.pop())


def _aligned(predicted: Volume, grid: Grid, case: str) -> Volume:
    """The prediction with its axes in the order of `grid`."""
    if predicted.grid.difference(grid) is None:
        return predicted
    try:
        return predicted.oriented_as(grid)
    except MedsegError as error:
        raise MedsegError(
            Code.GRID,
            "prediction and reference do not lie on one grid",
            where=case,
            expected=f"{_describe(grid)} (reference)",
            got=f"{_describe(predicted.grid)} (prediction): {predicted.grid.difference(grid)}",
            remedy="predict on the scan's own grid, or resample the prediction with nearest neighbour",
        ) from error


def _describe(grid: Grid) -> str:
    spacing = " × ".join(f"{s:.4g}" for s in grid.spacing_mm)
    if grid.is_picture:
        return f"picture of shape {grid.shape}"
    return f"shape {grid.shape}, spacing {spacing} mm, orientation {grid.orientation}"


def _counts(rows: Sequence[Row]) -> dict[State, int]:
    return {state: sum(row.state is state for row in rows) for state in State}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _write_csv(path: Path, table: list[list[str]]) -> None:
    with whole_file(path, ".csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
