"""Grey level size zone matrix: how large the patches of one level are (Thibault)."""

from __future__ import annotations

import numpy as np
from skimage.measure import label

from medseg.features.levels import Levels, slices
from medseg.features.size_matrix import SizeMatrix, family_features, merged

CODES = {
    "small_zone_emphasis": "5QRC",
    "large_zone_emphasis": "48P8",
    "low_grey_level_zone_emphasis": "XMSY",
    "high_grey_level_zone_emphasis": "5GN9",
    "small_zone_low_grey_level_emphasis": "5RAI",
    "small_zone_high_grey_level_emphasis": "HW1V",
    "large_zone_low_grey_level_emphasis": "YH51",
    "large_zone_high_grey_level_emphasis": "J17V",
    "grey_level_nonuniformity": "JNSA",
    "grey_level_nonuniformity_normalised": "Y1RO",
    "zone_size_nonuniformity": "4JP3",
    "zone_size_nonuniformity_normalised": "VB3A",
    "zone_percentage": "P30P",
    "grey_level_variance": "BYLV",
    "zone_size_variance": "3NSA",
    "zone_size_entropy": "GU8N",
}
"""Name → identifier of the IBSI (family 9SAK)."""
NAMES = dict(
    zip(
        CODES,
        ("small", "large", "low", "high", "small_low", "small_high", "large_low", "large_high", "level_nonuniformity",
         "level_nonuniformity_normalised", "size_nonuniformity", "size_nonuniformity_normalised", "percentage",
         "level_variance", "size_variance", "entropy"),
        strict=True,
    )
)  # fmt: skip


def glszm_features(levels: Levels, texture: str, across: int) -> dict[str, float]:
    """The features of `CODES`.

    Args:
        levels: of the region, at least one voxel.
        texture: one of `settings.TEXTURES`.
        across: axis from slice to slice.
    Source:
        IBSI 1 reference manual, section 3.8: voxels of a zone touch by face, edge or corner.
    """
    matrices = [zones(plane) for plane in slices(levels, across if texture.startswith("2") else None)]
    if texture.startswith("2.5d"):
        matrices = [merged(matrices)]
    return family_features(matrices, NAMES)


def zones(levels: Levels) -> SizeMatrix:
    """The level and size of each zone."""
    numbered = label(levels, background=0, connectivity=levels.ndim)
    inside = levels > 0
    number = numbered[inside]
    sizes = np.bincount(number)[1:]
    of_zone = np.zeros(len(sizes), dtype=np.int64)
    of_zone[number - 1] = levels[inside]
    return SizeMatrix(of_zone, sizes, int(inside.sum()))
