"""Polygons to pixels and back."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from numpy.typing import NDArray
from scipy.ndimage import label

from medseg.formats.dicom import polygons
from medseg.formats.dicom.polygons import fill, trace

SHAPE = (13, 17)

masks = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))
"""Noise: holes, islands in holes, corners that touch, pixels at the edge."""


def centres(shape: tuple[int, int]) -> NDArray[np.float64]:
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 2).astype(float)


def odd_windings(points: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Even-odd by another road: a loop over pixels and edges with the ray along the other axis."""
    inside = np.zeros(shape, dtype=bool)
    for (y, x), (y2, x2) in zip(points, np.roll(points, -1, axis=0), strict=True):
        for row, column in np.ndindex(*shape):
            if (x > column) != (x2 > column) and row < y + (column - x) * (y2 - y) / (x2 - x):
                inside[row, column] ^= True
    return inside


def inside_by_matplotlib(points: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    return Outline(points).contains_points(centres(shape)).reshape(shape)


def joined(outlines: list[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.zeros(shape, dtype=bool)
    for outline in outlines:
        mask ^= fill(outline, shape)
    return mask


@given(st.integers(3, 12), st.integers(0, 2**32 - 1))
def test_fill_agrees_with_crossings_along_the_other_axis(num_points: int, seed: int) -> None:
    """Polygons that cross themselves and leave the array; random vertices never meet a centre."""
    points = np.random.default_rng(seed).uniform(-4, 20, (num_points, 2))
    np.testing.assert_array_equal(fill(points, SHAPE), odd_windings(points, SHAPE))


@given(st.floats(2, 8), st.floats(-6, 6), st.floats(-6, 6), st.integers(0, 2**32 - 1))
def test_fill_agrees_with_matplotlib(radius: float, y: float, x: float, seed: int) -> None:
    """Stars, which do not cross themselves."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ray = radius * rng.uniform(0.4, 1, 40)
    points = np.stack([6 + y + ray * np.sin(angle), 8 + x + ray * np.cos(angle)], axis=1)
    np.testing.assert_array_equal(fill(points, SHAPE), inside_by_matplotlib(points, SHAPE))


def test_a_rectangle_through_centres_takes_its_lower_edges_and_leaves_the_upper() -> None:
    mask = fill(np.array([[2, 3], [2, 7], [5, 7], [5, 3]], dtype=float), SHAPE)
    expected = np.zeros(SHAPE, dtype=bool)
    expected[2:5, 3:7] = True
    np.testing.assert_array_equal(mask, expected)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 16)), min_size=1, max_size=5), st.booleans())
def test_polygons_that_share_an_edge_share_no_centre_and_miss_none(cut: list[tuple[int, int]], across: bool) -> None:
    """A frame around all centres, cut by a line through the very centres, run in opposite directions by the two."""
    line = np.array(cut, dtype=float)
    ends = np.array([[-1, 5], [13, 9]]) if across else np.array([[4, -1], [8, 17]])
    line = np.concatenate([ends[:1], line, ends[1:]])
    corners = np.array([[-1, -1], [-1, 17], [13, 17], [13, -1]], dtype=float)
    if across:  # from the upper to the lower side
        one, other = [corners[3], corners[0]], [corners[2], corners[1]]
    else:  # from the left to the right
        one, other = [corners[1], corners[0]], [corners[2], corners[3]]
    first = fill(np.concatenate([line, one]), SHAPE)
    second = fill(np.concatenate([line[::-1], other[::-1]]), SHAPE)
    assert (first ^ second).all()


@pytest.mark.parametrize(
    ("place", "start"),
    [(4, [4, 0.5]), (1, [0.5, 4]), (1, [0.5, 0.5])],
    ids=["along a row", "along a column", "slantwise"],
)
def test_a_channel_without_width_changes_nothing(place: int, start: list[float]) -> None:
    """It runs through centres, from a frame to the corner of a hole."""
    outer = [[0.5, 0.5], [0.5, 9.5], [9.5, 9.5], [9.5, 0.5]]
    hole = [[4, 4], [4, 6.4], [6.4, 6.4], [6.4, 4]]
    keyhole = np.array([*outer[:place], start, *hole, hole[0], start, *outer[place:]])
    expected = fill(np.array(outer), SHAPE) ^ fill(np.array(hole), SHAPE)
    assert expected.sum() == 9 * 9 - 3 * 3
    np.testing.assert_array_equal(fill(keyhole, SHAPE), expected)


@pytest.mark.parametrize("points", [np.zeros((0, 2)), np.ones((2, 2)), np.full((5, 2), 3.0), np.full((4, 2), 1e9)])
def test_nothing_is_filled_without_an_area(points: NDArray[np.float64]) -> None:
    assert not fill(points, SHAPE).any()


def test_a_polygon_around_everything_fills_everything() -> None:
    assert fill(np.array([[-1e6, -1e6], [-1e6, 1e6], [1e6, 1e6], [1e6, -1e6]]), SHAPE).all()


def test_many_crossings_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(1).uniform(-2, 18, (200, 2))
    whole = fill(points, SHAPE)
    monkeypatch.setattr(polygons, "MAX_CROSSINGS", 50)
    np.testing.assert_array_equal(fill(points, SHAPE), whole)


@settings(max_examples=300)
@given(masks)
def test_trace_gives_the_mask_back(mask: NDArray[np.bool_]) -> None:
    outlines = trace(mask)
    np.testing.assert_array_equal(joined(outlines, mask.shape), mask)
    assert len(outlines) == label(mask)[1]  # one for each region; holes are within


@settings(max_examples=100)
@given(masks, st.sampled_from([(0.3, 0.0), (-0.3, 0.1), (0.2, -0.2)]))
def test_outlines_keep_away_from_centres(mask: NDArray[np.bool_], shift: tuple[float, float]) -> None:
    """Rounding moves no pixel, whoever reads the outlines: shifted by a third of a pixel they enclose the same,
    keyholes and all."""
    np.testing.assert_array_equal(joined([o + np.array(shift) for o in trace(mask)], mask.shape), mask)


def test_another_reader_sees_the_hole() -> None:
    mask = np.ones((9, 9), dtype=bool)
    mask[3:6, 4:7] = False
    mask[4, 5] = True  # an island
    outlines = trace(mask)
    assert len(outlines) == 2
    seen = np.logical_or.reduce([inside_by_matplotlib(outline - 1e-3, mask.shape) for outline in outlines])
    np.testing.assert_array_equal(seen, mask)


def test_outlines_have_no_more_points_than_they_need() -> None:
    mask = np.zeros((30, 40), dtype=bool)
    mask[5:25, 7:33] = True
    (outline,) = trace(mask)
    assert len(outline) == 8  # a corner is cut: two points
    assert not np.array_equal(outline[0], outline[-1])
    assert outline.min(axis=0).tolist() == [4.5, 6.5]
    assert outline.max(axis=0).tolist() == [24.5, 32.5]


def test_an_empty_mask_has_no_outline() -> None:
    assert trace(np.zeros((5, 5), dtype=bool)) == []


def test_a_noisy_slice_with_thousands_of_holes() -> None:
    mask = np.random.default_rng(2).random((512, 512)) < 0.9
    np.testing.assert_array_equal(joined(trace(mask), mask.shape), mask)
