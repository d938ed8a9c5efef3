"""Neighbourhood grey tone difference matrix: how much voxels differ from their surroundings (Amadasun and King)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.features.levels import Levels, directions, pairs, slices
from medseg.features.size_matrix import mean_of_features

CODES = {"coarseness": "QCDE", "contrast": "65HE", "busyness": "NQ30", "complexity": "HDEZ", "strength": "1X9X"}
"""Name → identifier of the IBSI (family IPET)."""
MAX_COARSENESS = 1e6
"""Of a region without any difference, as the IBSI says."""

Differences = tuple[NDArray[np.integer], NDArray[np.float64]]


def ngtdm_features(levels: Levels, texture: str, across: int) -> dict[str, float]:
    """The features of `CODES`.

    Args:
        levels: of the region, at least one voxel.
        texture: one of `settings.TEXTURES`.
        across: axis from slice to slice.
    Returns:
        NaN where no two voxels of the region are neighbours.
    Source:
        IBSI 1 reference manual, section 3.10, distance 1: only voxels with a neighbour in the region count.
    """
    planes = slices(levels, across if texture.startswith("2") else None)
    parts = [differences(plane) for plane in planes]
    if texture.startswith("2.5d"):
        parts = [(np.concatenate([level for level, _ in parts]), np.concatenate([apart for _, apart in parts]))]
    return mean_of_features((_features(*part) for part in parts if len(part[0])), CODES)


def differences(levels: Levels) -> Differences:
    """Of each voxel with neighbours in the region: its level, and how far from their mean it is."""
    inside = levels > 0
    total = np.zeros(levels.shape)
    count = np.zeros(levels.shape, dtype=np.int32)
    for step in directions(levels.ndim):
        first, second = pairs(levels, step)
        total[first] += levels[second]
        total[second] += levels[first]
        count[first] += inside[second]
        count[second] += inside[first]
    counted = inside & (count > 0)
    return levels[counted], np.abs(levels[counted] - total[counted] / count[counted])


def _features(levels: NDArray[np.integer], apart: NDArray[np.float64]) -> dict[str, float]:
    values, index = np.unique(levels, return_inverse=True)
    i = values.astype(np.float64)
    n = len(levels)
    p = np.bincount(index) / n
    s = np.bincount(index, weights=apart)
    weighted = float((p * s).sum())
    across = i[:, None] - i[None, :]
    several = len(i) > 1
    both = p[:, None] + p[None, :]
    spread = float(np.abs((i * p)[:, None] - (i * p)[None, :]).sum())
    of_levels = (p[:, None] * p[None, :] * across**2).sum() / (len(i) * (len(i) - 1)) if several else 0.0
    return {
        "coarseness": min(1 / weighted, MAX_COARSENESS) if weighted > 0 else MAX_COARSENESS,
        "contrast": float(of_levels * s.sum() / n),
        "busyness": weighted / spread if several and spread > 0 else 0.0,
        "complexity": float((np.abs(across) * ((p * s)[:, None] + (p * s)[None, :]) / both).sum() / n),
        "strength": float((both * across**2).sum() / s.sum()) if s.sum() > 0 else 0.0,
    }
