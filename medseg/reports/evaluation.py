"""`medseg evaluate PRED REF`: predictions against references, per case and class, and their summary.

Means over classes and cases: per class, the mean over the cases in which the metric is defined; over the foreground,
first the mean over the classes of a case, then over the cases, so that every case weighs the same. What empty masks
get is written in `medseg.metrics`; they are counted beside every mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np

from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading, open_label
from medseg.labels import Labels
from medseg.metrics.case import DEFAULT_TOLERANCE_MM, measure_case
from medseg.metrics.masks import State
from medseg.metrics.metric import Metric, metrics
from medseg.reports import calibrated
from medseg.reports.belonging import patients_by_case
from medseg.reports.confidence import Intervals, intervals
from medseg.reports.evaluation_files import write_files
from medseg.reports.pairs import (
    MissingPolicy,
    Pair,
    aligned,
    instance_labels,
    labels_of,
    match_pairs,
    numbered_instances,
)
from medseg.volume import WORLD_FRAME, Volume

FOREGROUND = "(foreground)"
"""The row of the summary that is the mean over the foreground classes; no class can be meant by it."""
DEFAULT_NUM_THREADS = 4
"""Cases in work at a time; each holds two label maps in memory."""

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
        calibrations: case id → how well its probabilities are calibrated, where they were given.
    """

    rows: tuple[Row, ...]
    labels: Labels
    tolerance_mm: float = DEFAULT_TOLERANCE_MM
    frame: str = WORLD_FRAME
    patients: Mapping[str, str] = field(default_factory=dict)
    calibrations: Mapping[str, calibrated.CaseCalibration] = field(default_factory=dict)

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
        """Write `metrics.csv` (per case and class), `summary.csv`, with probabilities `calibration.csv`, and
        `metrics.json` (everything, with definitions).

        Undefined values are empty cells and null.

        Raises:
            MedsegError: E_OUTPUT.
        """
        write_files(self, folder)

    def _summarize(self, class_name: str, rows: list[Row]) -> Summary:
        statistics = {m.name: Statistic.of([row.values[m.name] for row in rows]) for m in self.metrics}
        return Summary(class_name, _counts(rows), statistics)


def evaluate_pair(
    predicted: Volume,
    reference: Volume,
    labels: Labels,
    *,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    names: Sequence[str] | None = None,
    case: str = "",
    instances: bool = False,
) -> list[Row]:
    """Measure one prediction.

    Args:
        predicted: label map with the values of files, on the reference's grid; its axes may be flipped or permuted.
        reference: label map with the values of files.
        labels: what the values mean.
        tolerance_mm: what the surface Dice forgives (pixels for pictures).
        names: metrics to compute; None for those that are computed by default.
        case: id for the rows and for messages.
        instances: the values of the files number instances of the one foreground class.
    Returns:
        One row per foreground class, or per region where there are regions. Voxels whose reference is ignored are left
        out.
    Raises:
        MedsegError: E_GRID if the two do not lie on one grid, E_LABEL for values that `labels` does not know.
    """
    predicted = aligned(predicted, reference.grid, case)
    numbering = replace(labels, ignore=()) if instances else labels  # any number may be one of the prediction's
    indices = (
        numbering.to_index(predicted.array, where=f"{case} (prediction)"),
        labels.to_index(reference.array, where=f"{case} (reference)"),
    )
    results = measure_case(
        *indices,
        reference.grid,
        num_classes=labels.num_classes,
        regions=labels.regions,
        tolerance_mm=tolerance_mm,
        names=names,
        instances=numbered_instances((predicted, reference), indices) if instances else None,
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
    reading: Reading = STRICT,
    instances: bool = False,
    probabilities: Path | None = None,
    patients: Path | None = None,
) -> Evaluation:
    """Evaluate a folder of predictions, or one file, against references.

    Args:
        predicted: a label file, or a folder of them named by case ("case.nii.gz", "case_seg.nii.gz").
        reference: the same for the references; the file types may differ.
        labels: the classes; by default those that a table or a dataset.json beside the predictions or the references
            declares, else one class per value of the references.
        tolerance_mm: what the surface Dice forgives (pixels for pictures).
        names: metrics to compute; None for those that are computed by default.
        missing: what a reference without a prediction is (`match_pairs`).
        num_threads: cases in work at a time.
        progress: called with (cases done, cases in all) after each case.
        reading: what is asked of the readers beyond their strict defaults.
        instances: the values of the files number instances of one class, which the metrics that count take as they are.
        probabilities: what `medseg predict --probabilities` wrote of the cases: they are calibrated too.
        patients: table of the patient of each case; by default the manifest of the references' data set, else the
            cases' names tell, if anything does (`patients_by_case`).
    Raises:
        MedsegError: E_MISSING for cases without a partner, E_NO_CASES, E_DUPLICATE_ID, E_GRID, E_LABEL, and what
            reading the files raises. No case is left out silently.
    """
    pairs = match_pairs(predicted, reference, missing=missing)
    known = patients_by_case([pair.case for pair in pairs], reference, patients)
    if labels is None:
        labels = labels_of(
            predicted, reference, [pair.reference for pair in pairs], reading=reading, instances=instances
        )
    table = labels = instance_labels(labels) if instances else labels
    shares = None if probabilities is None else calibrated.Probabilities(probabilities, pairs[0].case)
    calibrations: dict[str, calibrated.CaseCalibration] = {}
    one_at_a_time = Lock()  # probabilities are large

    def evaluate(pair: Pair) -> tuple[list[Row], str]:
        truth = open_label(pair.reference, reading)
        if pair.predicted is None:
            prediction = Volume(table.to_values(np.zeros(truth.grid.shape, dtype=np.uint8)), truth.grid)
        else:
            prediction = open_label(pair.predicted, reading)
        if shares is not None and pair.predicted is None:
            calibrations[pair.case] = calibrated.CaseCalibration.missing()
        elif shares is not None:
            with one_at_a_time:
                found = shares.read(pair.case, reading)
                of_case = calibrated.calibrated(found, truth, table, pair.case, predicted=prediction)
            calibrations[pair.case] = of_case
        rows = evaluate_pair(
            prediction, truth, table, tolerance_mm=tolerance_mm, names=names, case=pair.case, instances=instances
        )
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
    in_order = {pair.case: calibrations[pair.case] for pair in pairs if pair.case in calibrations}
    return Evaluation(rows, labels, tolerance_mm, frames.pop(), known, in_order)


def _counts(rows: Sequence[Row]) -> dict[State, int]:
    return {state: sum(row.state is state for row in rows) for state in State}
