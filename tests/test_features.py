"""Features against the IBSI's values, hand calculations and PyRadiomics' baseline."""

from __future__ import annotations

import math
from pathlib import Path

import ibsi
import numpy as np
import pytest
from numpy.typing import NDArray

from medseg.errors import MedsegError
from medseg.features import glcm, gldm, glrlm, glszm, intensity, ngtdm, shape
from medseg.features.edge import border_points, edge_features
from medseg.features.levels import directions, discretised
from medseg.features.region import Measured, feature_names, measure_region, resampled
from medseg.features.settings import FAMILIES, TEXTURES, Settings

PHANTOM = Settings(bin_count=None, bin_width=1.0)


@pytest.fixture(scope="module")
def phantom() -> dict[str, Measured]:
    return {
        texture: measure_region(
            ibsi.IMAGE, ibsi.MASK, ibsi.SPACING_MM, Settings(bin_count=None, bin_width=1.0, texture=texture), across=0
        )
        for texture in TEXTURES
    }


@pytest.mark.parametrize("family", ["shape", "intensity", "histogram", "glcm", "glrlm", "glszm", "gldm", "ngtdm"])
def test_the_digital_phantom_has_the_published_values(family: str, phantom: dict[str, Measured]) -> None:
    rows = [row for row in ibsi.reference() if row[0].startswith(f"{family}_")]
    assert len(rows) >= 15
    wrong = [
        (feature, texture, published, phantom[texture or "3d"].values[feature])
        for feature, texture, published, tolerance in rows
        if not ibsi.agrees(phantom[texture or "3d"].values[feature], published, tolerance)
    ]
    assert not wrong


def test_every_feature_of_the_ibsi_has_a_published_value() -> None:
    checked = {feature for feature, *_ in ibsi.reference()}
    assert checked == {name for name in feature_names(FAMILIES, 3) if not name.startswith("edge_")}
    codes = [*shape.CODES.values(), *intensity.CODES.values(), *intensity.HISTOGRAM_CODES.values()]
    for family in (glcm, glrlm, glszm, gldm, ngtdm):
        codes += family.CODES.values()
    assert len(codes) == len(set(codes)) == len(checked)


def test_the_reference_is_not_met_by_just_anything(phantom: dict[str, Measured]) -> None:
    """Averages and merged matrices differ in most features: agreement is not for free."""
    rows = [row for row in ibsi.reference() if row[1] == "3d"]
    wrong = [row for row in rows if not ibsi.agrees(phantom["3d-merged"].values[row[0]], row[2], row[3])]
    assert len(wrong) > 30


@pytest.mark.data
def test_baseline_of_pyradiomics(real_data: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    from check_features import compare_baseline

    compared = [c for c in compare_baseline(real_data / "radiomics" / "pyradiomics") if c.measured is not None]
    assert len(compared) > 1000
    assert not [c for c in compared if not c.agrees and not c.why]
    assert sum(c.agrees for c in compared) >= len(compared) - 9


def test_shape_of_a_box_by_hand() -> None:
    mask = np.zeros((6, 8, 10), dtype=bool)
    mask[1:5, 1:7, 1:9] = True  # 4 × 6 × 8 voxels
    spacing = (3.0, 2.0, 1.0)
    found = shape.shape_features(mask, spacing, None)
    assert found["volume_of_voxels"] == 4 * 6 * 8 * 6.0
    assert found["maximum_diameter"] <= math.dist((0, 0, 0), (12, 12, 8))
    # Centres of n voxels a mm apart vary by a² (n² - 1) / 12; of a sample
    num = mask.sum()
    variances = sorted(
        (s**2 * (n**2 - 1) / 12 * num / (num - 1) for s, n in zip(spacing, (4, 6, 8), strict=True)), reverse=True
    )
    axes = [found["major_axis_length"], found["minor_axis_length"], found["least_axis_length"]]
    np.testing.assert_allclose(axes, [4 * math.sqrt(v) for v in variances])
    assert found["volume_density_hull"] == pytest.approx(1, abs=1e-6)


def test_a_ball_is_round() -> None:
    grid = np.indices((31, 31, 31)) - 15
    found = shape.shape_features((grid**2).sum(axis=0) <= 14**2, (1.0, 1.0, 1.0), np.zeros(3))
    assert found["volume"] == pytest.approx(4 / 3 * math.pi * 14**3, rel=0.01)
    assert found["sphericity"] > 0.9
    assert found["elongation"] == pytest.approx(1, abs=1e-9)
    assert found["centre_of_mass_shift"] == pytest.approx(15 * math.sqrt(3))


def test_shape_does_not_depend_on_the_order_of_the_axes() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((5, 6, 7)) > 0.3
    first = shape.shape_features(mask, (1.0, 2.0, 3.0), None)
    turned = shape.shape_features(mask.transpose(2, 0, 1)[::-1], (3.0, 1.0, 2.0), None)
    for name in ("volume_of_voxels", "maximum_diameter", "major_axis_length", "flatness", "volume_density_hull"):
        assert turned[name] == pytest.approx(first[name], rel=1e-6), name


def test_planar_shape_of_a_disc() -> None:
    grid = np.indices((61, 61)) - 30
    found = shape.planar_features((grid**2).sum(axis=0) <= 25**2, (0.5, 0.5))
    assert found["area"] == pytest.approx(math.pi * 12.5**2, rel=0.01)
    assert 0.93 < found["circularity"] <= 1
    assert found["maximum_diameter"] == pytest.approx(25.5, abs=0.2)


def test_a_hole_counts_for_the_perimeter_and_against_the_area() -> None:
    mask = np.ones((7, 7), dtype=bool)
    full = shape.planar_features(mask, (1.0, 1.0))
    mask[3, 3] = False
    ring = shape.planar_features(mask, (1.0, 1.0))
    assert ring["area"] == pytest.approx(full["area"] - 0.5)
    assert ring["perimeter"] == pytest.approx(full["perimeter"] + 2 * math.sqrt(2))


def test_runs_by_hand() -> None:
    """1 1 2 / 1 3 3: along the rows runs of 2, 1, 1, 2."""
    levels = np.array([[1, 1, 2], [1, 3, 3]], dtype=np.int32)
    found = glrlm.runs(levels, (0, 1))
    assert sorted(zip(found.levels.tolist(), found.sizes.tolist(), strict=True)) == [(1, 1), (1, 2), (2, 1), (3, 2)]
    column = glrlm.runs(levels, (1, 0))
    assert sorted(column.sizes.tolist()) == [1, 1, 1, 1, 2]


def test_runs_end_at_the_border_of_the_region_and_of_the_image() -> None:
    levels = np.array([[1, 0, 1], [1, 1, 1]], dtype=np.int32)
    assert sorted(glrlm.runs(levels, (0, 1)).sizes.tolist()) == [1, 1, 3]


def test_zones_touch_by_corners() -> None:
    levels = np.array([[1, 2], [2, 1]], dtype=np.int32)
    found = glszm.zones(levels)
    assert sorted(zip(found.levels.tolist(), found.sizes.tolist(), strict=True)) == [(1, 2), (2, 2)]


def test_dependences_by_hand() -> None:
    levels = np.array([[1, 1], [1, 3]], dtype=np.int32)
    found = gldm.dependences(levels, 0.0)
    assert sorted(zip(found.levels.tolist(), found.sizes.tolist(), strict=True)) == [(1, 3), (1, 3), (1, 3), (3, 1)]
    assert gldm.dependences(levels, 2.0).sizes.tolist() == [4, 4, 4, 4]


def test_tone_differences_by_hand() -> None:
    levels = np.array([[1, 1], [1, 3], [0, 0], [5, 0]], dtype=np.int32)  # the 5 has no neighbour
    found, apart = ngtdm.differences(levels)
    assert found.tolist() == [1, 1, 1, 3]
    np.testing.assert_allclose(apart, [2 / 3, 2 / 3, 2 / 3, 2])


def test_directions() -> None:
    assert len(directions(3)) == 13
    assert len(directions(2)) == len(directions(3, across=1)) == 4
    both = {tuple(sign * i for i in d) for d in directions(3) for sign in (1, -1)}
    assert len(both) == 26


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(bin_count=4), [1, 2, 3, 4, 4]),
        (Settings(bin_count=None, bin_width=2.0), [1, 2, 3, 4, 5]),
        (Settings(bin_count=None, bin_width=2.0, bin_origin=0.0), [1, 2, 3, 4, 5]),
        (Settings(bin_count=None, bin_width=2.0, bin_origin=-1.0), [1, 2, 3, 4, 5]),
        (Settings(bin_count=None, bin_width=5.0, bin_origin=0.0), [1, 2, 2, 2, 3]),
        (Settings(bin_count=None, bin_width=2.0, intensities=(-2.0, 50.0)), [3, 4, 5, 6, 7]),
    ],
)
def test_discretisation(settings: Settings, expected: list[int]) -> None:
    assert discretised(np.array([3.0, 5.0, 7.0, 9.0, 11.0]), settings).tolist() == expected


def test_too_many_levels_are_refused() -> None:
    with pytest.raises(MedsegError, match="wider bins"):
        discretised(np.arange(6000, dtype=np.float64), Settings(bin_count=None, bin_width=1.0))


def test_discretisation_by_number_does_not_know_units() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.normal(size=(6, 7, 8)), np.ones((6, 7, 8), dtype=bool)
    settings = Settings(families=("glcm", "glszm"), bin_count=8)
    first = measure_region(image, mask, (1.0, 1.0, 1.0), settings).values
    other = measure_region(1000 + 50 * image, mask, (1.0, 1.0, 1.0), settings).values
    assert first == pytest.approx(other)


def ball(radius: float, blur: float, spacing: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A bright ball (height 100) with a blurred border, and its mask."""
    from scipy import stats

    reach = radius + 8
    axes = [np.arange(-reach, reach + s, s) for s in spacing]
    distance = np.sqrt(sum(g**2 for g in np.meshgrid(*axes, indexing="ij")))
    return 100 * stats.norm.cdf((radius - distance) / blur), distance <= radius


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 0.75, 0.75)])
def test_edge_of_a_blurred_ball(spacing: tuple[float, ...]) -> None:
    """The slope of a step of height A that a Gaussian blurs is A / (σ √2π)."""
    image, mask = ball(20.0, 2.0, spacing)
    found = edge_features(image, mask, spacing, 7.0)
    slope = 100 / (2.0 * math.sqrt(2 * math.pi))
    assert found["gradient_mean"] == pytest.approx(slope, rel=0.05)
    assert found["contrast_mean"] == pytest.approx(100, rel=0.01)
    assert found["width_median"] == pytest.approx(100 / slope, rel=0.05)
    softer = edge_features(*ball(20.0, 3.0, spacing), spacing, 7.0)
    assert softer["gradient_mean"] < 0.8 * found["gradient_mean"]


def test_lines_begin_at_the_border_also_where_voxels_are_long() -> None:
    spacing = (5.0, 1.0, 1.0)
    box = np.zeros((9, 30, 30), dtype=bool)
    box[3:6, 5:25, 5:25] = True
    points, normal = border_points(box, spacing)
    for axis, faces in enumerate([{12.5, 27.5}, {4.5, 24.5}, {4.5, 24.5}]):  # half-way to the next voxel
        flat = np.abs(normal[:, axis]) > 0.999
        assert flat.sum() > 20 and {round(float(place), 1) for place in points[flat, axis]} == faces
    image, mask = ball(20.0, 2.0, spacing)
    points, normal = border_points(mask, spacing)
    beyond = np.linalg.norm(points - 28.0, axis=1) - 20
    at_poles = np.abs(normal[:, 0]) > 0.95
    assert abs(beyond[at_poles].mean()) < 0.5 and abs(beyond.mean()) < 0.75
    assert np.abs(beyond).max() < 2.5  # half of a voxel
    found = edge_features(image, mask, spacing, 7.0)
    assert found["points"] == len(points)
    assert found["contrast_mean"] == pytest.approx(100, rel=0.01)
    # Between slices the image is read linearly, which blurs it more
    assert found["gradient_mean"] == pytest.approx(100 / (2.0 * math.sqrt(2 * math.pi)), rel=0.2)


def test_edge_in_a_picture_and_at_its_border() -> None:
    image = np.zeros((40, 40))
    mask = np.zeros((40, 40), dtype=bool)
    mask[10:30, 10:30] = True
    image[mask] = 10.0
    found = edge_features(image, mask, (1.0, 1.0), 4.0)
    assert found["contrast_mean"] == pytest.approx(10)
    nothing = edge_features(image, np.ones_like(mask), (1.0, 1.0), 4.0)
    assert nothing["points"] == 0
    assert math.isnan(nothing["gradient_mean"])


def test_resampling_keeps_the_middle_and_the_volume() -> None:
    image, mask = ball(10.0, 2.0, (3.0, 1.0, 1.0))
    everything = tuple(slice(0, n) for n in image.shape)
    fine, inside, spacing = resampled(image, mask, (3.0, 1.0, 1.0), Settings(spacing_mm=(1.5,)), everything)
    assert spacing == (1.5, 1.5, 1.5)
    assert fine.shape == tuple(math.ceil(n * s / 1.5) for n, s in zip(image.shape, (3, 1, 1), strict=True))
    assert inside.sum() * 1.5**3 == pytest.approx(4 / 3 * math.pi * 1000, rel=0.05)
    where = np.argwhere(inside).mean(axis=0)
    np.testing.assert_allclose(where, (np.asarray(fine.shape) - 1) / 2, atol=1e-6)
    assert fine.max() == pytest.approx(100, abs=1)


def test_resampling_a_box_is_resampling_the_scan() -> None:
    rng = np.random.default_rng(1)
    image = rng.normal(size=(30, 40, 44))
    mask = np.zeros(image.shape, dtype=bool)
    mask[14:17, 18:24, 20:27] = rng.random((3, 6, 7)) > 0.2
    settings = Settings(spacing_mm=(0.7, 1.3, 2.0))
    spacing = (1.0, 0.9, 1.7)
    box = (slice(2, 29), slice(5, 37), slice(8, 40))
    everything = tuple(slice(0, n) for n in image.shape)
    whole, in_whole, _ = resampled(image, mask, spacing, settings, everything)
    part, in_part, _ = resampled(image, mask, spacing, settings, box)
    assert in_part.sum() == in_whole.sum() > 50
    np.testing.assert_allclose(part[in_part], whole[in_whole], atol=1e-5)


def test_one_spacing_for_each_axis() -> None:
    with pytest.raises(MedsegError, match="--spacing"):
        measure_region(np.ones((4, 4)), np.ones((4, 4), dtype=bool), (1.0, 1.0), Settings(spacing_mm=(1.0, 2.0, 3.0)))


@pytest.mark.parametrize("ndim", [2, 3])
def test_an_empty_region_has_every_column_and_a_reason(ndim: int) -> None:
    shape_of = (5,) * ndim
    found = measure_region(np.ones(shape_of), np.zeros(shape_of, dtype=bool), (1.0,) * ndim, Settings())
    assert list(found.values) == feature_names(FAMILIES, ndim)
    assert all(math.isnan(value) for value in found.values.values())
    assert found.missing == ("the region is empty",)


@pytest.mark.parametrize("ndim", [2, 3])
def test_one_voxel(ndim: int) -> None:
    mask = np.zeros((7,) * ndim, dtype=bool)
    mask[(3,) * ndim] = True
    found = measure_region(np.arange(7.0**ndim).reshape(mask.shape), mask, (1.0,) * ndim, Settings())
    assert found.num_voxels == 1
    assert math.isnan(found.values["glcm_contrast"])
    assert math.isnan(found.values["shape_elongation"])
    assert found.values["glszm_zone_percentage"] == 1
    assert "one voxel" in found.missing[0]


def test_a_flat_and_a_constant_region() -> None:
    mask = np.zeros((5, 9, 9), dtype=bool)
    mask[2, 1:8, 1:8] = True
    constant = measure_region(np.full(mask.shape, 7.0), mask, (2.0, 1.0, 1.0), Settings())
    assert constant.num_levels == 1
    assert constant.values["ngtdm_coarseness"] == 1e6
    assert math.isnan(constant.values["glcm_correlation"])
    assert "one grey level" in constant.missing[0]
    rng = np.random.default_rng(0)
    flat = measure_region(rng.normal(size=mask.shape), mask, (2.0, 1.0, 1.0), Settings(families=("shape", "glcm")))
    assert flat.values["shape_flatness"] == 0
    assert "flat" in flat.missing[0]


def test_range_and_outliers_leave_the_shape() -> None:
    image = np.arange(60.0).reshape(3, 4, 5)
    mask = np.ones(image.shape, dtype=bool)
    families = ("shape", "intensity")
    whole = measure_region(image, mask, (1.0, 1.0, 1.0), Settings(families=families)).values
    part = measure_region(image, mask, (1.0, 1.0, 1.0), Settings(families=families, intensities=(10.0, 19.0))).values
    assert part["shape_volume"] == whole["shape_volume"]
    assert (part["intensity_minimum"], part["intensity_maximum"]) == (10, 19)
    one = measure_region(image, mask, (1.0, 1.0, 1.0), Settings(families=families, outliers=1.0)).values
    mean, std = image.mean(), image.std()
    assert one["intensity_maximum"] == image[image <= mean + std].max()
    none = measure_region(image, mask, (1.0, 1.0, 1.0), Settings(families=families, intensities=(100.0, 200.0)))
    assert "in the range" in none.missing[0]
    assert none.values["shape_volume"] == whole["shape_volume"]


def test_intensities_that_are_no_numbers_are_refused() -> None:
    image = np.ones((3, 3, 3))
    image[1, 1, 1] = np.nan
    with pytest.raises(MedsegError, match="E_NONFINITE"):
        measure_region(image, np.ones(image.shape, dtype=bool), (1.0, 1.0, 1.0), Settings())


def test_the_same_region_elsewhere_in_a_larger_scan() -> None:
    rng = np.random.default_rng(3)
    image = rng.normal(size=(12, 12, 12))
    mask = np.zeros(image.shape, dtype=bool)
    mask[4:8, 3:9, 4:9] = rng.random((4, 6, 5)) > 0.2
    settings = Settings(bin_count=6, edge_reach_mm=2.0)
    first = measure_region(image, mask, (1.0, 1.0, 1.0), settings).values
    larger, there = np.pad(image, 7, mode="reflect"), np.pad(mask, 7)
    assert measure_region(larger, there, (1.0, 1.0, 1.0), settings).values == pytest.approx(first, nan_ok=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"families": ("glmc",)},
        {"texture": "4d"},
        {"bin_count": None},
        {"bin_width": 2.0},
        {"bin_count": 0},
        {"bin_origin": 0.0},
        {"spacing_mm": (0.0,)},
        {"order": 2},
        {"intensities": (3.0, 3.0)},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(MedsegError):
        Settings(**wrong)  # type: ignore[arg-type]
