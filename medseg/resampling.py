"""Separable resampling between grids that cover the same box: images, logits and label maps.

Resampling along voxel axes is separable: one small matrix per axis, applied in turn. A cubic B-spline with its
prefilter is also just a matrix, so the general routine's values come out at a fraction of its cost.

The box is kept, not the voxel centres: output voxel i of n_out covers the share i/n_out … (i+1)/n_out of the axis
(half-pixel convention, as `Grid.resampled`). Outside the outermost centres the nearest value is continued.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage

ORDERS = (0, 1, 3)
"""Interpolation orders on offer: nearest neighbour, linear, cubic B-spline."""


@lru_cache(maxsize=64)
def axis_matrix(num_in: int, num_out: int, order: int) -> torch.Tensor:
    """The (num_out, num_in) float32 matrix that resamples one axis.

    Args:
        num_in: voxels along the axis before.
        num_out: voxels along the axis after.
        order: one of `ORDERS`.
    Source:
        Unser, Splines: a perfect fit for signal and image processing, IEEE Signal Processing Magazine 1999;
        the weights are read off scipy.ndimage by resampling the unit vectors (boundary "nearest").
    """
    positions = (np.arange(num_out) + 0.5) * num_in / num_out - 0.5
    positions = positions.clip(0, num_in - 1)
    if order == 0:
        matrix = np.eye(num_in, dtype=np.float32)[np.floor(positions + 0.5).astype(int).clip(0, num_in - 1)]
    elif order == 1:
        low = np.floor(positions).astype(int).clip(0, max(num_in - 2, 0))
        high = np.minimum(low + 1, num_in - 1)
        weight = positions - low
        matrix = np.zeros((num_out, num_in))
        np.add.at(matrix, (np.arange(num_out), low), 1 - weight)
        np.add.at(matrix, (np.arange(num_out), high), weight)
    else:
        basis = ndimage.spline_filter1d(np.eye(num_in), order=3, axis=0, mode="mirror")
        columns = [
            ndimage.map_coordinates(column, positions[None], order=3, mode="mirror", prefilter=False)
            for column in basis.T
        ]
        matrix = np.stack(columns, axis=1)
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32))


def resample(array: torch.Tensor, shape: tuple[int, ...], *, order: int | tuple[int, ...] = 1) -> torch.Tensor:
    """Resample the last axes of an array to `shape`.

    Args:
        array: float, shape (..., *old_shape).
        shape: new size of the last len(shape) axes.
        order: one of `ORDERS`, or one for each axis.
    Returns:
        float32, shape (..., *shape). The array itself where no axis changes.
    """
    ndim = len(shape)
    orders = (order,) * ndim if isinstance(order, int) else order
    result = array
    # Shrinking axes first keeps what the next ones have to work on small.
    axes = sorted(range(ndim), key=lambda a: shape[a] / array.shape[a - ndim])
    for axis in axes:
        num_in = result.shape[axis - ndim]
        if num_in == shape[axis]:
            continue
        matrix = axis_matrix(num_in, shape[axis], orders[axis]).to(result.device)
        moved = result.float().movedim(axis - ndim, -1)
        result = (moved @ matrix.T).movedim(-1, axis - ndim)
    return result


def resample_labels(labels: torch.Tensor, shape: tuple[int, ...], num_classes: int) -> torch.Tensor:
    """Resample a map of class indices: the class with the largest linearly interpolated share. No new values arise.

    Args:
        labels: uint8, shape (*old_shape).
        shape: the new shape.
        num_classes: indices are 0 … num_classes - 1; ties go to the lower one.
    Returns:
        uint8, shape (*shape).
    """
    if tuple(labels.shape) == shape:
        return labels
    present = [c for c in range(num_classes) if bool((labels == c).any())]
    return _argmax_over(present, lambda c: resample((labels == c).float(), shape, order=1), shape, labels.device)


def resample_argmax(logits: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Argmax over classes of linearly resampled logits, one class at a time: never all classes at full size.

    Args:
        logits: float, shape (num_classes, *old_shape).
        shape: the new shape.
    Returns:
        uint8 class indices, shape (*shape); equal to `resample(logits, shape).argmax(0)`.
    """
    if tuple(logits.shape[1:]) == shape:
        return logits.argmax(0).to(torch.uint8)
    classes = list(range(logits.shape[0]))
    return _argmax_over(classes, lambda c: resample(logits[c], shape, order=1), shape, logits.device)


def _argmax_over(
    classes: list[int], share: Callable[[int], torch.Tensor], shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    best_index = torch.zeros(shape, dtype=torch.uint8, device=device)
    best_share: torch.Tensor | None = None
    for index in classes:
        candidate = share(index)
        if best_share is None:
            best_share = candidate.clone()
            best_index.fill_(index)
            continue
        better = candidate > best_share
        best_index[better] = index
        torch.maximum(best_share, candidate, out=best_share)
    return best_index
