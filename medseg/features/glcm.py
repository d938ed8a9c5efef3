"""Grey level co-occurrence matrix: which levels stand side by side (Haralick)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from medseg.features.levels import Levels, directions, pairs, slices
from medseg.features.size_matrix import entropy, mean_of_features

CODES = {
    "joint_maximum": "GYBY",
    "joint_average": "60VM",
    "joint_variance": "UR99",
    "joint_entropy": "TU9B",
    "difference_average": "TF7R",
    "difference_variance": "D3YU",
    "difference_entropy": "NTRS",
    "sum_average": "ZGXS",
    "sum_variance": "OEEB",
    "sum_entropy": "P6QZ",
    "angular_second_moment": "8ZQL",
    "contrast": "ACUI",
    "dissimilarity": "8S9J",
    "inverse_difference": "IB1Z",
    "inverse_difference_normalised": "NDRX",
    "inverse_difference_moment": "WF0Z",
    "inverse_difference_moment_normalised": "1QCO",
    "inverse_variance": "E8JP",
    "correlation": "NI2N",
    "autocorrelation": "QWB0",
    "cluster_tendency": "DG8W",
    "cluster_shade": "7NFM",
    "cluster_prominence": "AE86",
    "information_correlation_1": "R8DG",
    "information_correlation_2": "JN9H",
}
"""Name → identifier of the IBSI (family LFYI)."""

Matrix = NDArray[np.float64]


def glcm_features(levels: Levels, texture: str, across: int) -> dict[str, float]:
    """The features of `CODES`.

    Args:
        levels: of the region, at least one voxel.
        texture: one of `settings.TEXTURES`.
        across: axis from slice to slice.
    Returns:
        NaN where no two voxels of the region are neighbours; correlations are NaN where only one level has neighbours.
    Source:
        IBSI 1 reference manual, section 3.6. Distance 1; matrices are symmetric; logarithms are to the base 2.
    """
    values = np.unique(levels[levels > 0])
    ranks = np.searchsorted(np.append(0, values), levels).astype(
        np.int32
    )  # the matrix has a row for each level that occurs
    flat = texture.startswith("2")
    by_slice = texture.startswith("2d")
    parts: list[list[Matrix]] = []
    for plane in slices(ranks, across if by_slice else None):
        steps = directions(plane.ndim, across if flat and not by_slice else None)
        parts.append([_matrix(plane, step, len(values)) for step in steps])
    if texture.endswith("merged"):
        parts = [[sum(of_slice, np.zeros((len(values),) * 2))] for of_slice in parts]
    highest = int(values[-1])
    return mean_of_features((_features(matrix, values.astype(np.float64), highest) for matrix in _filled(parts)), CODES)


def _filled(parts: Iterable[list[Matrix]]) -> Iterable[Matrix]:
    return (matrix for of_slice in parts for matrix in of_slice if matrix.any())


def _matrix(ranks: Levels, step: tuple[int, ...], size: int) -> Matrix:
    """How often each pair of levels occurs in a direction and its opposite: (size, size)."""
    first, second = (ranks[where] for where in pairs(ranks, step))
    both = (first > 0) & (second > 0)
    index = (first[both].astype(np.int64) - 1) * size + second[both] - 1
    counts = np.bincount(index, minlength=size * size).reshape(size, size).astype(np.float64)
    symmetric: Matrix = counts + counts.T
    return symmetric


def _features(matrix: Matrix, values: NDArray[np.float64], highest: int) -> dict[str, float]:
    p = matrix / matrix.sum()
    i, j = values[:, None], values[None, :]
    apart, together = np.abs(i - j), i + j
    marginal = p.sum(axis=1)
    mean = float((values * marginal).sum())
    variance = float(((values - mean) ** 2 * marginal).sum())
    differences, of_difference = _distribution(apart, p)
    sums, of_sum = _distribution(together, p)
    difference_average = float((differences * of_difference).sum())
    sum_average = float((sums * of_sum).sum())
    deviation = together - 2 * mean
    joint = entropy(p)
    own = entropy(marginal)
    independent = marginal[:, None] * marginal[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = -float((p[p > 0] * np.log2(independent[p > 0])).sum())
        correlation = ((i * j * p).sum() - mean**2) / variance if variance > 0 else np.nan
        information = (joint - between) / own if own > 0 else np.nan
    far = apart > 0
    return {
        "joint_maximum": p.max(),
        "joint_average": mean,
        "joint_variance": variance,
        "joint_entropy": joint,
        "difference_average": difference_average,
        "difference_variance": ((differences - difference_average) ** 2 * of_difference).sum(),
        "difference_entropy": entropy(of_difference),
        "sum_average": sum_average,
        "sum_variance": ((sums - sum_average) ** 2 * of_sum).sum(),
        "sum_entropy": entropy(of_sum),
        "angular_second_moment": (p**2).sum(),
        "contrast": (apart**2 * p).sum(),
        "dissimilarity": (apart * p).sum(),
        "inverse_difference": (p / (1 + apart)).sum(),
        "inverse_difference_normalised": (p / (1 + apart / highest)).sum(),
        "inverse_difference_moment": (p / (1 + apart**2)).sum(),
        "inverse_difference_moment_normalised": (p / (1 + (apart / highest) ** 2)).sum(),
        "inverse_variance": (p[far] / apart[far] ** 2).sum(),
        "correlation": correlation,
        "autocorrelation": (i * j * p).sum(),
        "cluster_tendency": (deviation**2 * p).sum(),
        "cluster_shade": (deviation**3 * p).sum(),
        "cluster_prominence": (deviation**4 * p).sum(),
        "information_correlation_1": information,
        "information_correlation_2": np.sqrt(max(0.0, 1 - np.exp(-2 * (entropy(independent) - joint)))),
    }


def _distribution(keys: Matrix, p: Matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The values of sums or differences of levels that occur, and how probable each is."""
    found, index = np.unique(keys, return_inverse=True)
    return found, np.bincount(index.ravel(), weights=p.ravel()).astype(np.float64)
