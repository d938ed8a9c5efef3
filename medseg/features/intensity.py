"""Intensities of a region without their places: statistics, and the histogram of grey levels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.features.size_matrix import entropy

CODES = {
    "mean": "Q4LE",
    "variance": "ECT3",
    "skewness": "KE2A",
    "kurtosis": "IPH6",
    "median": "Y12H",
    "minimum": "1GSF",
    "percentile_10": "QG58",
    "percentile_90": "8DWT",
    "maximum": "84IY",
    "interquartile_range": "SALO",
    "range": "2OJQ",
    "mean_absolute_deviation": "4FUA",
    "robust_mean_absolute_deviation": "1128",
    "median_absolute_deviation": "N72L",
    "coefficient_of_variation": "7TET",
    "quartile_coefficient_of_dispersion": "9S40",
    "energy": "N8CA",
    "root_mean_square": "5ZWQ",
}
"""Name → identifier of the IBSI (family UHIW)."""
HISTOGRAM_CODES = {
    "mean": "X6K6",
    "variance": "CH89",
    "skewness": "88K1",
    "kurtosis": "C3I7",
    "median": "WIFQ",
    "minimum": "1PR8",
    "percentile_10": "GPMT",
    "percentile_90": "OZ0C",
    "maximum": "3NCY",
    "mode": "AMMC",
    "interquartile_range": "WR0O",
    "range": "5Z3W",
    "mean_absolute_deviation": "D2ZX",
    "robust_mean_absolute_deviation": "WRZB",
    "median_absolute_deviation": "4RNL",
    "coefficient_of_variation": "CWYJ",
    "quartile_coefficient_of_dispersion": "SLWD",
    "entropy": "TLU2",
    "uniformity": "BJ5W",
    "maximum_gradient": "12CE",
    "maximum_gradient_level": "8E6O",
    "minimum_gradient": "VQB3",
    "minimum_gradient_level": "RHQZ",
}
"""Name → identifier of the IBSI (family ZVCW)."""


def intensity_features(values: NDArray[np.float64]) -> dict[str, float]:
    """The features of `CODES`.

    Args:
        values: intensities of the region, shape (n,), at least one.
    Returns:
        Skewness and kurtosis (which is 0 for a normal distribution) are NaN where all voxels are alike, quotients
        where their denominator is 0.
    Source:
        IBSI 1 reference manual, section 3.3. Variances are of the population; percentiles are interpolated linearly.
    """
    mean, variance = float(values.mean()), float(values.var())
    alike = values.max() == values.min()
    p10, q1, median, q3, p90 = np.percentile(values, [10, 25, 50, 75, 90])
    deviation = values - mean
    inner = values[(values >= p10) & (values <= p90)]
    found = {
        "mean": mean,
        "variance": variance,
        "skewness": np.nan if alike else (deviation**3).mean() / variance**1.5,
        "kurtosis": np.nan if alike else (deviation**4).mean() / variance**2 - 3,
        "median": median,
        "minimum": values.min(),
        "percentile_10": p10,
        "percentile_90": p90,
        "maximum": values.max(),
        "interquartile_range": q3 - q1,
        "range": np.ptp(values),
        "mean_absolute_deviation": np.abs(deviation).mean(),
        "robust_mean_absolute_deviation": np.abs(inner - inner.mean()).mean() if len(inner) else np.nan,
        "median_absolute_deviation": np.abs(values - median).mean(),
        "coefficient_of_variation": np.sqrt(variance) / mean if mean else np.nan,
        "quartile_coefficient_of_dispersion": (q3 - q1) / (q3 + q1) if q3 + q1 else np.nan,
        "energy": (values**2).sum(),
        "root_mean_square": np.sqrt((values**2).mean()),
    }
    return {name: float(value) for name, value in found.items()}


def histogram_features(levels: NDArray[np.integer]) -> dict[str, float]:
    """The features of `HISTOGRAM_CODES`.

    Args:
        levels: grey levels of the region, shape (n,), at least one.
    Returns:
        Gradients are NaN where there is one level only.
    Source:
        IBSI 1 reference manual, section 3.4. The histogram's gradient is of central differences, one-sided at its ends;
        of several modes the one nearest to the mean counts.
    """
    found = intensity_features(levels.astype(np.float64))
    counts = np.bincount(levels)[1:].astype(np.float64)
    p = counts / counts.sum()
    modes = np.flatnonzero(counts == counts.max()) + 1
    gradient = np.gradient(counts) if len(counts) > 1 else np.array([np.nan])
    found |= {
        "mode": float(modes[np.argmin(np.abs(modes - found["mean"]))]),
        "entropy": entropy(p),
        "uniformity": float((p**2).sum()),
        "maximum_gradient": float(gradient.max()),
        "maximum_gradient_level": float(gradient.argmax() + 1) if len(counts) > 1 else np.nan,
        "minimum_gradient": float(gradient.min()),
        "minimum_gradient_level": float(gradient.argmin() + 1) if len(counts) > 1 else np.nan,
    }
    return {name: found[name] for name in HISTOGRAM_CODES}
