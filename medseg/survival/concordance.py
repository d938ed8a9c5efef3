"""The C-index: of two of whom one is known to have had the event first, how often was its risk the higher one?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.statistics import LEVEL, Interval

NUM_RESAMPLES = 2000
BLOCK = 250
"""Resamples worked on together: what they need in memory is of the size of the cohort."""

FloatArray = NDArray[np.float64]


def concordance(
    time: FloatArray,
    event: NDArray[np.bool_],
    risk: FloatArray,
    patients: Sequence[str] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Harrell's C-index with its percentile bootstrap interval over patients.

    Args:
        time: shape (n,).
        event: whether the event came at that time, shape (n,).
        risk: higher for those who should have it earlier, shape (n,).
        patients: whose each row is; by default every row is a patient.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    Returns:
        0.5 is chance, 1 is perfect; NaN where no two can be compared. The interval tells how the index would vary for
        other patients with these risks; the model is not fitted again.
    Source:
        Harrell, Lee and Mark, Multivariable prognostic models, Statistics in Medicine 1996. Two can be compared where
        the earlier time is of an event; equal times where one of the two is censored. Equal risks count one half.
    """
    earlier = (time[:, None] < time[None, :]) | ((time[:, None] == time[None, :]) & ~event[None, :])
    comparable = (earlier & event[:, None] & ~np.eye(len(time), dtype=bool)).astype(np.float32)
    higher = (risk[:, None] > risk[None, :]).astype(np.float32)
    higher += (risk[:, None] == risk[None, :]).astype(np.float32) / 2
    concordant = comparable * higher
    total = float(comparable.sum(dtype=np.float64))
    index = float(concordant.sum(dtype=np.float64)) / total if total else math.nan
    _, of_row = np.unique(np.arange(len(time)) if patients is None else np.asarray(patients), return_inverse=True)
    num_patients = int(of_row.max()) + 1
    if num_patients < 2 or not total:
        return Interval(index, math.nan, math.nan, num_patients)
    rng = np.random.default_rng(seed)
    drawn = []
    for begin in range(0, num_resamples, BLOCK):
        size = min(BLOCK, num_resamples - begin)
        times = rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=size)
        weights = times[:, of_row].astype(np.float32)
        pairs = ((weights @ comparable) * weights).sum(axis=1, dtype=np.float64)
        good = ((weights @ concordant) * weights).sum(axis=1, dtype=np.float64)
        drawn.append(np.divide(good, pairs, out=np.full(size, np.nan), where=pairs > 0))
    low, high = np.nanquantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(index, float(low), float(high), num_patients)
