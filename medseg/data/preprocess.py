"""Scan → what the network sees. Training and prediction run this same code."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.data.plan import Plan
from medseg.errors import Code, MedsegError
from medseg.resampling import resample, resample_labels
from medseg.volume import Grid, Volume

COARSE = 3.0
"""An axis is coarse when its voxels are more than this times as long as the shortest side (nnU-Net's rule)."""
MOMENT_VOXELS = 1 << 20
"""Voxels whose mean and deviation are summed up at a time, in float64."""


def prepare_image(volume: Volume, plan: Plan) -> tuple[torch.Tensor, Grid]:
    """Orient, crop, normalise and resample an image.

    Memory beside the scan: two arrays of float32, or one where nothing is resampled.

    Args:
        volume: array (C, *S) as it was read.
        plan: what the network sees.
    Returns:
        float32 (C, *S') and the grid that it lies on: the plan's axes; the scan's box, or with `plan.crop` the box of
        its voxels that are not 0 in any channel.
    Raises:
        MedsegError: E_MODEL if channels or dimensions do not fit the plan.
    Source:
        nnU-Net v2, DefaultPreprocessor.run_case_npy (Isensee et al., Nature Methods 2021): the same steps in the same
        order, and values to 1e-3 of a deviation (tests/test_preprocess_nnunet.py). A masked z-score counts the nonzero
        voxels, where nnU-Net counts in training, but not in prediction, labelled voxels outside them too.
    """
    refuse_misfit(volume, plan)
    oriented = _oriented(volume, plan)
    array, grid = oriented.array, oriented.grid
    if plan.crop:
        box = _nonzero_box(array)
        array, grid = array[(slice(None), *box)], grid.boxed(box)
    image = torch.from_numpy(_normalised(array, plan))
    target = planned_grid(grid, plan)
    return _resampled_image(image, target.shape, coarse_axis(grid, plan)), target


def refuse_misfit(volume: Volume, plan: Plan) -> None:
    """Refuse an image that a model of this plan cannot take.

    Raises:
        MedsegError: E_MODEL if channels or dimensions do not fit the plan.
    """
    if volume.grid.ndim != plan.spatial_dims or volume.array.shape[0] != plan.num_channels:
        raise MedsegError(
            Code.MODEL,
            "the image does not fit the model",
            expected=f"{plan.num_channels} channel(s), {plan.spatial_dims}D",
            got=f"{volume.array.shape[0]} channel(s), {volume.grid.ndim}D",
            remedy="give the same channels, in the same order, as the training cases had",
        )


def prepare_label(label: Volume, plan: Plan, num_classes: int, grid: Grid | None = None) -> torch.Tensor:
    """Orient, crop and resample class indices to what the network sees.

    Args:
        label: class indices, shape (*S), on the image's grid.
        plan: what the network sees.
        num_classes: with the background.
        grid: what `prepare_image` gave for the image; None: as for an image without a border of zeros.
    Returns:
        uint8 (*S').
    """
    oriented = _oriented(label, plan)
    array, source = oriented.array, oriented.grid
    if grid is not None:
        box = covered_box(grid, source)
        array, source = array[box], source.boxed(box)
    indices = torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8))
    shape = planned_grid(source, plan).shape
    axis = coarse_axis(source, plan)
    if axis is not None:  # the image takes the nearest slice there, and so does its label
        indices = indices.index_select(axis, _nearest(indices.shape[axis], shape[axis]))
    return resample_labels(indices, shape, num_classes)


def covered_box(grid: Grid, scan: Grid) -> tuple[slice, ...]:
    """The voxels of a scan that a grid of the same axes covers: its box is made of whole voxels of the scan."""
    ends = np.array([[-0.5] * grid.ndim, [n - 0.5 for n in grid.shape]])
    low, high = np.rint(scan.to_index(grid.to_world(ends)) + 0.5).astype(int)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def planned_grid(grid: Grid, plan: Plan) -> Grid:
    """The plan's grid over the same box: as many voxels as come closest to the plan's spacing. Slice by slice ("2d")
    the number of slices stays."""
    if grid.is_picture:
        return grid
    ratio = np.array(grid.spacing_mm) / np.array(_target_spacing(grid, plan))
    shape = tuple(max(1, round(float(n * r))) for n, r in zip(grid.shape, ratio, strict=True))
    return grid if shape == grid.shape else grid.resampled(shape)


def coarse_axis(grid: Grid, plan: Plan) -> int | None:
    """The axis along which the nearest slice is taken instead of a spline through far slices, which would ring.

    Source:
        nnU-Net v2, resample_data_or_seg_to_shape: the longest side of the scan's voxels, or else of the plan's, if it
        is more than `COARSE` times the shortest one and no other side is as long.
    """
    if grid.is_picture:
        return None
    for spacing in (grid.spacing_mm, _target_spacing(grid, plan)):
        # Spacings are rounded as they come from an affine: two equal sides must be seen to be equal
        sides = [round(s, 6) for s in spacing]
        if max(sides) > COARSE * min(sides):
            return sides.index(max(sides)) if sides.count(max(sides)) == 1 else None
    return None


def _target_spacing(grid: Grid, plan: Plan) -> tuple[float, ...]:
    """The plan's spacing for a scan, in mm; along slices that are not resampled the scan's own."""
    return (grid.spacing_mm[0], *plan.spacing_mm[1:]) if plan.configuration == "2d" else plan.spacing_mm


def _oriented(volume: Volume, plan: Plan) -> Volume:
    return volume if volume.grid.is_picture else volume.reoriented(plan.orientation)


def _resampled_image(image: torch.Tensor, shape: tuple[int, ...], coarse: int | None) -> torch.Tensor:
    """Cubic splines within the range of their input, as scikit-image and so nnU-Net make them; along a coarse axis the
    nearest slice, and each slice within its own range."""
    if coarse is None or tuple(image.shape[1:]) == tuple(shape):
        return resample(image, shape, order=3, clip=True)
    axis = coarse + 1
    indices = _nearest(image.shape[axis], shape[coarse])
    planes = [n for a, n in enumerate(shape) if a != coarse]
    used, positions = torch.unique(indices, return_inverse=True)
    slices = image.index_select(axis, used).movedim(axis, 1).contiguous()
    return resample(slices, tuple(planes), order=3, clip=True)[:, positions].movedim(1, axis).contiguous()


def _nearest(num_in: int, num_out: int) -> torch.Tensor:
    """For each voxel of a resampled axis the nearest one before."""
    return ((2 * torch.arange(num_out) + 1) * num_in // (2 * num_out)).clamp(max=num_in - 1)


def _nonzero_box(array: NDArray[np.generic]) -> tuple[slice, ...]:
    """The box of voxels of (C, *S) that are not 0 in any channel; all of S where there are none."""
    nonzero = _nonzero(array)
    box = []
    for axis in range(nonzero.ndim):
        along = np.flatnonzero(nonzero.any(axis=tuple(a for a in range(nonzero.ndim) if a != axis)))
        box.append(slice(int(along[0]), int(along[-1]) + 1) if len(along) else slice(0, nonzero.shape[axis]))
    return tuple(box)


def _nonzero(array: NDArray[np.generic]) -> NDArray[np.bool_]:
    nonzero: NDArray[np.bool_] = np.asarray(array[0] != 0)
    for channel in array[1:]:
        nonzero |= channel != 0
    return nonzero


def _body(array: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Voxels of (C, *S) that are not 0 in any channel, holes filled: zeros that no way of faces joins to the border."""
    from scipy import ndimage

    outside, _ = ndimage.label(~_nonzero(array))
    borders = [np.take(outside, end, axis=axis) for axis in range(outside.ndim) for end in (0, -1)]
    reached = np.zeros(int(outside.max()) + 1, dtype=bool)
    for border in borders:
        reached[border] = True
    reached[0] = False  # not a region of zeros
    filled: NDArray[np.bool_] = ~reached[outside]
    return filled


def _normalised(array: NDArray[np.generic], plan: Plan) -> NDArray[np.float32]:
    """Intensities of (C, *S) as the plan says for each channel, in memory of their own. A constant image becomes 0.

    By numpy: each of torch's operations would meet its threads, for a millisecond of work.
    """
    out = np.empty(array.shape, dtype=np.float32)
    masked = plan.mask_normalisation and "z-score" in plan.normalisation
    body = _body(array) if masked else None
    for values, target, scheme, (low, high, mean, std) in zip(
        array, out, plan.normalisation, plan.intensity, strict=True
    ):
        if scheme == "ct":
            np.clip(values, low, high, out=target, casting="same_kind")
            target -= np.float32(mean)
            target /= np.float32(std)
            continue
        np.copyto(target, values, casting="same_kind")
        if scheme == "z-score":
            average, deviation = _moments(target if body is None else target[body])
            target -= np.float32(average)
            target /= np.float32(max(deviation, 1e-8))
            if body is not None:
                target[~body] = 0
        elif scheme == "rescale":
            target -= target.min()
            target /= max(target.max(), np.float32(1e-8))
    return out


def _moments(values: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and standard deviation, summed in float64 without a second array; of nothing 0."""
    flat = values.reshape(-1)
    if not flat.size:
        return 0.0, 0.0
    parts = [flat[begin : begin + MOMENT_VOXELS] for begin in range(0, flat.size, MOMENT_VOXELS)]
    mean = sum(float(part.sum(dtype=np.float64)) for part in parts) / flat.size
    squares = 0.0
    for part in parts:
        deviation = part - np.float64(mean)
        squares += float(deviation @ deviation)
    return mean, float(np.sqrt(squares / flat.size))
