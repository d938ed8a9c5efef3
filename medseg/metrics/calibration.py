"""Calibration: whether a network that says 90 % is right in 90 % of the voxels.

It needs probabilities, so it is no metric of label maps and not in the table of metrics: `medseg evaluate
--probabilities` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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

    @classmethod
    def of_nothing(cls, num_bins: int = DEFAULT_NUM_BINS) -> Calibration:
        """Of no voxel at all."""
        return cls(np.zeros(num_bins, np.int64), *np.full((2, num_bins), math.nan))

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


@dataclass(frozen=True, eq=False)
class Decided:
    """What probabilities come to at each voxel: all that calibration needs of them, however many classes there are.

    Args:
        classes: index of the most probable class, shape (*S); of equal ones the one that came first.
        confidence: its probability, shape (*S).
        sums: sum over all classes, shape (*S); NaN where one of them is negative or NaN.
        num_classes: how many there are.
    """

    classes: NDArray[np.uint16]
    confidence: NDArray[np.floating]
    sums: NDArray[np.floating]
    num_classes: int

    @classmethod
    def of(cls, channels: Iterable[NDArray[Any]], indices: Sequence[int] | None = None) -> Decided:
        """Take the channels one after the other; none is kept.

        Args:
            channels: the probabilities of a class each, shape (*S): also an array (C, *S), or what a file is read into.
            indices: the class of each channel; by default 0, 1, 2, …
        Raises:
            MedsegError: E_GRID where the shapes differ or there is no channel.
        """
        found: Decided | None = None
        number = 0
        for channel in channels:
            values = np.asarray(channel)
            index = number if indices is None else indices[number]
            number += 1
            if found is None:
                best = values.astype(np.result_type(values, np.float32))
                found = cls(np.full_like(best, index, dtype=np.uint16), best, np.zeros_like(best), 0)
            elif values.shape != found.sums.shape:
                got = f"{found.sums.shape} and {values.shape}"
                raise MedsegError(Code.GRID, "the channels of the probabilities have other shapes", got=got)
            else:
                better = values > found.confidence
                np.copyto(found.confidence, values, where=better)
                np.copyto(found.classes, np.uint16(index), where=better)
            np.add(found.sums, values, out=found.sums)
            np.copyto(found.sums, math.nan, where=values < 0)
        if found is None:
            raise MedsegError(Code.GRID, "there are no probabilities", expected="a channel for each class", got="none")
        return cls(found.classes, found.confidence, found.sums, number)

    def __getitem__(self, box: tuple[slice, ...]) -> Decided:
        """The voxels of a box; a view."""
        return Decided(self.classes[box], self.confidence[box], self.sums[box], self.num_classes)


def calibration(
    probabilities: Decided | Iterable[NDArray[Any]],
    reference: NDArray[np.integer],
    *,
    where: NDArray[np.bool_] | None = None,
    num_bins: int = DEFAULT_NUM_BINS,
) -> Calibration:
    """Compare probabilities with what is there.

    Args:
        probabilities: shape (C, *S), a distribution over the classes for every voxel; or its channels one after the
            other; or what they came to.
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
    decided = probabilities if isinstance(probabilities, Decided) else Decided.of(probabilities)
    shapes = [decided.sums.shape, reference.shape, reference.shape if where is None else where.shape]
    if len(set(shapes)) > 1:
        raise MedsegError(Code.GRID, "probabilities, reference and where have other shapes", got=shapes)
    counts, confident, right = np.zeros(num_bins, np.int64), np.zeros(num_bins), np.zeros(num_bins)
    for part in slabs(decided.confidence):
        chosen = reference[part] != IGNORE_INDEX
        if where is not None:
            chosen &= where[part]
        classes = reference[part][chosen]
        if not classes.size:
            continue
        _check(decided.sums[part][chosen], classes, decided.num_classes)
        confidence = decided.confidence[part][chosen].astype(np.float64)
        bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
        counts += np.bincount(bins, minlength=num_bins)
        confident += np.bincount(bins, weights=confidence, minlength=num_bins)
        right += np.bincount(bins, weights=decided.classes[part][chosen] == classes, minlength=num_bins)
    present = np.where(counts > 0, counts, np.nan)
    return Calibration(counts, confident / present, right / present)


def slabs(array: NDArray[Any]) -> Iterator[tuple[slice, ...]]:
    """The array in parts of a limited number of voxels, along the axis that lies outermost in memory."""
    if not array.size:
        return
    axis = int(np.argmax(np.abs(array.strides)))
    thickness = max(1, _VOXELS_PER_CHUNK * array.shape[axis] // array.size)
    for start in range(0, array.shape[axis], thickness):
        yield (*(slice(None),) * axis, slice(start, start + thickness))


def _check(sums: NDArray[np.floating], classes: NDArray[np.integer], num_classes: int) -> None:
    """Probabilities with these sums (N) are distributions, and classes (N) are among them."""
    off = float(np.abs(sums - 1).max())
    if not off <= _TOLERANCE:  # so that NaN is refused as well
        raise MedsegError(
            Code.CONFIG,
            "these are no probabilities",
            expected="0 or more, and a sum of 1 over the classes",
            got="negative numbers or NaN" if math.isnan(off) else f"sums from {sums.min():.4g} to {sums.max():.4g}",
            remedy="apply the softmax over the classes first",
        )
    if int(classes.min()) < 0 or int(classes.max()) >= num_classes:
        raise MedsegError(
            Code.LABEL,
            "the reference holds an index that is not a class",
            expected=f"0 … {num_classes - 1}",
            got=f"{classes.min()} … {classes.max()}",
        )
