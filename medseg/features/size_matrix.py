"""Features of a matrix of grey levels by sizes: of runs (GLRLM), zones (GLSZM) and dependences (GLDM) alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEATURES = (
    "small",
    "large",
    "low",
    "high",
    "small_low",
    "small_high",
    "large_low",
    "large_high",
    "level_nonuniformity",
    "level_nonuniformity_normalised",
    "size_nonuniformity",
    "size_nonuniformity_normalised",
    "percentage",
    "level_variance",
    "size_variance",
    "entropy",
    "energy",
)
"""Names by which the families translate into their own: emphasis of small or large sizes, of low or high grey levels,
and so on, in the order of the IBSI's tables."""


@dataclass(frozen=True)
class SizeMatrix:
    """How often each pair of a grey level and a size occurs, listed by pair.

    Args:
        levels: grey level of each run, zone or voxel, shape (n,).
        sizes: its length, size or dependence, shape (n,).
        num_voxels: of the region, counted once for each direction that was merged.
    """

    levels: NDArray[np.integer]
    sizes: NDArray[np.integer]
    num_voxels: int


def merged(matrices: Sequence[SizeMatrix]) -> SizeMatrix:
    """The sum of matrices."""
    return SizeMatrix(
        np.concatenate([m.levels for m in matrices]),
        np.concatenate([m.sizes for m in matrices]),
        sum(m.num_voxels for m in matrices),
    )


def size_features(matrix: SizeMatrix) -> dict[str, float]:
    """The features of `FEATURES`.

    Source:
        IBSI 1 reference manual, sections 3.7 to 3.11: the same formulas for all these matrices.
    """
    largest = int(matrix.sizes.max()) + 1
    keys, counts = np.unique(matrix.levels.astype(np.int64) * largest + matrix.sizes, return_counts=True)
    level, size = (part.astype(np.float64) for part in np.divmod(keys, largest))
    total = counts.sum()
    p = counts / total
    of_level = np.bincount(np.unique(level, return_inverse=True)[1].ravel(), weights=counts)
    of_size = np.bincount(np.unique(size, return_inverse=True)[1].ravel(), weights=counts)
    values = {
        "small": (p / size**2).sum(),
        "large": (p * size**2).sum(),
        "low": (p / level**2).sum(),
        "high": (p * level**2).sum(),
        "small_low": (p / (level * size) ** 2).sum(),
        "small_high": (p * level**2 / size**2).sum(),
        "large_low": (p * size**2 / level**2).sum(),
        "large_high": (p * (level * size) ** 2).sum(),
        "level_nonuniformity": (of_level**2).sum() / total,
        "level_nonuniformity_normalised": (of_level**2).sum() / total**2,
        "size_nonuniformity": (of_size**2).sum() / total,
        "size_nonuniformity_normalised": (of_size**2).sum() / total**2,
        "percentage": total / matrix.num_voxels,
        "level_variance": (p * (level - (p * level).sum()) ** 2).sum(),
        "size_variance": (p * (size - (p * size).sum()) ** 2).sum(),
        "entropy": entropy(p),
        "energy": (p**2).sum(),
    }
    return {name: float(value) for name, value in values.items()}


def family_features(matrices: Iterable[SizeMatrix], names: Mapping[str, str]) -> dict[str, float]:
    """The mean of each feature over matrices, by the names of a family.

    Args:
        matrices: one for each direction or slice.
        names: feature of a family → one of `FEATURES`.
    """
    return mean_of_features(
        ({name: values[key] for name, key in names.items()} for values in map(size_features, matrices)), names
    )


def mean_of_features(parts: Iterable[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    """The mean of each feature over those that have it; NaN where none has."""
    found = list(parts)
    means = {}
    for name in names:
        defined = [float(part[name]) for part in found if not np.isnan(part[name])]
        means[name] = float(np.mean(defined)) if defined else float("nan")
    return means


def entropy(p: NDArray[np.float64]) -> float:
    """Shannon's entropy in bits."""
    positive = p[p > 0]
    return float(-(positive * np.log2(positive)).sum()) + 0.0
