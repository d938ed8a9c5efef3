"""Calibration: whether a network that says 90 % is right in 90 % of the voxels.

It needs probabilities, so it is no metric of label maps and not in the table of metrics: `medseg evaluate
--probabilities` reads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.labels import IGNORE_INDEX

DEFAULT_NUM_BINS = 15
"""As in the paper."""
_TOLERANCE = 1e-3
"""How far probabilities may be from a sum of 1: half precision rounds each to 5e-4."""
_VOXELS_PER_CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class Calibration:
    """Voxels by the confidence in their predicted class.

    Args:
        counts: number of voxels of each bin, shape (B,); the bins divide (0, 1] evenly.
        confidence: mean probability of the predicted class of each bin's voxels; NaN for an empty bin.
        accuracy: share of each bin's voxels whose predicted class is right; NaN for an empty bin.
    """

    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean of |accuracy - confidence| over the voxels; NaN without any."""
        gaps = np.abs(self.accuracy - self.confidence)
        total = int(self.counts.sum())
        return float((self.counts * np.nan_to_num(gaps)).sum() / total) if total else math.nan

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest gap of a bin that is not empty; NaN without any."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nanmax(gaps)) if self.counts.any() else math.nan

    def __add__(self, other: Calibration) -> Calibration:
        """The voxels of both, which have the same bins."""
        counts = self.counts + other.counts
        present = np.where(counts > 0, counts, np.nan)
        confident, right = (
            (np.nan_to_num(ours) * self.counts + np.nan_to_num(theirs) * other.counts) / present
            for ours, theirs in ((self.confidence, other.confidence), (self.accuracy, other.accuracy))
        )
        return Calibration(counts, confident, right)


def calibration(
    probabilities: NDArray[np.floating],
    reference: NDArray[np.integer],
    *,
    where: NDArray[np.bool_] | None = None,
    num_bins: int = DEFAULT_NUM_BINS,
) -> Calibration:
    """Compare probabilities with what is there.

    Args:
        probabilities: shape (C, *S), a distribution over the classes for every voxel.
        reference: class indices, shape (*S); voxels that are `IGNORE_INDEX` are left out.
        where: bool, shape (*S), the voxels to look at; all by default. Almost all background is easy and certain, and
            hides the rest: a box or a margin around the structures says more.
        num_bins: how many bins of confidence.
    Raises:
        MedsegError: E_GRID if the shapes do not fit, E_LABEL for an index that is not a class, E_CONFIG for
            probabilities that do not sum to 1 or fewer than one bin.
    Source:
        Guo et al., On calibration of modern neural networks, ICML 2017, equations 3 to 5.
    """
    if num_bins < 1:
        raise MedsegError(Code.CONFIG, "there is at least one bin", where="num_bins", got=num_bins)
    shapes = [probabilities.shape[1:], reference.shape, reference.shape if where is None else where.shape]
    if len(set(shapes)) > 1:
        raise MedsegError(Code.GRID, "probabilities, reference and where have other shapes", got=shapes)
    num_classes = probabilities.shape[0]
    flat, truth = probabilities.reshape(num_classes, -1), reference.ravel()
    chosen = np.flatnonzero((truth != IGNORE_INDEX) if where is None else (truth != IGNORE_INDEX) & where.ravel())
    counts, confident, right = np.zeros(num_bins, np.int64), np.zeros(num_bins), np.zeros(num_bins)
    for start in range(0, chosen.size, _VOXELS_PER_CHUNK):
        voxels = chosen[start : start + _VOXELS_PER_CHUNK]
        values, classes = flat[:, voxels].astype(np.float64), truth[voxels]
        _check(values, classes)
        confidence = values.max(axis=0)
        bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
        counts += np.bincount(bins, minlength=num_bins)
        confident += np.bincount(bins, weights=confidence, minlength=num_bins)
        right += np.bincount(bins, weights=values.argmax(axis=0) == classes, minlength=num_bins)
    present = np.where(counts > 0, counts, np.nan)
    return Calibration(counts, confident / present, right / present)


def _check(values: NDArray[np.float64], classes: NDArray[np.integer]) -> None:
    """Probabilities (C, N) are distributions, and classes (N) are among them."""
    sums = values.sum(axis=0)
    # Written so that NaN is refused as well
    if not (values.min() >= 0 and np.abs(sums - 1).max() <= _TOLERANCE):
        raise MedsegError(
            Code.CONFIG,
            "these are no probabilities",
            expected="0 or more, and a sum of 1 over the classes",
            got=f"from {values.min():.4g} on, sums from {sums.min():.4g} to {sums.max():.4g}",
            remedy="apply the softmax over the classes first",
        )
    if int(classes.min()) < 0 or int(classes.max()) >= len(values):
        raise MedsegError(
            Code.LABEL,
            "the reference holds an index that is not a class",
            expected=f"0 … {len(values) - 1}",
            got=f"{classes.min()} … {classes.max()}",
        )
