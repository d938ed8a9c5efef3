"""What numbers over cases can claim: intervals of means, agreement of volumes, tests between two models.

The unit is the patient: cases of one patient are drawn together, and count once in a test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
"""Of intervals, and 1 - LEVEL of tests."""
NUM_RESAMPLES = 10_000
FEW_PATIENTS = 50
"""With fewer, intervals are warned about: a bootstrap cannot know what the few patients do not show."""
_DRAWS_PER_CHUNK = 2**22
"""Numbers of draws in memory at a time: 32 MiB."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over cases, and where it may lie for other patients of the same kind.

    Args:
        mean: over the cases where the value is defined; NaN without any.
        low: lower end of the interval; NaN with fewer than two patients.
        high: upper end.
        num_patients: number of patients with a value.
    """

    mean: float
    low: float
    high: float
    num_patients: int

    @property
    def warning(self) -> str | None:
        """What to tell readers of the interval, if anything."""
        if self.num_patients >= FEW_PATIENTS:
            return None
        return f"from {self.num_patients} patients: intervals from fewer than {FEW_PATIENTS} tend to be too narrow"


def bootstrap_means(
    values: ArrayLike,
    patients: Sequence[str] | None = None,
    *,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Confidence intervals of means over cases, by drawing patients with replacement.

    Args:
        values: shape (cases,) or (cases, quantities); NaN where a quantity is undefined for a case.
        patients: the patient of each case; by default every case is a patient of its own.
        level: how often such an interval would hold the true mean.
        num_resamples: number of draws. All quantities share them.
        seed: of the draws: the same numbers give the same intervals.
    Returns:
        One interval per quantity.
    Source:
        Efron and Tibshirani, An introduction to the bootstrap, 1993, section 14.3: bias-corrected and accelerated
        intervals (BCa), as `scipy.stats.bootstrap`; the units drawn are patients (section 8.3: clusters).
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim == 1:
        table = table[:, None]
    _, of_case = np.unique(np.arange(len(table)) if patients is None else np.asarray(patients), return_inverse=True)
    num_patients = int(of_case.max()) + 1 if len(table) else 0
    defined = ~np.isnan(table)
    sums, counts = np.zeros((2, num_patients, table.shape[1]))
    np.add.at(sums, of_case, np.where(defined, table, 0))
    np.add.at(counts, of_case, defined)
    means = _ratio(sums.sum(axis=0), counts.sum(axis=0))
    with_value = np.count_nonzero(counts, axis=0)
    if num_patients < 2:
        return [Interval(float(m), math.nan, math.nan, int(n)) for m, n in zip(means, with_value, strict=True)]
    drawn = _draw(sums, counts, num_resamples, seed)
    # Leaving out one patient at a time tells how the spread changes with the mean (acceleration).
    without = _ratio(sums.sum(axis=0) - sums, counts.sum(axis=0) - counts)
    return [
        Interval(float(mean), *_bca(drawn[:, k], float(mean), without[counts[:, k] > 0, k], level), int(with_value[k]))
        for k, mean in enumerate(means)
    ]


def _draw(sums: FloatArray, counts: FloatArray, num_resamples: int, seed: int) -> FloatArray:
    """Means (resamples, quantities) over patients drawn with replacement; NaN where none with a value was drawn."""
    num_patients = len(sums)
    rng, rows = np.random.default_rng(seed), []
    for start in range(0, num_resamples, step := max(1, _DRAWS_PER_CHUNK // num_patients)):
        size = min(step, num_resamples - start)
        times = rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=size).astype(np.float64)
        rows.append(_ratio(times @ sums, times @ counts))
    return np.concatenate(rows)


def _bca(drawn: FloatArray, mean: float, without: FloatArray, level: float) -> tuple[float, float]:
    """The two ends of a BCa interval."""
    drawn = drawn[~np.isnan(drawn)]
    if len(without) < 2 or math.isnan(mean):
        return math.nan, math.nan
    if np.ptp(without) <= 1e-12 * max(abs(mean), 1e-300):
        return mean, mean
    # Sums of floats differ in their last bits: what equals the mean is half below it, half above.
    near = np.isclose(drawn, mean, rtol=1e-12, atol=0)
    below = (np.count_nonzero((drawn < mean) & ~near) + np.count_nonzero(near) / 2) / len(drawn)
    from scipy import stats  # half a second of imports, which only tables of results wait for

    bias = stats.norm.ppf(min(max(below, 1 / len(drawn)), 1 - 1 / len(drawn)))
    skew = without.mean() - without
    skew /= np.abs(skew).max()  # the acceleration has no unit; cubes of tiny numbers would be 0
    acceleration = (skew**3).sum() / (6 * (skew**2).sum() ** 1.5)
    tails = bias + stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(drawn, stats.norm.cdf(bias + tails / (1 - acceleration * tails)))
    return float(low), float(high)


def _ratio(sums: FloatArray, counts: FloatArray) -> FloatArray:
    quotients: FloatArray = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=quotients, where=counts > 0)
    return quotients


@dataclass(frozen=True)
class Agreement:
    """How two ways to measure the same quantity agree, over cases.

    Args:
        bias: mean of predicted minus reference.
        low: lower limit of agreement: 95 % of the differences are expected between the two.
        high: upper limit of agreement.
        pearson: correlation; high also where one is always twice the other.
        icc: intraclass correlation for absolute agreement of single measurements; NaN where nothing varies.
        n: number of cases.
    """

    bias: float
    low: float
    high: float
    pearson: float
    icc: float
    n: int


def agreement(predicted: ArrayLike, reference: ArrayLike) -> Agreement:
    """Bland–Altman limits, Pearson's correlation and the intraclass correlation; NaN where they are undefined.

    Args:
        predicted: shape (cases,).
        reference: the same shape; cases where one of the two is NaN are left out.
    Source:
        Bland and Altman, Statistical methods for assessing agreement between two methods of clinical measurement,
        Lancet 1986: limits at bias ± 1.96 SD. McGraw and Wong, Forming inferences about some intraclass correlation
        coefficients, Psychological Methods 1996: ICC(A,1), which is ICC(2,1) of Shrout and Fleiss 1979.
    """
    pair = np.stack([np.asarray(predicted, np.float64), np.asarray(reference, np.float64)], axis=1)
    pair = pair[~np.isnan(pair).any(axis=1)]
    n = len(pair)
    differences = pair[:, 0] - pair[:, 1]
    bias = float(differences.mean()) if n else math.nan
    if n < 2:
        return Agreement(bias, math.nan, math.nan, math.nan, math.nan, n)
    from scipy import stats

    half = float(stats.norm.ppf((1 + LEVEL) / 2) * differences.std(ddof=1))
    varies = bool((np.ptp(pair, axis=0) > 0).all())
    pearson = float(stats.pearsonr(pair[:, 0], pair[:, 1]).statistic) if varies else math.nan
    grand, of_case, of_method = pair.mean(), pair.mean(axis=1), pair.mean(axis=0)
    rows = 2 * ((of_case - grand) ** 2).sum() / (n - 1)
    columns = n * ((of_method - grand) ** 2).sum()
    rest = ((pair - of_case[:, None] - of_method[None] + grand) ** 2).sum() / (n - 1)
    total = rows + rest + 2 * (columns - rest) / n
    icc = float((rows - rest) / total) if total > 0 else math.nan
    return Agreement(bias, bias - half, bias + half, pearson, icc, n)


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same cases: second minus first.

    Args:
        difference: mean of the differences over cases, with its bootstrap interval.
        p: of Wilcoxon's signed-rank test over patients, two-sided; 1 where nothing differs, NaN without any case.
        effect: matched-pairs rank-biserial correlation, from -1 (second always lower) to 1; 0 where nothing differs.
        num_higher: patients for whom the second is higher.
        num_lower: patients for whom it is lower.
    """

    difference: Interval
    p: float
    effect: float
    num_higher: int
    num_lower: int


def paired_test(
    first: ArrayLike, second: ArrayLike, patients: Sequence[str] | None = None, *, seed: int = 0
) -> PairedTest:
    """Compare two models on the same cases.

    Args:
        first: shape (cases,); cases where one of the two is NaN are left out.
        second: the same cases in the same order.
        patients: the patient of each case; the differences of a patient's cases are averaged for the test.
        seed: of the bootstrap.
    Source:
        Wilcoxon, Individual comparisons by ranking methods, 1945, patients without a difference left out;
        Demšar, Statistical comparisons of classifiers over multiple data sets, JMLR 2006, section 3.1.3. Effect:
        Kerby, The simple difference formula, Comprehensive Psychology 2014.
    """
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    (interval,) = bootstrap_means(differences, patients, seed=seed)
    names = np.arange(len(differences)).astype(str) if patients is None else np.asarray(patients)
    defined = ~np.isnan(differences)
    _, of_case = np.unique(names[defined], return_inverse=True)
    if not of_case.size:
        return PairedTest(interval, math.nan, math.nan, 0, 0)
    per_patient = np.bincount(of_case, weights=differences[defined]) / np.bincount(of_case)
    changed = per_patient[per_patient != 0]
    if not changed.size:
        return PairedTest(interval, 1.0, 0.0, 0, 0)
    from scipy import stats

    ranks = stats.rankdata(np.abs(changed))
    effect = float((ranks * np.sign(changed)).sum() / ranks.sum())
    p = float(stats.wilcoxon(changed).pvalue)
    return PairedTest(interval, p, effect, int((changed > 0).sum()), int((changed < 0).sum()))


def holm(p_values: ArrayLike) -> FloatArray:
    """p-values corrected for the number of tests, so that the chance of any false alarm stays below the level.

    Args:
        p_values: shape (tests,); NaN for a test that could not be made, which does not count.
    Source:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979.
    """
    p = np.asarray(p_values, dtype=np.float64)
    made = np.flatnonzero(~np.isnan(p))
    order = made[np.argsort(p[made], kind="stable")]
    corrected = np.full(p.shape, np.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected
