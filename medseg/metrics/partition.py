"""V_rand and V_info of the ISBI 2012 challenge: whether cells are separated, however thin the membranes between them.

A picture of membranes is a partition into cells. One missing pixel of membrane merges two cells: it hardly changes
Dice, and costs much here. `v_rand` and `v_info` take the class for the cells, `membrane_v_rand` and
`membrane_v_info` take it for the membranes. Cells are connected by faces (4 neighbours in 2D); volumes are
partitioned in 3D, pictures and single slices in 2D.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.metrics.components import Overlaps, components
from medseg.metrics.masks import ClassMasks, InstanceMap, Mask, State
from medseg.metrics.metric import metric


@dataclass(frozen=True)
class PartitionScores:
    """How two partitions agree: 1 where they are the same.

    Args:
        rand_split: share of the reference's pairs of voxels of one segment that the prediction keeps together.
        rand_merge: share of the prediction's pairs of voxels of one segment that belong together.
        v_rand: their harmonic mean, the foreground-restricted Rand F-score.
        info_split: mutual information over the entropy of the prediction.
        info_merge: mutual information over the entropy of the reference.
        v_info: their harmonic mean, the foreground-restricted information-theoretic F-score.
    """

    rand_split: float
    rand_merge: float
    v_rand: float
    info_split: float
    info_merge: float
    v_info: float


def partition_scores(predicted: InstanceMap, reference: InstanceMap) -> PartitionScores:
    """Compare two partitions over the voxels that are a segment in the reference.

    Args:
        predicted: integers, shape (*S): a number for each segment; 0 is membrane, of which each voxel that lies in a
            segment of the reference counts as a segment of its own.
        reference: the same shape; 0 is membrane, and not counted. At least one voxel is not 0.
    Raises:
        MedsegError: E_GRID if the shapes differ, E_LABEL for numbers that are negative or not integers.
    Source:
        Arganda-Carreras et al., Crowdsourcing the creation of image segmentation algorithms for connectomics,
        Frontiers in Neuroanatomy 2015, equations 1 to 6 with α = 1/2; the normalization by n² and the segments of one
        voxel are those of the challenge's program (Fiji, Trainable_Segmentation).
    """
    overlaps = Overlaps.of(predicted, reference)
    counted = overlaps.reference > 0
    ours, theirs, voxels = overlaps.predicted[counted], overlaps.reference[counted], overlaps.voxels[counted]
    single, total = int(voxels[ours == 0].sum()), int(voxels.sum())
    joint = np.concatenate([voxels[ours > 0], np.ones(single, np.int64)]) / total
    of_predicted = np.concatenate([_sums(ours[ours > 0], voxels[ours > 0]), np.ones(single, np.int64)]) / total
    of_reference = _sums(theirs, voxels) / total
    pairs = float((joint**2).sum())
    split, merge = pairs / float((of_reference**2).sum()), pairs / float((of_predicted**2).sum())
    entropies = _entropy(of_predicted), _entropy(of_reference)
    shared = max(entropies[0] + entropies[1] - _entropy(joint), 0.0)
    info_split, info_merge = (shared / entropy if entropy else 1.0 for entropy in entropies)
    v_info = 2 * shared / sum(entropies) if sum(entropies) else 1.0
    return PartitionScores(split, merge, 2 * split * merge / (split + merge), info_split, info_merge, v_info)


def thinned_cells(cells: Mask) -> NDArray[np.int32]:
    """The cells as segments, grown until one voxel of membrane is left between them.

    Args:
        cells: bool, any number of axes.
    Returns:
        int32 map: 0 is membrane, each cell has a number.
    Source:
        Border thinning as in Arganda-Carreras et al. 2015: the width of a membrane is a matter of taste, that it
        separates is not. Here by a watershed of the distance to the cells, which keeps the middle line, and removes
        membranes that end within a cell, as they separate nothing.
    """
    from skimage.segmentation import watershed  # slow to import, needed by few

    markers, _ = components(cells, by_faces=True)
    segments: NDArray[np.int32] = watershed(
        ndimage.distance_transform_edt(~cells), markers, connectivity=1, watershed_line=True
    )
    return segments


@metric("v_rand", title="V_rand", better="higher", dimension="ratio", default=False)
def v_rand(masks: ClassMasks) -> float:
    """Foreground-restricted Rand F-score after border thinning; the class is the cells.

    0 for a missed or spurious structure.

    Source:
        Arganda-Carreras et al., Frontiers in Neuroanatomy 2015 (ISBI 2012 challenge).
    """
    return _of_cells(masks).v_rand if masks.state is State.PRESENT else 0.0


@metric("v_info", title="V_info", better="higher", dimension="ratio", default=False)
def v_info(masks: ClassMasks) -> float:
    """Foreground-restricted information-theoretic F-score after border thinning; the class is the cells.

    0 for a missed or spurious structure.

    Source:
        Arganda-Carreras et al., Frontiers in Neuroanatomy 2015 (ISBI 2012 challenge).
    """
    return _of_cells(masks).v_info if masks.state is State.PRESENT else 0.0


@metric("membrane_v_rand", title="V_rand(m)", better="higher", dimension="ratio", default=False)
def membrane_v_rand(masks: ClassMasks) -> float:
    """As `v_rand`; the class is the membranes, and all that is not membrane is cells."""
    return _of_membranes(masks).v_rand if _can_be_membranes(masks) else 0.0


@metric("membrane_v_info", title="V_info(m)", better="higher", dimension="ratio", default=False)
def membrane_v_info(masks: ClassMasks) -> float:
    """As `v_info`; the class is the membranes, and all that is not membrane is cells."""
    return _of_membranes(masks).v_info if _can_be_membranes(masks) else 0.0


def _of_cells(masks: ClassMasks) -> PartitionScores:
    if masks.instances is not None:
        return partition_scores(*masks.instances)
    return partition_scores(thinned_cells(masks.predicted), components(masks.reference, by_faces=True)[0])


def _of_membranes(masks: ClassMasks) -> PartitionScores:
    # Cells reach beyond the crop, and are connected there.
    cells = [~np.pad(mask, masks.margins) for mask in (masks.predicted, masks.reference)]
    return partition_scores(thinned_cells(cells[0]), components(cells[1], by_faces=True)[0])


def _can_be_membranes(masks: ClassMasks) -> bool:
    """Whether both masks have membranes, and both leave room for cells."""
    return masks.state is State.PRESENT and bool(masks.tn + masks.fp) and bool(masks.tn + masks.fn)


def _sums(ids: NDArray[np.int64], voxels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Number of voxels of each segment."""
    _, inverse = np.unique(ids, return_inverse=True)
    return np.asarray(np.bincount(inverse, weights=voxels), dtype=np.float64)


def _entropy(shares: NDArray[np.float64]) -> float:
    """Of shares that sum to 1 and are not 0, in nats."""
    return float(-(shares * np.log(shares)).sum())
