"""How well scores tell classes apart: ROC curves, operating points, confusion matrices and what follows from them.

Classes are indices, scores are probabilities (N, K) or one number per case, larger where the class is likelier. What
cannot be computed (a class without cases) is NaN, and `undefined` says why; nothing here raises for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.errors import Code, MedsegError

FloatArray = NDArray[np.float64]
_RULE = re.compile(r"(sensitivity|specificity)\s*>=\s*([0-9.]+)|threshold\s*=\s*([0-9.]+)")


@dataclass(frozen=True, eq=False)
class Roc:
    """A ROC curve, from the strictest threshold to the one that calls every case positive.

    Args:
        thresholds: descending; a case is positive where its score is at least the threshold. The first is infinite.
        sensitivity: share of the positive cases that are called so; NaN without positive cases.
        fall_out: share of the negative cases that are called positive (1 - specificity); NaN without negative cases.
    """

    thresholds: FloatArray
    sensitivity: FloatArray
    fall_out: FloatArray


def roc(positive: ArrayLike, scores: ArrayLike) -> Roc:
    """The ROC curve of scores, with a point for each score that occurs.

    Args:
        positive: bool, shape (N,).
        scores: shape (N,).
    """
    truth, values = np.asarray(positive, dtype=bool), np.asarray(scores, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    truth, values = truth[order], values[order]
    last = np.flatnonzero(np.append(np.diff(values) != 0, True)) if len(values) else np.zeros(0, dtype=int)
    hits, alarms = np.cumsum(truth)[last], np.cumsum(~truth)[last]
    return Roc(
        np.concatenate([[np.inf], values[last]]),
        _shares(np.concatenate([[0], hits]), int(truth.sum())),
        _shares(np.concatenate([[0], alarms]), int((~truth).sum())),
    )


def auc(positive: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: how often a positive case scores higher than a negative one; ties count half.

    Returns:
        NaN where one of both kinds is missing.
    Source:
        Hanley, McNeil: The meaning and use of the area under a ROC curve, Radiology 1982.
    """
    truth, values = np.asarray(positive, dtype=bool), np.asarray(scores, dtype=np.float64)
    num_positive, num_negative = int(truth.sum()), int((~truth).sum())
    if not num_positive or not num_negative:
        return math.nan
    rank_sum = float(midranks(values)[truth].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def midranks(values: FloatArray) -> FloatArray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: FloatArray = ends - (counts - 1) / 2
    return means[inverse]


def undefined(truth: ArrayLike, names: Sequence[str]) -> dict[str, str]:
    """Class → why its curve is not defined, for those that have none.

    Args:
        truth: class indices, shape (N,).
        names: of the classes.
    """
    counts = np.bincount(np.asarray(truth, dtype=np.int64), minlength=len(names))
    reasons = {}
    for name, count in zip(names, counts.tolist(), strict=True):
        if count == 0:
            reasons[name] = "no case has this class"
        elif count == counts.sum():
            reasons[name] = "all cases have this class"
    return reasons


@dataclass(frozen=True)
class OperatingPoint:
    """How a threshold is chosen.

    Args:
        kind: youden: where sensitivity + specificity is largest; sensitivity, specificity: the best other one among
            the thresholds at which this one is at least `value`; threshold: `value` itself.
        value: between 0 and 1; nothing for youden.
    """

    kind: Literal["youden", "sensitivity", "specificity", "threshold"]
    value: float = math.nan

    @classmethod
    def parse(cls, text: str, *, where: str = "operating point") -> OperatingPoint:
        """From a user's words: youden, sensitivity>=0.95, specificity>=0.9, threshold=0.3.

        Raises:
            MedsegError: E_CONFIG.
        """
        plain = text.strip().lower()
        match = _RULE.fullmatch(plain)
        if plain == "youden":
            return cls("youden")
        value = float(match[2] or match[3]) if match and re.fullmatch(r"\d*\.?\d+", match[2] or match[3]) else math.nan
        if match is None or not 0 <= value <= 1:
            raise MedsegError(
                Code.CONFIG,
                "an operating point that is not understood",
                where=where,
                expected="youden, sensitivity>=0.95, specificity>=0.9 or threshold=0.3",
                got=repr(text),
                remedy="write one of these forms, with a number between 0 and 1",
            )
        kind: Literal["sensitivity", "specificity", "threshold"] = (
            "threshold" if match[1] is None else "sensitivity" if match[1] == "sensitivity" else "specificity"
        )
        return cls(kind, value)

    def __str__(self) -> str:
        if self.kind == "youden":
            return "youden"
        return f"{self.kind}{'=' if self.kind == 'threshold' else '>='}{self.value:g}"


def choose_threshold(point: OperatingPoint, positive: ArrayLike, scores: ArrayLike) -> float:
    """The threshold of an operating point on some cases. Score others with it, never the same ones.

    Between two scores that are neighbours the threshold lies in the middle, so that a new case near either is decided
    evenly.

    Args:
        point: the rule.
        positive: bool, shape (N,).
        scores: probabilities of the class, shape (N,).
    Returns:
        NaN where the cases do not tell it: one of both kinds is missing, or no threshold keeps the rule.
    Source:
        Youden: Index for rating diagnostic tests, Cancer 1950.
    """
    if point.kind == "threshold":
        return point.value
    curve = roc(positive, scores)
    if np.isnan(curve.sensitivity).any() or np.isnan(curve.fall_out).any():
        return math.nan
    specificity = 1 - curve.fall_out
    rounding = 1e-12
    if point.kind == "youden":
        worth, allowed = curve.sensitivity + specificity, np.ones(len(specificity), dtype=bool)
    elif point.kind == "sensitivity":
        worth, allowed = specificity, curve.sensitivity >= point.value - rounding
    else:
        worth, allowed = curve.sensitivity, specificity >= point.value - rounding
    if not allowed.any():
        return math.nan
    # Of equally good ones the strictest
    best = int(np.argmax(np.where(allowed, worth, -np.inf)))
    above = curve.thresholds[best]
    below = curve.thresholds[best + 1] if best + 1 < len(curve.thresholds) else 0.0
    if math.isinf(above):  # nothing is called positive
        return float(np.nextafter(below, np.inf)) if below >= 1 else (1 + float(below)) / 2
    return (float(above) + float(below)) / 2


@dataclass(frozen=True)
class Counts:
    """Decisions about one class: true and false positives and negatives."""

    tp: int
    fp: int
    tn: int
    fn: int

    @classmethod
    def of(cls, positive: ArrayLike, called: ArrayLike) -> Counts:
        """From what is and what was decided, both bool (N,)."""
        truth, decided = np.asarray(positive, dtype=bool), np.asarray(called, dtype=bool)
        hits = int((truth & decided).sum())
        return cls(hits, int(decided.sum()) - hits, int((~truth & ~decided).sum()), int(truth.sum()) - hits)

    def ratios(self) -> dict[str, tuple[int, int]]:
        """Name → (successes, trials) of each share."""
        return {
            "sensitivity": (self.tp, self.tp + self.fn),
            "specificity": (self.tn, self.tn + self.fp),
            "ppv": (self.tp, self.tp + self.fp),
            "npv": (self.tn, self.tn + self.fn),
            "accuracy": (self.tp + self.tn, self.tp + self.fp + self.tn + self.fn),
        }


def confusion(truth: ArrayLike, predicted: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Numbers of cases, shape (K, K): rows are the classes that are, columns those that were predicted."""
    joint = np.asarray(truth, dtype=np.int64) * num_classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(joint, minlength=num_classes**2).reshape(num_classes, num_classes)


SUMMARIES = ("accuracy", "balanced_accuracy", "macro_f1", "kappa")
"""What a confusion matrix comes to, in the order of `summarise`."""


def summarise(matrices: ArrayLike) -> FloatArray:
    """Accuracy, balanced accuracy (mean recall), macro F1 and Cohen's kappa of confusion matrices.

    Classes without a case, in truth and prediction, are left out of the means; recall of a class that no case has is
    left out too, as in scikit-learn.

    Args:
        matrices: counts, shape (..., K, K).
    Returns:
        Shape (..., 4), as `SUMMARIES`; NaN where nothing is defined (no case; kappa where chance explains all).
    """
    table = np.asarray(matrices, dtype=np.float64)
    right = np.einsum("...kk->...k", table)
    actual, called, total = table.sum(-1), table.sum(-2), table.sum((-1, -2))
    with np.errstate(divide="ignore", invalid="ignore"):
        accuracy = right.sum(-1) / total
        recall, f1 = right / actual, 2 * right / (actual + called)
        chance = (actual * called).sum(-1) / total**2
        kappa = np.where(chance < 1, (accuracy - chance) / (1 - chance), np.nan)
    return np.stack([accuracy, _mean(recall), _mean(f1), kappa], axis=-1)


def brier(probabilities: ArrayLike, truth: ArrayLike) -> FloatArray:
    """Squared distance of each case's probabilities from what is, summed over the classes, shape (N,): 0 is best,
    2 worst. Of two classes it is twice what is called the Brier score of the positive one.

    Source:
        Brier: Verification of forecasts expressed in terms of probability, Monthly Weather Review 1950.
    """
    table = np.asarray(probabilities, dtype=np.float64)
    one_hot = np.eye(table.shape[1])[np.asarray(truth, dtype=np.int64)]
    squares: FloatArray = ((table - one_hot) ** 2).sum(axis=1)
    return squares


def macro_auc(probabilities: ArrayLike, truth: ArrayLike) -> float:
    """Mean of the areas of each class against the rest, over the classes where it is defined; of two classes there is
    one area. NaN where none is defined."""
    table, classes = np.asarray(probabilities, dtype=np.float64), np.asarray(truth)
    if table.shape[1] == 2:
        return auc(classes == 1, table[:, 1])
    areas = [auc(classes == k, table[:, k]) for k in range(table.shape[1])]
    defined = [area for area in areas if not math.isnan(area)]
    return float(np.mean(defined)) if defined else math.nan


def _shares(counts: NDArray[np.int64], total: int) -> FloatArray:
    return counts / total if total else np.full(len(counts), math.nan)


def _mean(values: FloatArray) -> FloatArray:
    """Over the last axis, NaN left out."""
    present = ~np.isnan(values)
    count = present.sum(-1)
    total = np.where(present, values, 0).sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
