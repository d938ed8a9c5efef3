"""Grey levels and the neighbours of voxels: what the texture matrices are made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.features.settings import Settings

MAX_LEVELS = 5000
"""More different grey levels than this make matrices that mean nothing and fill the memory."""

Levels = NDArray[np.int32]
"""Grey levels 1, 2, …; 0 outside of the region."""


def discretised(values: NDArray[np.float64], settings: Settings) -> Levels:
    """The grey level of each intensity of a region: 1 for the lowest.

    Args:
        values: intensities of the region, shape (n,).
        settings: how many levels there are, or how wide they are.
    Raises:
        MedsegError: E_CONFIG for more than `MAX_LEVELS` levels that occur.
    Source:
        IBSI 1 reference manual, section 2.7: fixed bin number (K15C) and fixed bin size (Q3RU).
    """
    low, high = float(values.min()), float(values.max())
    if settings.bin_width is not None:
        width = settings.bin_width
        if settings.bin_origin is not None:
            low = settings.bin_origin + np.floor((low - settings.bin_origin) / width) * width
        elif settings.intensities is not None and np.isfinite(settings.intensities[0]):
            low = settings.intensities[0]
        levels = np.floor((values - low) / width) + 1
    elif high > low:
        levels = np.floor((settings.bin_count or 1) * ((values - low) / (high - low))) + 1
        levels = np.minimum(levels, settings.bin_count or 1)
    else:
        levels = np.ones_like(values)
    found = len(np.unique(levels))
    if found > MAX_LEVELS or levels.max() > np.iinfo(np.int32).max:
        raise MedsegError(
            Code.CONFIG,
            "there are too many grey levels for a texture",
            where="--bin-width",
            expected=f"at most {MAX_LEVELS}",
            got=f"{found} between {low:g} and {high:g}",
            remedy="take wider bins, or a number of them (--bins 32)",
        )
    return levels.astype(np.int32)


def directions(ndim: int, across: int | None = None) -> list[tuple[int, ...]]:
    """One of each pair of opposite directions to the neighbours by face, edge or corner: 13 in 3D, 4 in 2D.

    Args:
        ndim: number of axes.
        across: an axis along which there are no neighbours.
    """
    every = itertools.product((-1, 0, 1), repeat=ndim)
    return [d for d in every if d > (0,) * ndim and (across is None or d[across] == 0)]


def pairs(levels: Levels, direction: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where the first and where the second voxels of all pairs in a direction stand."""
    first = tuple(slice(max(0, -d), n - max(0, d)) for d, n in zip(direction, levels.shape, strict=True))
    second = tuple(slice(max(0, d), n + min(0, d)) for d, n in zip(direction, levels.shape, strict=True))
    return first, second


def slices(levels: Levels, across: int | None) -> Iterator[Levels]:
    """The slices of a region that hold some of it; the whole where there is no axis across them."""
    if across is None:
        yield levels
        return
    for plane in np.moveaxis(levels, across, 0):
        if plane.any():
            yield plane
