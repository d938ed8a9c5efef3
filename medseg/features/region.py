"""All features of one region, and why some of them do not exist."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import Code, MedsegError
from medseg.features import edge, glcm, gldm, glrlm, glszm, intensity, ngtdm, shape
from medseg.features.levels import Levels, discretised
from medseg.features.settings import Settings

SPLINE_MARGIN = 12
"""Voxels around a region that a cubic spline is fitted to: what lies beyond changes it by less than 1e-6."""


@dataclass(frozen=True)
class Measured:
    """The features of a region.

    Args:
        values: "family_feature" → value; NaN where it does not exist.
        num_voxels: of the region, on the grid that was measured on.
        num_levels: of grey that occur; 0 without voxels.
        missing: why features do not exist, one sentence each.
    """

    values: dict[str, float]
    num_voxels: int
    num_levels: int
    missing: tuple[str, ...] = ()


def feature_names(families: Iterable[str], ndim: int) -> list[str]:
    """The columns of a table, "family_feature".

    Args:
        families: of `settings.FAMILIES`.
        ndim: 3 for volumes, 2 for pictures.
    """
    names = {
        "shape": list(shape.CODES) if ndim == 3 else list(shape.PLANAR_NAMES),
        "intensity": list(intensity.CODES),
        "histogram": list(intensity.HISTOGRAM_CODES),
        "glcm": list(glcm.CODES),
        "glrlm": list(glrlm.CODES),
        "glszm": list(glszm.CODES),
        "gldm": list(gldm.CODES),
        "ngtdm": list(ngtdm.CODES),
        "edge": list(edge.NAMES),
    }
    return [f"{family}_{name}" for family in families for name in names[family]]


def measure_region(
    image: NDArray[np.floating],
    mask: NDArray[np.bool_],
    spacing: tuple[float, ...],
    settings: Settings,
    *,
    across: int = 0,
    where: object = None,
) -> Measured:
    """Measure a region of an image.

    Args:
        image: one channel, shape (i, j, k), or (row, column).
        mask: the region, of the same shape; it may be empty.
        spacing: voxel size in mm (pixels for some pictures).
        settings: what is computed, and how.
        across: axis from slice to slice, for textures by slice.
        where: what messages call the region.
    Raises:
        MedsegError: E_NONFINITE for intensities of the region that are no numbers; E_CONFIG for more grey levels than
            make sense.
    """
    names = feature_names(settings.families, mask.ndim)
    empty = dict.fromkeys(names, math.nan)
    if not mask.any():
        return Measured(empty, 0, 0, ("the region is empty",))
    box = _around(_box(mask), _margins(spacing, settings), mask.shape)
    if settings.spacing_mm:
        image, mask, spacing = resampled(image, mask, spacing, settings, box)
        if not mask.any():
            return Measured(empty, 0, 0, ("no voxel of the region is left at this spacing",))
    else:
        image, mask = image[box], mask[box]
    tight = _box(mask)
    inner = np.asarray(image[tight], dtype=np.float64)
    region = mask[tight]
    counted = _counted(inner, region, settings, where)
    values = dict(empty)
    if "shape" in settings.families:
        values |= _named("shape", _shape(inner, region, counted, spacing))
    if "edge" in settings.families:
        values |= _named("edge", edge.edge_features(image, mask, spacing, settings.edge_reach_mm))
    if not counted.any():
        missing = "no voxel of the region has an intensity in the range"
        return Measured(values, int(region.sum()), 0, (missing,))
    levels: Levels = np.zeros(counted.shape, dtype=np.int32)
    levels[counted] = discretised(inner[counted], settings)
    values |= _textures(inner[counted], levels, settings, across)
    num_levels = len(np.unique(levels[counted]))
    return Measured(values, int(region.sum()), num_levels, _reasons(values, region, num_levels))


def _textures(inside: NDArray[np.float64], levels: Levels, settings: Settings, across: int) -> dict[str, float]:
    """The families that come from intensities."""
    texture = settings.texture
    if levels.ndim == 2:  # all neighbours lie in the slice
        texture = "3d-merged" if texture.endswith("merged") else "3d"
    found: dict[str, float] = {}
    for family in settings.families:
        if family == "intensity":
            found |= _named(family, intensity.intensity_features(inside))
        elif family == "histogram":
            found |= _named(family, intensity.histogram_features(levels[levels > 0]))
        elif family == "glcm":
            found |= _named(family, glcm.glcm_features(levels, texture, across))
        elif family == "glrlm":
            found |= _named(family, glrlm.glrlm_features(levels, texture, across))
        elif family == "glszm":
            found |= _named(family, glszm.glszm_features(levels, texture, across))
        elif family == "gldm":
            found |= _named(family, gldm.gldm_features(levels, texture, across, settings.dependence))
        elif family == "ngtdm":
            found |= _named(family, ngtdm.ngtdm_features(levels, texture, across))
    return found


def _shape(
    image: NDArray[np.float64], region: NDArray[np.bool_], counted: NDArray[np.bool_], spacing: tuple[float, ...]
) -> dict[str, float]:
    if region.ndim == 2:
        return shape.planar_features(region, spacing)
    weights = image[counted]
    total = float(weights.sum())
    positions = np.argwhere(counted) * np.asarray(spacing)
    centroid = (positions * weights[:, None]).sum(axis=0) / total if total else None
    found = shape.shape_features(region, spacing, centroid)
    mean = float(weights.mean()) if len(weights) else math.nan
    return found | {"integrated_intensity": found["volume"] * mean}


def _counted(
    image: NDArray[np.float64], region: NDArray[np.bool_], settings: Settings, where: object
) -> NDArray[np.bool_]:
    """The voxels whose intensities count (IBSI: the intensity mask).

    Raises:
        MedsegError: E_NONFINITE.
    """
    bad = region & ~np.isfinite(image)
    if bad.any():
        raise MedsegError(
            Code.NONFINITE, "intensities of the region are no numbers", where=where, got=f"{int(bad.sum())} voxels",
            remedy="replace them by the value of air or of the background",
        )  # fmt: skip
    counted = region
    if settings.intensities is not None:
        counted = counted & (image >= settings.intensities[0]) & (image <= settings.intensities[1])
    if settings.outliers is not None and counted.any():
        mean, std = image[counted].mean(), image[counted].std()
        counted = counted & (np.abs(image - mean) <= settings.outliers * std)
    return counted


def resampled(
    image: NDArray[np.floating],
    mask: NDArray[np.bool_],
    spacing: tuple[float, ...],
    settings: Settings,
    box: tuple[slice, ...],
) -> tuple[NDArray[np.float64], NDArray[np.bool_], tuple[float, ...]]:
    """A box of an image and of a region at the spacing of the settings.

    Args:
        image: the whole image: its middle says where the new voxels lie.
        mask: of the same shape.
        spacing: voxel size in mm.
        settings: with a spacing.
        box: what is needed of it.
    Returns:
        Image (by splines of `settings.order`), region (linear, at least one half), and the spacing of their axes.
    Raises:
        MedsegError: E_CONFIG where the spacing does not fit the number of axes.
    Source:
        IBSI 1 reference manual, section 2.4: the centres of the two grids coincide, ceil(n · old / new) voxels.
    """
    wanted = settings.spacing_mm * image.ndim if len(settings.spacing_mm) == 1 else settings.spacing_mm
    if len(wanted) != image.ndim:
        raise MedsegError(
            Code.CONFIG,
            "one spacing for each axis, or one for all",
            where="--spacing",
            expected=f"1 or {image.ndim} values",
            got=wanted,
        )
    scale, offset, size = [], [], []
    for n, old, new, part in zip(image.shape, spacing, wanted, box, strict=True):
        step = new / old
        num = math.ceil(n / step - 1e-9)  # a last digit must not make a voxel more
        first = (n - 1) / 2 - step * (num - 1) / 2  # where new voxel 0 lies, in old ones
        begin = max(0, math.ceil((part.start - 0.5 - first) / step))
        end = min(num, math.floor((part.stop - 0.5 - first) / step) + 1)
        scale.append(step)
        offset.append(first + begin * step - part.start)
        size.append(max(0, end - begin))
    matrix, begins = np.asarray(scale, dtype=np.float64), np.asarray(offset, dtype=np.float64)
    voxels, inside = image[box].astype(np.float64), mask[box].astype(np.float64)
    fine = ndimage.affine_transform(voxels, matrix, begins, tuple(size), order=_spline(settings), mode="nearest")
    share = ndimage.affine_transform(inside, matrix, begins, tuple(size), order=1, mode="nearest")
    return fine, share >= 0.5 - 1e-9, wanted


def _spline(settings: Settings) -> Literal[1, 3]:
    return 1 if settings.order == 1 else 3


def _margins(spacing: tuple[float, ...], settings: Settings) -> list[int]:
    """Voxels around the region that are needed: for the lines of the border, and for splines."""
    reach = settings.edge_reach_mm if "edge" in settings.families else 0.0
    extra = SPLINE_MARGIN if settings.spacing_mm else 1
    return [math.ceil(reach / s) + extra for s in spacing]


def _around(box: tuple[slice, ...], margins: list[int], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """A box that is larger by margins, as far as the image goes."""
    return tuple(slice(max(0, s.start - m), min(n, s.stop + m)) for s, m, n in zip(box, margins, shape, strict=True))


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box that holds a region."""
    ranges = []
    for axis in range(mask.ndim):
        found = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        ranges.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(ranges)


def _reasons(values: dict[str, float], region: NDArray[np.bool_], num_levels: int) -> tuple[str, ...]:
    """Why values are NaN."""
    families = {name.partition("_")[0] for name, value in values.items() if math.isnan(value)}
    if not families:
        return ()
    listed = ", ".join(sorted(families))
    if region.sum() == 1:
        return (f"one voxel has no neighbours and no axes ({listed})",)
    if num_levels == 1 and families - {"edge", "shape"}:
        return (f"all voxels are of one grey level: what compares levels does not exist ({listed})",)
    if families == {"shape"} and math.isnan(values.get("shape_volume_density_ellipsoid", 0.0)):
        return ("the region is flat: what divides by its thickness does not exist (shape)",)
    if families == {"shape"}:
        return ("the intensities add up to 0: they have no centre of mass (shape)",)
    if families == {"edge"}:
        return ("the image ends too near to the border (edge)",)
    return (f"some features divide by 0 or have too few voxels ({listed})",)


def _named(family: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{family}_{name}": float(value) for name, value in values.items()}
