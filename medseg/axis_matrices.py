"""The small matrices that resample one axis, cut into dense blocks along their diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

ORDERS = (0, 1, 3)
"""Interpolation orders on offer: nearest neighbour, linear, cubic B-spline."""
BLOCK = 16
"""Output voxels of an axis that are made at a time: a few planes, and small enough that little of a matrix is zero."""
NEGLIGIBLE = 1e-7
"""Weights below this are left out: less than float32 resolves."""
SPLINE_MARGIN = 16
"""Voxels by which an axis is continued before the spline's prefilter: its pole to this power is below 1e-9."""


@dataclass(frozen=True)
class AxisBlock:
    """`weights` (rows, columns), float32, makes the output voxels `out` of an axis from its input voxels `source`."""

    out: slice
    source: slice
    weights: torch.Tensor


def _positions(num_in: int, num_out: int) -> np.ndarray:
    """Where the output voxels' centres lie, in input voxels."""
    return (np.arange(num_out) + 0.5) * num_in / num_out - 0.5


def axis_matrix(num_in: int, num_out: int, order: int) -> np.ndarray:
    """The (num_out, num_in) float64 matrix that resamples one axis.

    Args:
        num_in: voxels along the axis before.
        num_out: voxels along the axis after.
        order: one of `ORDERS`.
    Source:
        Unser, Splines: a perfect fit for signal and image processing, IEEE Signal Processing Magazine 1999, eq. 6
        (the cubic B-spline); the prefilter is scipy.ndimage's.
    """
    positions = _positions(num_in, num_out)
    rows = np.arange(num_out)
    matrix = np.zeros((num_out, num_in))
    if order == 0:
        matrix[rows, np.floor(positions + 0.5).astype(int).clip(0, num_in - 1)] = 1
        return matrix
    low = np.floor(positions).astype(int)
    part = positions - low
    if order == 1:
        for shift, weight in enumerate((1 - part, part)):
            np.add.at(matrix, (rows, (low + shift).clip(0, num_in - 1)), weight)
        return matrix
    continued = np.pad(np.eye(num_in), ((SPLINE_MARGIN, SPLINE_MARGIN), (0, 0)), mode="edge")
    from scipy import ndimage

    coefficients = ndimage.spline_filter1d(continued, order=3, axis=0, mode="mirror")
    for shift in range(-1, 3):
        distance = np.abs(part - shift)
        near = 2 / 3 - distance**2 * (2 - distance) / 2
        weight = np.where(distance < 1, near, (2 - distance).clip(0) ** 3 / 6)
        matrix += weight[:, None] * coefficients[low + shift + SPLINE_MARGIN]
    return matrix


@lru_cache(maxsize=64)
def axis_blocks(num_in: int, num_out: int, order: int, device: torch.device) -> tuple[AxisBlock, ...]:
    """`axis_matrix` on a device without what is zero: `BLOCK` rows at a time and the columns that they need."""
    matrix = axis_matrix(num_in, num_out, order)
    blocks = []
    for begin in range(0, num_out, BLOCK):
        rows = matrix[begin : begin + BLOCK]
        used = np.flatnonzero((np.abs(rows) > NEGLIGIBLE).any(axis=0))
        source = slice(int(used[0]), int(used[-1]) + 1)
        weights = torch.from_numpy(np.ascontiguousarray(rows[:, source], dtype=np.float32))
        blocks.append(AxisBlock(slice(begin, begin + len(rows)), source, weights.to(device)))
    return tuple(blocks)
