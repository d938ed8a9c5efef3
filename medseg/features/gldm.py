"""Grey level dependence matrix: how many neighbours are of a voxel's own level (Sun and Wee). IBSI: NGLDM."""

from __future__ import annotations

import numpy as np

from medseg.features.levels import Levels, directions, pairs, slices
from medseg.features.size_matrix import FEATURES, SizeMatrix, family_features, merged

CODES = {
    "low_dependence_emphasis": "SODN",
    "high_dependence_emphasis": "IMOQ",
    "low_grey_level_count_emphasis": "TL9H",
    "high_grey_level_count_emphasis": "OAE7",
    "low_dependence_low_grey_level_emphasis": "EQ3F",
    "low_dependence_high_grey_level_emphasis": "JA6D",
    "high_dependence_low_grey_level_emphasis": "NBZI",
    "high_dependence_high_grey_level_emphasis": "9QMG",
    "grey_level_nonuniformity": "FP8K",
    "grey_level_nonuniformity_normalised": "5SPA",
    "dependence_count_nonuniformity": "Z87G",
    "dependence_count_nonuniformity_normalised": "OKJI",
    "dependence_count_percentage": "6XV8",
    "grey_level_variance": "1PFV",
    "dependence_count_variance": "DNX2",
    "dependence_count_entropy": "FCBV",
    "dependence_count_energy": "CAS9",
}
"""Name → identifier of the IBSI (family REK0)."""
NAMES = dict(zip(CODES, FEATURES, strict=True))


def gldm_features(levels: Levels, texture: str, across: int, dependence: float = 0.0) -> dict[str, float]:
    """The features of `CODES`.

    Args:
        levels: of the region, at least one voxel.
        texture: one of `settings.TEXTURES`.
        across: axis from slice to slice.
        dependence: neighbours whose level differs by no more than this count.
    Source:
        IBSI 1 reference manual, section 3.11, distance 1. A voxel counts as one dependence of its own.
    """
    planes = slices(levels, across if texture.startswith("2") else None)
    matrices = [dependences(plane, dependence) for plane in planes]
    if texture.startswith("2.5d"):
        matrices = [merged(matrices)]
    return family_features(matrices, NAMES)


def dependences(levels: Levels, dependence: float) -> SizeMatrix:
    """The level of each voxel, and one more than its number of dependent neighbours."""
    inside = levels > 0
    counts = inside.astype(np.int32)
    for step in directions(levels.ndim):
        first, second = pairs(levels, step)
        depend = inside[first] & inside[second] & (np.abs(levels[first] - levels[second]) <= dependence)
        counts[first] += depend
        counts[second] += depend
    return SizeMatrix(levels[inside], counts[inside], int(inside.sum()))
