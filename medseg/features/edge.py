"""How sharp the border of a structure is in the image.

From each voxel of the region's rim a line runs along the normal of the border, from the inside to the outside. Along
it the image is read, and the steepest step found: its slope is the **gradient** (intensity per mm), the difference of
the line's two ends the **contrast**, and contrast by gradient the **width** over which the border would pass if it
were a ramp of that slope.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

NAMES = ("gradient_mean", "gradient_median", "gradient_std", "contrast_mean", "contrast_std", "width_median", "points")
"""Names of the features; the IBSI defines none of this kind. `points`: number of lines."""
MAX_LINES = 20_000
"""More lines than this change no digit: every so many of the rim's voxels is taken."""
SMOOTHING = 1.0
"""Of the distance to the border from which normals come, in voxels of the finest axis: rims are staircases."""


def edge_features(
    image: NDArray[np.floating], mask: NDArray[np.bool_], spacing: tuple[float, ...], reach: float
) -> dict[str, float]:
    """The features of `NAMES`.

    Args:
        image: intensities around the region too, at least `reach` beyond it where the scan goes on.
        mask: of the region, on the same voxels, with at least one voxel.
        spacing: voxel size, in mm or pixels.
        reach: how far the lines run to either side of the border, in the unit of `spacing`.
    Returns:
        NaN where no line lies within the image, or the region fills it. The width is the median over lines with any
        contrast.
    Source:
        Lines along the normal as in Xu et al., Quantifying the margin sharpness of lesions on radiological images for
        content-based image retrieval, Medical Physics 2012. They fit a sigmoid to each line, whose scale is the
        contrast and whose window is the width; here both are read from the profile, without a fit that can fail.
    """
    nothing = dict.fromkeys(NAMES, math.nan) | {"points": 0.0}
    if mask.all():
        return nothing
    start, normal = border_points(mask, spacing)
    if not len(start):
        return nothing
    num = max(2, math.ceil(2 * reach / (min(spacing) / 2)))
    along = np.linspace(-reach, reach, num + 1)
    points = (start[:, None] + along[:, None] * normal[:, None]) / np.asarray(spacing)
    within = ((points >= 0) & (points <= np.asarray(image.shape) - 1)).all(axis=(1, 2))
    if not within.any():
        return nothing
    profile = ndimage.map_coordinates(image, np.moveaxis(points[within], -1, 0), order=1, prefilter=False)
    gradient = np.abs(np.diff(profile, axis=1)).max(axis=1) / (along[1] - along[0])
    contrast = np.abs(profile[:, -1] - profile[:, 0])
    seen = (gradient > 0) & (contrast > 0)
    return {
        "gradient_mean": float(gradient.mean()),
        "gradient_median": float(np.median(gradient)),
        "gradient_std": float(gradient.std()),
        "contrast_mean": float(contrast.mean()),
        "contrast_std": float(contrast.std()),
        "width_median": float(np.median(contrast[seen] / gradient[seen])) if seen.any() else math.nan,
        "points": float(len(profile)),
    }


def border_points(
    mask: NDArray[np.bool_], spacing: tuple[float, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the border of a region lies, and which way is out.

    The border is taken to pass half-way between a voxel of the rim and the nearest voxel outside: at half of what the
    step from one to the other, which is longer along an axis with longer voxels, goes along the normal.

    Args:
        mask: of the region, which does not fill it.
        spacing: voxel size.
    Returns:
        Points in the unit of `spacing` from the middle of the first voxel, and unit normals to the outside; both of
        shape (points, axes), one for each voxel of the rim that has a normal, at most about twice `MAX_LINES`.
    """
    finest, sizes = min(spacing), np.asarray(spacing)
    inwards, nearest = ndimage.distance_transform_edt(mask, sampling=spacing, return_indices=True)
    outwards = ndimage.distance_transform_edt(~mask, sampling=spacing)
    # Only its slope is looked at: about as steep across the border as beside it
    depth = np.where(mask, finest / 2 - inwards, outwards - finest / 2)
    smooth = ndimage.gaussian_filter(depth, [SMOOTHING * finest / s for s in spacing])
    rim = np.argwhere(mask & ~ndimage.binary_erosion(mask, border_value=1))
    rim = rim[:: max(1, len(rim) // MAX_LINES)]
    where = tuple(rim.T)
    normal = np.stack([np.gradient(smooth, s, axis=axis)[where] for axis, s in enumerate(spacing)], axis=1)
    length = np.linalg.norm(normal, axis=1)
    step = (np.moveaxis(nearest, 0, -1)[where] - rim) * sizes
    rim, step, normal = rim[length > 0], step[length > 0], normal[length > 0] / length[length > 0, None]
    return rim * sizes + (step * normal).sum(axis=1, keepdims=True) / 2 * normal, normal
