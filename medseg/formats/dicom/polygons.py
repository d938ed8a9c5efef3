"""Outlines of regions: from polygons to pixels and from pixels to polygons, in index coordinates (pixel centres whole).

The rule of `fill`: a pixel belongs to a polygon if its centre lies inside by the even-odd rule. A centre on an edge
belongs to the side where the second coordinate grows (on an edge of constant first coordinate, where the first
grows), so of two polygons that share an edge exactly one takes it. DICOM counts every point on the path in (PS3.3
C.8.8.6.3); then neighbours would overlap, and a structure would be larger than its outline.
"""

from __future__ import annotations

from itertools import pairwise

import contourpy
import numpy as np
from numpy.typing import NDArray

MAX_CROSSINGS = 2**22
"""Crossings of edges and rows that are held at a time (some hundred MB)."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def fill(points: FloatArray, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels whose centres lie inside a closed polygon; see the module for the rule.

    Args:
        points: (n, 2) finite vertices in index coordinates; the last one is joined to the first. It may cross or touch
            itself, run along a channel and back (keyhole), and leave the array.
        shape: of the array.
    Returns:
        bool, `shape`.
    """
    mask = np.zeros(shape, dtype=np.bool_)
    points = np.asarray(points, dtype=np.float64)
    if len(points) < 3:
        return mask
    low = np.clip(np.ceil(points.min(axis=0)), 0, shape).astype(np.int64)
    high = np.clip(np.floor(points.max(axis=0)) + 1, low, shape).astype(np.int64)
    rows, columns = high - low
    if not (rows and columns):
        return mask
    box = points - low
    ends = np.roll(box, -1, axis=0)
    # Every edge upwards: one that is run both ways (a channel, a shared edge) crosses each row at the very same place.
    up = (box[:, :1] < ends[:, :1]) | ((box[:, :1] == ends[:, :1]) & (box[:, 1:] < ends[:, 1:]))
    start, end = np.where(up, box, ends), np.where(up, ends, box)
    first = np.clip(np.ceil(start[:, 0]), 0, rows).astype(np.int64)
    count = np.clip(np.ceil(end[:, 0]), 0, rows).astype(np.int64) - first
    crossed = count > 0
    start, end, first, count = start[crossed], end[crossed], first[crossed], count[crossed]
    parity = np.zeros((rows, columns + 1), dtype=np.uint8)
    for part in _parts(count):
        parity ^= _toggles(start[part], end[part], first[part], count[part], parity.shape)
    inside = np.bitwise_xor.accumulate(parity, axis=1)[:, :columns]
    mask[low[0] : high[0], low[1] : high[1]] = inside.astype(np.bool_)
    return mask


def _parts(count: IntArray) -> list[slice]:
    """Cut the edges so that each part has at most about `MAX_CROSSINGS` crossings."""
    number = np.cumsum(count) // MAX_CROSSINGS
    bounds = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(count)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _toggles(
    start: FloatArray, end: FloatArray, first: IntArray, count: IntArray, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """1 at the first pixel of a row whose centre is not before a crossing, for an odd number of such crossings.

    Args:
        start: (n, 2) lower end of each edge.
        end: (n, 2) upper end.
        first: (n,) first row that an edge crosses.
        count: (n,) number of rows that it crosses.
        shape: rows, columns + 1.
    """
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    slope = (end[:, 1] - start[:, 1]) / (end[:, 0] - start[:, 0])
    place = start[edge, 1] + (row - start[edge, 0]) * slope[edge]
    column = np.clip(np.ceil(place), 0, shape[1] - 1).astype(np.int64)
    number = np.bincount(row * shape[1] + column, minlength=shape[0] * shape[1])
    return (number & 1).astype(np.uint8).reshape(shape)


def trace(mask: NDArray[np.bool_]) -> list[FloatArray]:
    """The outlines of a mask, half-way between the centres of pixels inside and outside.

    One polygon for each region of pixels that share sides; regions that touch at corners are apart. A hole is joined
    to the outline around it by a channel without width ("keyhole", DICOM PS3.3 C.8.8.6.3), which runs through pixels
    of the region. Corners are cut, so an area is about half a pixel less than its pixels. Joined by exclusive or, as by
    union, the polygons give the mask back exactly.

    Args:
        mask: 2D.
    Returns:
        For each region (n, 2) vertices in index coordinates, multiples of a half; the first is not repeated.
    Source:
        Marching squares, as contourpy does it (Lorensen and Cline, SIGGRAPH 1987, in two dimensions).
    """
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return []
    inside = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    lines = contourpy.contour_generator(z=inside.astype(np.float64), line_type=contourpy.LineType.Separate).lines(0.5)
    rings = [np.asarray(line, dtype=np.float64)[:-1, ::-1] for line in lines]  # (x, y) → (row, column)
    corner = np.array([rows[0] - 1, columns[0] - 1])
    return [_without_idle_points(polygon) + corner for polygon in _join_holes(rings, inside)]


def _join_holes(rings: list[FloatArray], inside: NDArray[np.bool_]) -> list[FloatArray]:
    """The outer rings, with each hole spliced into the ring that a walk from its first column backwards meets.

    The walk starts at a point of the hole between two pixels of one row and ends at the next such point, which lies on
    the outline or on a hole that begins earlier: so holes that begin last are joined first, and none twice.
    """
    is_hole = np.array([_signed_area(ring) for ring in rings]) > 0
    if not is_hole.any():
        return rings
    holes = np.flatnonzero(is_hole)
    starts = [int(ring[:, 1].argmin()) for ring in rings]
    column = np.arange(inside.shape[1])
    last_outside = np.maximum.accumulate(np.where(inside, -1, column), axis=1)
    keys = np.concatenate([_keys(ring, inside.shape) for ring in rings])
    owner = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    position = np.concatenate([np.arange(len(ring)) for ring in rings])
    order = np.argsort(keys)
    children: dict[int, list[tuple[int, FloatArray]]] = {}
    for hole in sorted(holes.tolist(), key=lambda h: -rings[h][starts[h], 1]):
        row, edge = rings[hole][starts[hole]]
        met = np.array([[row, last_outside[int(row), int(edge - 0.5)] + 0.5]])
        found = order[np.searchsorted(keys, _keys(met, inside.shape), sorter=order)[0]]
        ring = _spliced(rings[hole], children.pop(hole, []))
        first = int(np.flatnonzero((ring == (row, edge)).all(axis=1))[0])
        loop = np.concatenate([ring[first:], ring[: first + 1]])
        children.setdefault(int(owner[found]), []).append((int(position[found]), loop))
    return [_spliced(rings[n], children.get(n, [])) for n in np.flatnonzero(~is_hole).tolist()]


def _keys(points: FloatArray, shape: tuple[int, ...]) -> IntArray:
    """One whole number for each point of multiples of a half."""
    row, column = np.rint(2 * points).astype(np.int64).T
    return np.asarray(row * 2 * shape[1] + column, dtype=np.int64)


def _spliced(ring: FloatArray, loops: list[tuple[int, FloatArray]]) -> FloatArray:
    """A ring that goes, at some of its points, around a closed loop and comes back to the point."""
    pieces: list[FloatArray] = []
    done = 0
    for position, loop in sorted(loops, key=lambda item: item[0]):
        pieces += [ring[done : position + 1], loop]
        done = position  # the point itself comes again after the loop
    return np.concatenate([*pieces, ring[done:]])


def _signed_area(ring: FloatArray) -> float:
    """Twice the area, positive where (row, column) turn to the left."""
    following = np.roll(ring, -1, axis=0)
    return float((ring[:, 0] * following[:, 1] - ring[:, 1] * following[:, 0]).sum())


def _without_idle_points(ring: FloatArray) -> FloatArray:
    """Leave out points on a straight way on; turning points of channels stay."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    straight = (before[:, 0] * after[:, 1] == before[:, 1] * after[:, 0]) & ((before * after).sum(axis=1) > 0)
    kept: FloatArray = ring[~straight]
    return kept
