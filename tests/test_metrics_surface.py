"""Distances between surfaces: the fast search against scipy, scikit-image and MONAI; symmetry and translation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from scipy.spatial.distance import directed_hausdorff
from skimage.metrics import hausdorff_distance

from medseg.metrics.case import measure_case
from medseg.metrics.masks import Mask, surface, surface_distances
from medseg.torchvision_compat import prepare_torchvision
from medseg.volume import Grid

SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (10.0, 0.1, 0.3)]


def blob(seed: int, shape: tuple[int, ...], level: float = 0.3) -> Mask:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    mask: Mask = field > level * field.std()
    return mask


def by_transform(of: Mask, to: Mask, spacing: tuple[float, ...]) -> np.ndarray:
    """The same distances from scipy's exact Euclidean distance transform."""
    outlines = [mask & ~ndimage.binary_erosion(mask) for mask in (of, to)]
    return ndimage.distance_transform_edt(~outlines[1], sampling=spacing)[outlines[0]]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("levels", [(0.3, 0.3), (0.2, 2.2), (2.5, -1.0)])
def test_distances_are_those_of_the_distance_transform(spacing: tuple[float, ...], levels: tuple[float, float]) -> None:
    """Near and far surfaces: neighbours settle the first, the tree the rest."""
    a, b = blob(0, (14, 26, 23), levels[0]), blob(1, (14, 26, 23), levels[1])
    assert a.any() and b.any()
    there, back = surface_distances(a, b, spacing)
    np.testing.assert_allclose(there, by_transform(a, b, spacing), rtol=1e-12)
    np.testing.assert_allclose(back, by_transform(b, a, spacing), rtol=1e-12)


def test_surfaces_far_apart_are_left_to_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.zeros((2, 40, 12), dtype=bool)
    a[1:4, 2:5], b[30:35, 6:9] = True, True
    asked: list[int] = []

    class Tree(scipy.spatial.KDTree):
        def query(self, points, *args, **keywords):
            asked.append(len(points))
            return super().query(points, *args, **keywords)

    monkeypatch.setattr(scipy.spatial, "KDTree", Tree)
    there, _ = surface_distances(a, b, (1.0, 2.0))
    np.testing.assert_allclose(there, by_transform(a, b, (1.0, 2.0)))
    assert asked == [8, 12]
    surface_distances(a, a, (1.0, 2.0))
    assert len(asked) == 2


def test_any_memory_order() -> None:
    a, b = blob(3, (9, 14, 11)), blob(4, (9, 14, 11))
    expected = surface_distances(a, b, (3.0, 1.0, 2.0))
    for x, y in ((np.asfortranarray(a), b), (a, np.asfortranarray(b)), (a[::1, ::-1][:, ::-1], b)):
        for got, right in zip(surface_distances(x, y, (3.0, 1.0, 2.0)), expected, strict=True):
            np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize("shape", [(7,), (1, 6), (6, 5), (4, 5, 6), (2, 2, 2)])
def test_surface_is_what_erosion_takes(shape: tuple[int, ...]) -> None:
    for seed in range(4):
        mask = np.random.default_rng(seed).random(shape) < 0.7
        np.testing.assert_array_equal(surface(mask), mask & ~ndimage.binary_erosion(mask))
    assert surface(np.ones((3, 3, 3), dtype=bool)).sum() == 26


@pytest.mark.parametrize("shape", [(40, 31), (13, 20, 17)])
@pytest.mark.parametrize("seed", range(3))
def test_hausdorff_distance_agrees_with_three_others(shape: tuple[int, ...], seed: int) -> None:
    prepare_torchvision()
    from monai.metrics import compute_hausdorff_distance

    spacing = (2.0, 0.8, 1.3)[: len(shape)]
    a, b = blob(seed, shape), blob(seed + 10, shape)
    (result,) = measure_case(
        a.astype(np.uint8), b.astype(np.uint8), Grid(shape, np.diag([*spacing, 1.0])), num_classes=2, names=("hd",)
    )
    pair = [torch.from_numpy(m)[None, None].float() for m in (a, b)]
    monai = compute_hausdorff_distance(*pair, include_background=True, spacing=spacing)
    outlines = [np.argwhere(m & ~ndimage.binary_erosion(m)) * spacing for m in (a, b)]
    scipy = max(directed_hausdorff(*outlines)[0], directed_hausdorff(*outlines[::-1])[0])
    assert result.values["hd"] == pytest.approx(float(monai), rel=1e-5)
    assert result.values["hd"] == pytest.approx(scipy)
    (pixels,) = measure_case(
        a.astype(np.uint8), b.astype(np.uint8), Grid(shape, np.eye(len(shape) + 1)), num_classes=2, names=("hd",)
    )
    edges = [m & ~ndimage.binary_erosion(m) for m in (a, b)]
    assert pixels.values["hd"] == pytest.approx(hausdorff_distance(*edges))


small = arrays(np.bool_, (4, 5, 6), elements=st.booleans())


@settings(max_examples=80, deadline=None)
@given(small, small, st.sampled_from(SPACINGS))
def test_ordered_symmetric_and_bounded(a: Mask, b: Mask, spacing: tuple[float, ...]) -> None:
    a[0, 0, 0] = b[3, 4, 5] = True
    grid = Grid(a.shape, np.diag([*spacing, 1.0]))
    names = ("asd", "hd95", "hd", "surface_dice")
    there = measure_case(a.astype(np.uint8), b.astype(np.uint8), grid, num_classes=2, names=names)[0].values
    back = measure_case(b.astype(np.uint8), a.astype(np.uint8), grid, num_classes=2, names=names)[0].values
    assert there == pytest.approx(back)
    assert 0 <= there["hd95"] <= there["hd"] < np.linalg.norm(np.multiply(a.shape, spacing))
    assert there["asd"] <= there["hd"]


def test_a_translation_is_its_length() -> None:
    """A flat plate moved along its normal: every distance is the shift."""
    a, b = np.zeros((2, 30, 20, 20), dtype=np.uint8)
    a[5], b[19] = 1, 1
    (result,) = measure_case(a, b, Grid(a.shape, np.diag([1.5, 1.0, 1.0, 1.0])), num_classes=2)
    for name in ("asd", "hd95", "hd"):
        assert result.values[name] == pytest.approx(21.0)
