"""How good predictions of images are: curves, operating points, confusion and calibration, with intervals."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.classification.bundle import Thresholds
from medseg.formats.atomic import whole_file
from medseg.metrics.calibration import Calibration, calibration
from medseg.metrics.classification import (
    SUMMARIES,
    Counts,
    OperatingPoint,
    Roc,
    brier,
    choose_threshold,
    confusion,
    roc,
    undefined,
)
from medseg.metrics.classification_intervals import (
    Estimate,
    auc_interval,
    clustered_proportion,
    macro_auc_interval,
    proportion,
    summary_intervals,
    with_interval,
)
from medseg.statistics import bootstrap_means

NUM_PARTS = 10
"""Parts of the validation images of which each is decided by a threshold that the others gave."""
METRICS_FILE, POINTS_FILE, CONFUSION_FILE, ROC_FILE = "metrics.json", "operating_points.csv", "confusion.csv", "roc.csv"
RATIOS = ("sensitivity", "specificity", "ppv", "npv", "accuracy")
CHOSEN_BEFORE = "chosen on other images (the validation images of the training)"
CROSS_FITTED = (
    f"for each tenth of these images chosen on the other {NUM_PARTS - 1} tenths, by patient; the threshold that stands "
    "here is that of all of them"
)

VAL, TRAIN, NEW = "val", "train", "new"
"""Sides of a run's split that thresholds and weights were chosen on; and images that the run has never seen."""


def thresholds_for(
    cases: Sequence[str], thresholds: Thresholds, sides: Mapping[str, str] | None
) -> tuple[Thresholds | None, tuple[str, ...]]:
    """The thresholds of a run, if none of some cases had a part in choosing them.

    Args:
        cases: ids.
        thresholds: that the validation images of the run gave.
        sides: case → "train", "val" or "test" of the run, or "new"; None where nobody knows.
    Returns:
        The thresholds, or None where `ClassificationEvaluation` must choose its own by cross-fitting; and what readers
        of the numbers must know.
    """
    of_case = [None if sides is None else sides.get(case) for case in cases]
    validated, trained = of_case.count(VAL), of_case.count(TRAIN)
    remarks = []
    if trained:
        remarks.append(f"{trained} of {len(cases)} images trained the network: what they say is too good")
    if validated:
        remarks.append(
            f"{validated} of {len(cases)} images validated the training, and its weights and thresholds were chosen on "
            "them: what they say is too good; the thresholds are not taken, but chosen by cross-fitting"
        )
    if thresholds and None in of_case:
        remarks.append(
            "which images the thresholds of the predictions were chosen on is not known: they are not taken, but "
            "chosen by cross-fitting"
        )
    return (None if validated or None in of_case or not thresholds else thresholds), tuple(remarks)


@dataclass(frozen=True)
class PointScores:
    """A class at an operating point.

    Args:
        class_name: which class against the rest.
        point: the rule in words; "most probable" for the decision by the largest probability.
        threshold: of the probability; NaN where there is none.
        counts: decisions.
        values: of `RATIOS`.
        note: why it is not there.
    """

    class_name: str
    point: str
    threshold: float
    counts: Counts
    values: Mapping[str, Estimate]
    note: str = ""


@dataclass(frozen=True, eq=False)
class ClassificationEvaluation:
    """Predictions compared with what is.

    Args:
        cases: ids.
        truth: class indices, shape (N,).
        probabilities: shape (N, K).
        classes: names.
        patients: case → patient, for cases whose patient is known.
        thresholds: that were chosen on other images; None: none are known, and `points` are cross-fitted.
        points: operating points that are scored by cross-fitting where `thresholds` is None.
        seed: of bootstraps.
        remarks: what a reader of the numbers must know of the cases.
    """

    cases: Sequence[str]
    truth: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    classes: tuple[str, ...]
    patients: Mapping[str, str] = field(default_factory=dict)
    thresholds: Thresholds | None = None
    points: tuple[str, ...] = ()
    seed: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def shown(self) -> tuple[str, ...]:
        """The classes whose curves are shown: of two the positive one, else all."""
        return self.classes[1:] if len(self.classes) == 2 else self.classes

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each case."""
        decided: NDArray[np.int64] = self.probabilities.argmax(axis=1).astype(np.int64)
        return decided

    @cached_property
    def clusters(self) -> list[str] | None:
        """The patient of each case; None where each case is a patient of its own."""
        names = [f"patient {self.patients[c]}" if c in self.patients else f"case {c}" for c in self.cases]
        return None if len(set(names)) == len(names) else names

    @property
    def num_patients(self) -> int:
        """How many patients there are; of unknown ones each case counts."""
        return len(set(self.clusters)) if self.clusters is not None else len(self.cases)

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """Shape (K, K): rows are what is, columns what was predicted."""
        return confusion(self.truth, self.predicted, len(self.classes))

    @cached_property
    def undefined(self) -> dict[str, str]:
        """Class → why it has no curve."""
        return undefined(self.truth, self.classes)

    def curve(self, name: str) -> Roc:
        """The ROC curve of a class against the rest."""
        number = self.classes.index(name)
        return roc(self.truth == number, self.probabilities[:, number])

    @cached_property
    def aucs(self) -> dict[str, Estimate]:
        """Areas of the shown classes against the rest, and "macro", their mean, where there are several."""
        found = {}
        for name in self.shown:
            number = self.classes.index(name)
            found[name] = auc_interval(self.truth == number, self.probabilities[:, number], self.clusters)
        if len(self.shown) > 1:
            found["macro"] = macro_auc_interval(self.probabilities, self.truth, self.clusters, seed=self.seed)
        return found

    @cached_property
    def calibration(self) -> Calibration:
        """Cases by the probability of their predicted class."""
        shares = self.probabilities / self.probabilities.sum(axis=1, keepdims=True)
        return calibration(list(shares.T), self.truth.astype(np.int64))

    @cached_property
    def summary(self) -> dict[str, Estimate]:
        """`SUMMARIES`, the Brier score and the expected calibration error."""
        found = dict(
            zip(
                SUMMARIES,
                summary_intervals(self.truth, self.predicted, len(self.classes), self.clusters, seed=self.seed),
                strict=True,
            )
        )
        if not len(self.truth):
            return {**found, "brier": Estimate(math.nan), "ece": Estimate(math.nan)}
        (mean,) = bootstrap_means(brier(self.probabilities, self.truth), self.clusters, seed=self.seed)
        brier_score = with_interval(mean.mean, mean.low, mean.high)
        return {**found, "brier": brier_score, "ece": Estimate(self.calibration.ece)}

    @cached_property
    def decisions(self) -> list[PointScores]:
        """Each shown class by the largest probability, then at each operating point."""
        return [
            *(
                self._scores(name, "most probable", math.nan, self.predicted == self.classes.index(name))
                for name in self.shown
            ),
            *(row for name in self.shown for row in self._at_points(name)),
        ]

    def _at_points(self, name: str) -> list[PointScores]:
        number = self.classes.index(name)
        scores, positive = self.probabilities[:, number], self.truth == number
        if self.thresholds is not None:
            known = self.thresholds.get(name, {})
            return [self._scores(name, point, threshold, scores >= threshold) for point, threshold in known.items()]
        rows = []
        for text in self.points:
            point = OperatingPoint.parse(text)
            threshold = choose_threshold(point, positive, scores)
            called, is_decided = self._cross_fitted(point, positive, scores)
            if math.isnan(threshold) or not is_decided:
                nothing = dict.fromkeys(RATIOS, Estimate(math.nan, reason="too few images to choose a threshold"))
                rows.append(
                    PointScores(name, str(point), threshold, Counts(0, 0, 0, 0), nothing, "too few images to choose it")
                )
            else:
                rows.append(self._scores(name, str(point), threshold, called))
        return rows

    def _cross_fitted(
        self, point: OperatingPoint, positive: NDArray[np.bool_], scores: NDArray[np.float64]
    ) -> tuple[NDArray[np.bool_], bool]:
        """Decisions by thresholds that were chosen on other patients, and whether all could be."""
        _, of_case = np.unique(self.clusters or np.arange(len(scores)).astype(str), return_inverse=True)
        part_of = np.random.default_rng(self.seed).permutation(int(of_case.max(initial=-1)) + 1) % NUM_PARTS
        part, called = part_of[of_case], np.zeros(len(scores), dtype=bool)
        for number in np.unique(part):
            inside = part == number
            threshold = choose_threshold(point, positive[~inside], scores[~inside])
            if math.isnan(threshold):
                return called, False
            called[inside] = scores[inside] >= threshold
        return called, bool(len(scores))

    def _scores(self, name: str, point: str, threshold: float, called: NDArray[np.bool_]) -> PointScores:
        positive = self.truth == self.classes.index(name)
        counts = Counts.of(positive, called)
        if self.clusters is None:
            values = {ratio: proportion(hits, trials) for ratio, (hits, trials) in counts.ratios().items()}
        else:
            trials = {"sensitivity": positive, "specificity": ~positive, "ppv": called, "npv": ~called}
            values = {
                ratio: clustered_proportion(
                    called == positive, trials.get(ratio, np.ones_like(called)), self.clusters, seed=self.seed
                )
                for ratio in RATIOS
            }
        return PointScores(name, point, threshold, counts, values)

    @property
    def how_chosen(self) -> str:
        """Where the thresholds come from."""
        return CROSS_FITTED if self.thresholds is None else CHOSEN_BEFORE

    def choose_thresholds(self) -> dict[str, dict[str, float]]:
        """The thresholds that these cases give: for other cases. What they do not tell is left out."""
        found: dict[str, dict[str, float]] = {}
        for name in self.shown:
            number = self.classes.index(name)
            scores, positive = self.probabilities[:, number], self.truth == number
            points = [OperatingPoint.parse(text) for text in self.points]
            chosen = {str(point): choose_threshold(point, positive, scores) for point in points}
            found[name] = {point: value for point, value in chosen.items() if not math.isnan(value)}
        return found

    def worst(self, number: int) -> list[int]:
        """Cases whose class got the least probability, the worst first."""
        of_truth = self.probabilities[np.arange(len(self.truth)), self.truth]
        return [int(i) for i in np.argsort(of_truth, kind="stable")[:number]]

    def to_json(self) -> dict[str, Any]:
        """As plain values; NaN is null."""
        return {
            "num_cases": len(self.cases),
            "num_patients": self.num_patients,
            "patients_known": bool(self.patients),
            "classes": list(self.classes),
            "counts": {name: int(n) for name, n in zip(self.classes, self.confusion.sum(axis=1), strict=True)},
            "auc": {name: _plain(one) for name, one in self.aucs.items()},
            "undefined": self.undefined,
            "summary": {name: _plain(one) for name, one in self.summary.items()},
            "thresholds": self.how_chosen,
            "remarks": list(self.remarks),
            "decisions": [
                {
                    "class": row.class_name,
                    "point": row.point,
                    "threshold": None if math.isnan(row.threshold) else row.threshold,
                    **asdict(row.counts),
                    **{name: _plain(one) for name, one in row.values.items()},
                }
                for row in self.decisions
            ],
            "confusion": self.confusion.tolist(),
        }

    def write(self, folder: Path) -> None:
        """Write metrics.json, operating_points.csv, confusion.csv and roc.csv.

        Raises:
            MedsegError: E_OUTPUT.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / METRICS_FILE, ".json") as temporary:
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        header = ["class", "operating_point", "threshold", "tp", "fp", "tn", "fn"]
        header += [f"{name}{end}" for name in RATIOS for end in ("", "_low", "_high")]
        rows = [
            [
                row.class_name,
                row.point,
                _cell(row.threshold),
                *(row.counts.tp, row.counts.fp, row.counts.tn, row.counts.fn),
                *(
                    _cell(v)
                    for name in RATIOS
                    for v in (row.values[name].value, row.values[name].low, row.values[name].high)
                ),
            ]
            for row in self.decisions
        ]
        write_csv(folder / POINTS_FILE, [header, *rows])
        matrix = [[name, *map(int, row)] for name, row in zip(self.classes, self.confusion, strict=True)]
        write_csv(folder / CONFUSION_FILE, [["is \\ predicted", *self.classes], *matrix])
        curves = [["class", "threshold", "sensitivity", "specificity"]]
        for name in self.shown:
            curve = self.curve(name)
            for threshold, sensitivity, fall_out in zip(
                curve.thresholds, curve.sensitivity, curve.fall_out, strict=True
            ):
                curves.append([name, *map(_cell, (threshold, sensitivity, 1 - fall_out))])
        write_csv(folder / ROC_FILE, curves)


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Write a table, whole or not at all."""
    with whole_file(path, ".csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _plain(one: Estimate) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: None if math.isnan(value) else value
        for name, value in (("value", one.value), ("low", one.low), ("high", one.high))
    }
    return {**found, "reason": one.reason} if one.reason else found


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
