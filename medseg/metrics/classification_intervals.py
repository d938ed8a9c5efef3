"""Intervals of what `medseg.metrics.classification` measures. The unit is the patient: cases of one go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.metrics.classification import SUMMARIES, FloatArray, auc, midranks, summarise

LEVEL = 0.95
NUM_RESAMPLES = 2000
"""Draws of a bootstrap: its ends are quantiles at 2.5 and 97.5 %, which 50 draws lie beyond."""
NO_SPREAD = "no interval: every draw of a bootstrap is the same, which says nothing of other patients"
ONE_PATIENT = "no interval: all cases are of one patient"
ROUNDING = 1e-12
"""Ends of an interval that are nearer than this are one."""


@dataclass(frozen=True)
class Estimate:
    """A number and where it may lie for other patients of the same kind.

    Args:
        value: NaN where it is undefined.
        low: lower end of the 95 % interval; NaN where there is none.
        high: upper end.
        reason: why the value is undefined, or has no interval.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    reason: str = ""

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "–"
        return f"{self.value:.3f}" + ("" if math.isnan(self.low) else f" ({self.low:.3f}–{self.high:.3f})")


def auc_interval(
    positive: ArrayLike, scores: ArrayLike, patients: Sequence[str] | None = None, *, level: float = LEVEL
) -> Estimate:
    """Area under the ROC curve with its interval, on the logit scale, so that it stays within 0 and 1.

    Args:
        positive: bool, shape (N,).
        scores: shape (N,).
        patients: whose each case is; None: each of its own.
        level: of the interval.
    Source:
        DeLong, DeLong, Clarke-Pearson: Comparing the areas under two or more correlated ROC curves, Biometrics 1988;
        for several cases of a patient Obuchowski: Nonparametric analysis of clustered ROC curve data, Biometrics 1997,
        which is DeLong's variance where each patient has one case. Where all positive cases score above all negative
        ones that variance is 0 and says nothing: then the interval of Newcombe, Statistics in Medicine 2006, method 5,
        over the numbers of patients.
    """
    truth, values = np.asarray(positive, dtype=bool), np.asarray(scores, dtype=np.float64)
    num_positive, num_negative = int(truth.sum()), int((~truth).sum())
    if not num_positive or not num_negative:
        which = "positive" if not num_positive else "negative"
        return Estimate(math.nan, reason=f"there is no {which} case")
    area = auc(truth, values)
    _, of_case = np.unique(np.arange(len(truth)) if patients is None else np.asarray(patients), return_inverse=True)
    variance = _auc_variance(truth, values, of_case, area)
    z = _quantile(level)
    if area in (0.0, 1.0) or not variance > 0:
        clusters = [len(np.unique(of_case[chosen])) for chosen in (truth, ~truth)]
        return Estimate(area, *_newcombe(area, clusters[0], clusters[1], z))
    logit, error = math.log(area / (1 - area)), math.sqrt(variance) / (area * (1 - area))
    low, high = (1 / (1 + math.exp(-(logit + side * z * error))) for side in (-1, 1))
    return Estimate(area, low, high)


def _auc_variance(truth: NDArray[np.bool_], scores: FloatArray, of_case: NDArray[np.int64], area: float) -> float:
    """Obuchowski's variance; NaN where one patient has all cases of a kind."""
    num_positive, num_negative = int(truth.sum()), int((~truth).sum())
    ranks = midranks(scores)
    # Share of the negative cases that a positive one beats, and of the positive cases that beat a negative one
    beats = (ranks[truth] - midranks(scores[truth])) / num_negative
    beaten = 1 - (ranks[~truth] - midranks(scores[~truth])) / num_positive
    num_patients = int(of_case.max()) + 1
    above, below = np.zeros(num_patients), np.zeros(num_patients)
    np.add.at(above, of_case[truth], beats - area)
    np.add.at(below, of_case[~truth], beaten - area)
    with_positive, with_negative = len(np.unique(of_case[truth])), len(np.unique(of_case[~truth]))
    if with_positive < 2 or with_negative < 2:
        return math.nan
    s10 = with_positive / ((with_positive - 1) * num_positive) * float(above @ above)
    s01 = with_negative / ((with_negative - 1) * num_negative) * float(below @ below)
    s11 = num_patients / (num_patients - 1) * float(above @ below)
    return s10 / num_positive + s01 / num_negative + 2 * s11 / (num_positive * num_negative)


def _newcombe(area: float, num_positive: int, num_negative: int, z: float) -> tuple[float, float]:
    """Ends of Newcombe's method 5: the areas at which the one found is just z deviations away."""
    from scipy.optimize import brentq  # half a second of imports, which only tables of results wait for

    star = (num_positive + num_negative) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + star * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (area - theta) ** 2 - z**2 * theta * (1 - theta) * spread / (num_positive * num_negative)

    inside = min(max(area, 1e-9), 1 - 1e-9)
    low = 0.0 if excess(1e-9) <= 0 else float(brentq(excess, 1e-9, inside)) if area > 0 else 0.0
    high = 1.0 if excess(1 - 1e-9) <= 0 else float(brentq(excess, inside, 1 - 1e-9)) if area < 1 else 1.0
    return min(low, area), max(high, area)


def proportion(successes: int, trials: int, *, level: float = LEVEL, what: str = "case") -> Estimate:
    """A share of independent cases with Wilson's interval.

    Source:
        Wilson: Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    if not trials:
        return Estimate(math.nan, reason=f"there is no such {what}")
    return _wilson(successes / trials, trials, level)


def _wilson(share: float, trials: int, level: float) -> Estimate:
    z = _quantile(level)
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return Estimate(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def with_interval(value: float, low: float, high: float) -> Estimate:
    """A value with the ends that a bootstrap gave; without them where all draws are the same, because an interval of
    no width would claim certainty. NaN ends are none."""
    if math.isnan(low) or high - low > ROUNDING:
        return Estimate(value, low, high)
    return Estimate(value, reason=NO_SPREAD)


def clustered_proportion(
    successes: ArrayLike, of_trials: ArrayLike, patients: Sequence[str], *, seed: int = 0, level: float = LEVEL
) -> Estimate:
    """A share of cases of which some are of one patient: percentiles of a bootstrap over patients.

    Where all patients have the same share (all are right, say), a bootstrap knows no spread: then Wilson's interval, as
    if each patient were one case.

    Args:
        successes: bool, shape (N,).
        of_trials: bool, shape (N,): which cases count at all.
        patients: whose each case is.
        seed: of the draws.
        level: of the interval.
    """
    trials = np.asarray(of_trials, dtype=bool)
    hits = np.asarray(successes, dtype=bool) & trials
    if not trials.any():
        return Estimate(math.nan, reason="there is no such case")
    value = float(hits.sum() / trials.sum())
    _, of_case = np.unique(np.asarray(patients)[trials], return_inverse=True)
    if of_case.max() == 0:
        return Estimate(value, reason=ONE_PATIENT)
    counts = np.zeros((int(of_case.max()) + 1, 2))
    np.add.at(counts, of_case, np.stack([hits[trials], trials[trials]], axis=1).astype(np.float64))
    drawn = _times(len(counts), seed) @ counts
    low, high = _percentiles(drawn[:, 0] / np.maximum(drawn[:, 1], 1), level)
    return Estimate(value, low, high) if high - low > ROUNDING else _wilson(value, len(counts), level)


def summary_intervals(
    truth: ArrayLike,
    predicted: ArrayLike,
    num_classes: int,
    patients: Sequence[str] | None = None,
    *,
    seed: int = 0,
    level: float = LEVEL,
) -> list[Estimate]:
    """What `summarise` finds, with percentiles of a bootstrap over patients. In the order of `SUMMARIES`.

    Where all draws are the same (all is right), accuracy has Wilson's interval over the number of patients, and the
    others have none.

    Args:
        truth: class indices, shape (N,).
        predicted: class indices, shape (N,).
        num_classes: K.
        patients: whose each case is; None: each of its own.
        seed: of the draws.
        level: of the intervals.
    """
    actual, called = np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    if not len(actual):
        return [Estimate(math.nan, reason="there is no case")] * 4
    _, of_case = np.unique(np.arange(len(actual)) if patients is None else np.asarray(patients), return_inverse=True)
    matrices = np.zeros((int(of_case.max()) + 1, num_classes**2))
    np.add.at(matrices, (of_case, actual * num_classes + called), 1)
    shape = (-1, num_classes, num_classes)
    values = summarise(matrices.sum(axis=0).reshape(shape[1:]))
    reason = "chance alone explains the agreement"
    if len(matrices) < 2:
        return [Estimate(float(v), reason=reason if math.isnan(v) else ONE_PATIENT) for v in values]
    drawn = summarise((_times(len(matrices), seed) @ matrices).reshape(shape))
    found = [
        with_interval(float(value), *_percentiles(drawn[:, k], level))
        if not math.isnan(value)
        else Estimate(math.nan, reason=reason)
        for k, value in enumerate(values)
    ]
    share = SUMMARIES.index("accuracy")
    if found[share].reason == NO_SPREAD:
        found[share] = _wilson(found[share].value, len(matrices), level)
    return found


def macro_auc_interval(
    probabilities: ArrayLike,
    truth: ArrayLike,
    patients: Sequence[str] | None = None,
    *,
    seed: int = 0,
    level: float = LEVEL,
) -> Estimate:
    """Mean area of each class against the rest: percentiles of a bootstrap over patients, drawn within each class.

    A patient with cases of several classes is drawn with the class of the first. Where all draws are the same (all are
    told apart) there is no interval.
    """
    from medseg.metrics.classification import macro_auc

    table, classes = np.asarray(probabilities, dtype=np.float64), np.asarray(truth, dtype=np.int64)
    value = macro_auc(table, classes)
    if math.isnan(value):
        return Estimate(value, reason="no class has cases both in it and out of it")
    if table.shape[1] == 2:
        return auc_interval(classes == 1, table[:, 1], patients, level=level)
    _, first, of_case = np.unique(
        np.arange(len(classes)) if patients is None else np.asarray(patients), return_index=True, return_inverse=True
    )
    cases_of = [np.flatnonzero(of_case == number) for number in range(len(first))]
    strata = [np.flatnonzero(classes[first] == k) for k in range(table.shape[1])]
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(NUM_RESAMPLES // 4):
        chosen = np.concatenate([random.choice(s, len(s)) for s in strata if len(s)])
        rows = np.concatenate([cases_of[number] for number in chosen])
        drawn.append(macro_auc(table[rows], classes[rows]))
    return with_interval(value, *_percentiles(np.array(drawn), level))


def _times(num_patients: int, seed: int) -> FloatArray:
    """How often each patient is drawn, shape (draws, patients)."""
    random = np.random.default_rng(seed)
    drawn = random.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=NUM_RESAMPLES)
    return drawn.astype(np.float64)


def _percentiles(drawn: FloatArray, level: float) -> tuple[float, float]:
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _quantile(level: float) -> float:
    """Of the normal distribution: 1.96 for 95 %."""
    from statistics import NormalDist

    return NormalDist().inv_cdf((1 + level) / 2)
