"""What a metric may ask about one class of one case: counts, masks and surface distances, each computed once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

Mask = NDArray[np.bool_]
Distances = NDArray[np.float64]


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
        voxel_volume: volume of one voxel in ml (1 for pictures).
        diagonal_mm: length of the diagonal of the whole case, from edge to edge.
        tolerance_mm: what the surface Dice forgives.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    predicted: Mask
    reference: Mask
    spacing_mm: tuple[float, ...]
    voxel_volume: float
    diagonal_mm: float
    tolerance_mm: float

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
        to the predicted one.
    Source:
        The definition of MONAI's metrics (without sub-voxels). A k-d tree over the surface voxels gives the exact
        distances of scipy's Euclidean distance transform, in time that grows with the surface, not with the box.
    """
    points = [np.argwhere(_surface(mask)) * np.asarray(spacing_mm) for mask in (predicted, reference)]
    trees = [KDTree(p, balanced_tree=False, compact_nodes=False) for p in points]
    to_reference = np.asarray(trees[1].query(points[0])[0], dtype=np.float64)
    to_predicted = np.asarray(trees[0].query(points[1])[0], dtype=np.float64)
    return to_reference, to_predicted


def _surface(mask: Mask) -> Mask:
    surface: Mask = mask & ~ndimage.binary_erosion(mask)
    return surface
