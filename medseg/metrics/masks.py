"""What a metric may ask about one class of one case: counts, masks and surface distances, each computed once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Distances = NDArray[np.float64]
InstanceMap = NDArray[np.integer]
"""0 is no instance, and each other number is one."""

ROUNDING_MM = 1e-4
"""Added to tolerances: NIfTI headers hold the spacing as float32, so two voxels of 0.8 mm are 1.60000002 mm."""
REACH = 8
"""Neighbours within so many of the smallest voxel sizes are looked at before a k-d tree is asked: 2,109 if voxels are
cubes."""
_OVERHEAD, _TREE = 1_000, 100
"""What a look at one neighbour of all voxels costs beside the voxels, and what a tree costs for each of its voxels: in
looks at one voxel (some nanoseconds), measured. Looking ends when it has cost as much as the tree would have."""


class State(StrEnum):
    """Which of the two masks has voxels; see `medseg.metrics` for what follows."""

    PRESENT = "present"
    """Both."""
    MISSED = "missed"
    """The reference only."""
    SPURIOUS = "spurious"
    """The prediction only."""
    ABSENT = "absent"
    """Neither."""


@dataclass(frozen=True)
class ClassMasks:
    """One class of one case.

    Args:
        tp: number of voxels in both masks.
        fp: number of voxels in the prediction only.
        fn: number of voxels in the reference only.
        tn: number of voxels in neither.
        predicted: bool, cropped to the box around both masks (without voxels where both are empty). Axes along which
            the case has one voxel only are left out: in a volume of one slice the surface is the outline, not every
            voxel.
        reference: bool, the same crop.
        spacing_mm: voxel size along the axes of the masks (1 for pictures).
        margins: numbers of voxels of the case before and behind the crop, for each axis of the masks.
        voxel_volume: volume of one voxel in ml (1 for pictures).
        diagonal_mm: length of the diagonal of the whole case, from edge to edge.
        tolerance_mm: what the surface Dice forgives.
        instances: the same crop of the maps of instances of prediction and reference, where files number them.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    predicted: Mask
    reference: Mask
    spacing_mm: tuple[float, ...]
    margins: tuple[tuple[int, int], ...]
    voxel_volume: float
    diagonal_mm: float
    tolerance_mm: float
    instances: tuple[InstanceMap, InstanceMap] | None = None

    @property
    def num_predicted(self) -> int:
        """Number of voxels of the prediction."""
        return self.tp + self.fp

    @property
    def num_reference(self) -> int:
        """Number of voxels of the reference."""
        return self.tp + self.fn

    @property
    def state(self) -> State:
        """Which of the two masks has voxels."""
        if self.num_reference:
            return State.PRESENT if self.num_predicted else State.MISSED
        return State.SPURIOUS if self.num_predicted else State.ABSENT

    @cached_property
    def surface_distances(self) -> tuple[Distances, Distances]:
        """Distances in mm from the predicted to the reference surface, and back; both masks must have voxels."""
        return surface_distances(self.predicted, self.reference, self.spacing_mm)


def surface_distances(predicted: Mask, reference: Mask, spacing_mm: tuple[float, ...]) -> tuple[Distances, Distances]:
    """The distance of each surface voxel of one mask to the nearest surface voxel of the other.

    A surface voxel belongs to the mask and has a face neighbour that does not; outside of the array nothing belongs
    to the mask. Distances are between voxel centres.

    Args:
        predicted: bool, any number of axes, at least one voxel set.
        reference: bool, the same shape, at least one voxel set.
        spacing_mm: voxel size along the axes.
    Returns:
        Distances in mm of the predicted surface voxels to the reference surface, and of the reference surface voxels
        to the predicted one, each in the order of `np.argwhere`.
    Source:
        The definition of MONAI's metrics (without sub-voxels). The exact distances of scipy's Euclidean distance
        transform, in time that grows with the surface, not with the box: most surface voxels of a usable prediction
        have the other surface within a few voxels, and are settled by looking at their neighbours, the nearest first;
        a k-d tree answers for the rest.
    """
    offsets, distances = _neighbours(spacing_mm)
    # Surfaces lie so far inside their padded arrays that no step to a neighbour leaves them or wraps around.
    surfaces = [_padded(surface(mask), np.abs(offsets).max(axis=0)) for mask in (predicted, reference)]
    steps = offsets @ np.asarray(surfaces[0].strides)
    return (
        _nearest(surfaces[0], surfaces[1], spacing_mm, steps, distances),
        _nearest(surfaces[1], surfaces[0], spacing_mm, steps, distances),
    )


def surface(mask: Mask) -> Mask:
    """The voxels of a mask with a face neighbour outside of it; what lies beyond the array is outside.

    Args:
        mask: bool, any number of axes.
    """
    inside = np.zeros_like(mask)
    inner = (slice(1, -1),) * mask.ndim
    inside[inner] = mask[inner]
    for axis in range(mask.ndim):
        for side in (slice(None, -2), slice(2, None)):
            inside[inner] &= mask[(*inner[:axis], side, *inner[axis + 1 :])]
    return mask ^ inside


def _padded(mask: Mask, widths: NDArray[np.int64]) -> Mask:
    """The mask with so many empty voxels on either side of each axis, C-contiguous whatever it was."""
    padded = np.zeros([size + 2 * int(width) for size, width in zip(mask.shape, widths, strict=True)], dtype=bool)
    padded[tuple(slice(int(n), int(n) + size) for size, n in zip(mask.shape, widths, strict=True))] = mask
    return padded


@lru_cache(maxsize=64)
def _neighbours(spacing_mm: tuple[float, ...]) -> tuple[NDArray[np.int64], Distances]:
    """The voxels within `REACH` of a voxel, the nearest (itself) first: offsets (n, axes) and distances in mm (n)."""
    radius = REACH * min(spacing_mm)
    reach = [int(radius / s) for s in spacing_mm]
    offsets = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), axis=-1)
    offsets = offsets.reshape(-1, len(spacing_mm))
    distances = np.sqrt(((offsets * np.asarray(spacing_mm)) ** 2).sum(axis=1))
    # The box holds this ball whole: no voxel is left out that is nearer than one that is looked at.
    nearest = np.argsort(distances, kind="stable")[: np.count_nonzero(distances <= radius)]
    return offsets[nearest], distances[nearest]


def _nearest(
    of: Mask, to: Mask, spacing_mm: tuple[float, ...], steps: NDArray[np.int64], distances: Distances
) -> Distances:
    """The distance of each voxel of `of` to the nearest one of `to`; both padded, C-contiguous and not empty."""
    places, target = np.flatnonzero(of), to.ravel()
    num_target = np.count_nonzero(target)
    found, open_, cost = np.empty(places.size), np.arange(places.size), 0
    for step, distance in zip(steps, distances, strict=True):
        hit = target[places[open_] + step]
        found[open_[hit]] = distance
        open_ = open_[~hit]
        cost += open_.size + _OVERHEAD
        if not open_.size:
            return found
        if cost > _TREE * num_target:
            break
    from scipy.spatial import KDTree

    tree = KDTree(np.argwhere(to) * np.asarray(spacing_mm), balanced_tree=False, compact_nodes=False)
    far = np.stack(np.unravel_index(places[open_], of.shape), axis=-1) * np.asarray(spacing_mm)
    found[open_] = tree.query(far)[0]
    return found
