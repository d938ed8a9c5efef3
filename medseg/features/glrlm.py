"""Grey level run length matrix: how long levels go on along a direction (Galloway)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.features.levels import Levels, directions, slices
from medseg.features.size_matrix import SizeMatrix, family_features, merged

CODES = {
    "short_runs_emphasis": "22OV",
    "long_runs_emphasis": "W4KF",
    "low_grey_level_run_emphasis": "V3SW",
    "high_grey_level_run_emphasis": "G3QZ",
    "short_run_low_grey_level_emphasis": "HTZT",
    "short_run_high_grey_level_emphasis": "GD3A",
    "long_run_low_grey_level_emphasis": "IVPO",
    "long_run_high_grey_level_emphasis": "3KUM",
    "grey_level_nonuniformity": "R5YN",
    "grey_level_nonuniformity_normalised": "OVBL",
    "run_length_nonuniformity": "W92Y",
    "run_length_nonuniformity_normalised": "IC23",
    "run_percentage": "9ZK5",
    "grey_level_variance": "8CE5",
    "run_length_variance": "SXLW",
    "run_entropy": "HJ9O",
}
"""Name → identifier of the IBSI (family TP0I)."""
NAMES = dict(
    zip(
        CODES,
        ("small", "large", "low", "high", "small_low", "small_high", "large_low", "large_high", "level_nonuniformity",
         "level_nonuniformity_normalised", "size_nonuniformity", "size_nonuniformity_normalised", "percentage",
         "level_variance", "size_variance", "entropy"),
        strict=True,
    )
)  # fmt: skip


def glrlm_features(levels: Levels, texture: str, across: int) -> dict[str, float]:
    """The features of `CODES`.

    Args:
        levels: of the region, at least one voxel.
        texture: one of `settings.TEXTURES`.
        across: axis from slice to slice.
    Source:
        IBSI 1 reference manual, section 3.7.
    """
    flat, by_slice = texture.startswith("2"), texture.startswith("2d")
    parts = []
    for plane in slices(levels, across if by_slice else None):
        steps = directions(plane.ndim, across=across if flat and not by_slice else None)
        parts.append([runs(plane, step) for step in steps])
    if texture.endswith("merged"):
        parts = [[merged(of_slice)] for of_slice in parts]
    return family_features((matrix for of_slice in parts for matrix in of_slice), NAMES)


def runs(levels: Levels, step: tuple[int, ...]) -> SizeMatrix:
    """The level and length of each run along a direction."""
    padded = np.pad(levels, 1)
    flat = padded.ravel()
    offset = int(np.dot(step, [stride // padded.itemsize for stride in padded.strides]))
    inside = np.flatnonzero(flat)
    begin = inside[flat[inside - offset] != flat[inside]]
    level = flat[begin]
    length: NDArray[np.int64] = np.ones(len(begin), dtype=np.int64)
    going, here = np.arange(len(begin)), begin
    while len(going):
        here = here + offset
        goes_on = flat[here] == level[going]
        going, here = going[goes_on], here[goes_on]
        length[going] += 1
    return SizeMatrix(level, length, len(inside))
