"""Metrics against hand-made cases, brute force and MONAI; what empty masks get."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import MedsegError
from medseg.metrics import metric as metric_module
from medseg.metrics.case import confusion, measure_case
from medseg.metrics.masks import ClassMasks, State, surface_distances
from medseg.metrics.metric import metric, metrics
from medseg.torchvision_compat import prepare_torchvision
from medseg.volume import Grid

IndexMap = NDArray[np.uint8]


def grid_of(shape: Sequence[int], spacing_mm: Sequence[float] | None = None) -> Grid:
    return Grid(tuple(shape), np.diag([*(spacing_mm or [1.0] * len(shape)), 1.0]))


def measure(predicted: IndexMap, reference: IndexMap, spacing_mm: Sequence[float] | None = None, **options: float):
    (result,) = measure_case(
        predicted.astype(np.uint8),
        reference.astype(np.uint8),
        grid_of(predicted.shape, spacing_mm),
        num_classes=2,
        **options,  # type: ignore[arg-type]
    )
    return result


def blobs(seed: int, shape: tuple[int, ...]) -> tuple[IndexMap, IndexMap]:
    """Two similar ragged masks; on some sides they touch the border."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=shape), 2.0)
    other = ndimage.gaussian_filter(field + 0.4 * field.std() * rng.normal(size=shape), 0.8)
    return (field > 0.3 * field.std()).astype(np.uint8), (other > 0.3 * field.std()).astype(np.uint8)


def test_counts_by_hand() -> None:
    predicted, reference = np.zeros((1, 4, 5)), np.zeros((1, 4, 5))
    predicted[0, 0, :4] = 1
    reference[0, 0, 2:5] = 1  # TP 2, FP 2, FN 1, TN 15
    values = measure(predicted, reference, (2.0, 3.0, 5.0)).values
    assert values["dice"] == pytest.approx(4 / 7)
    assert values["iou"] == pytest.approx(2 / 5)
    assert values["sensitivity"] == pytest.approx(2 / 3)
    assert values["precision"] == pytest.approx(1 / 2)
    assert values["specificity"] == pytest.approx(15 / 17)
    assert values["reference_volume"] == pytest.approx(0.09)
    assert values["predicted_volume"] == pytest.approx(0.12)
    assert values["volume_error"] == pytest.approx(0.03)
    assert values["relative_volume_error"] == pytest.approx(1 / 3)
    under = measure(reference, predicted, (2.0, 3.0, 5.0)).values
    assert under["volume_error"] == pytest.approx(-0.03)
    assert under["absolute_volume_error"] == pytest.approx(0.03)


def test_two_voxels_apart_in_mm() -> None:
    predicted, reference = np.zeros((5, 6, 7)), np.zeros((5, 6, 7))
    reference[1, 1, 1] = predicted[3, 1, 1] = 1
    values = measure(predicted, reference, (2.5, 1.0, 1.0), tolerance_mm=4.9).values
    assert values["hd95"] == pytest.approx(5.0)
    assert values["asd"] == pytest.approx(5.0)
    assert values["surface_dice"] == 0.0
    assert measure(predicted, reference, (2.5, 1.0, 1.0), tolerance_mm=5.0).values["surface_dice"] == 1.0


def test_shifted_cube_by_hand() -> None:
    """A 3-voxel square shifted by one column: of the 8 outline pixels of each, 4 are 1 px from the other outline."""
    reference, predicted = np.zeros((8, 9)), np.zeros((8, 9))
    reference[2:5, 2:5] = 1
    predicted[2:5, 3:6] = 1
    to_reference, to_predicted = surface_distances(predicted > 0, reference > 0, (1.0, 1.0))
    # 3 are beyond the other square, and 1 lies on the other's centre, which is no surface.
    assert sorted(to_reference) == sorted(to_predicted) == [0, 0, 0, 0, 1, 1, 1, 1]
    values = measure(predicted, reference, tolerance_mm=0.5).values
    assert values["asd"] == pytest.approx(0.5)
    assert values["surface_dice"] == pytest.approx(0.5)


def test_hd95_is_the_larger_directed_percentile() -> None:
    """20 predicted pixels in a line, all but the last two in the reference: 95 % of 0 … 2 px, interpolated."""
    reference, predicted = np.zeros((3, 30)), np.zeros((3, 30))
    reference[1, :18] = predicted[1, :20] = 1
    expected = np.percentile([0] * 18 + [1, 2], 95)
    assert 0 < expected < 2
    assert measure(predicted, reference).values["hd95"] == pytest.approx(expected)
    assert measure(reference, predicted).values["hd95"] == pytest.approx(expected)


def test_a_volume_of_one_slice_is_measured_like_its_picture() -> None:
    a, b = blobs(3, (24, 20))
    flat = measure(a, b, (0.7, 1.3)).values
    for axis, spacing in ((0, (5.0, 0.7, 1.3)), (2, (0.7, 1.3, 5.0))):
        slab = measure(np.expand_dims(a, axis), np.expand_dims(b, axis), spacing).values
        for name in ("hd95", "asd", "surface_dice", "dice"):
            assert slab[name] == pytest.approx(flat[name])


def test_tolerance_forgives_the_rounding_of_headers() -> None:
    reference, predicted = np.zeros((6, 4, 4)), np.zeros((6, 4, 4))
    reference[1, 1, 1] = predicted[3, 1, 1] = 1
    spacing = float(np.float32(0.8))
    assert 2 * spacing > 1.6
    assert measure(predicted, reference, (spacing, 1.0, 1.0), tolerance_mm=1.6).values["surface_dice"] == 1.0


@pytest.mark.parametrize("shape", [(40, 33), (17, 22, 19)])
@pytest.mark.parametrize("seed", range(3))
def test_surface_distances_equal_brute_force(shape: tuple[int, ...], seed: int) -> None:
    spacing = (3.0, 0.7, 1.1)[: len(shape)]
    predicted, reference = blobs(seed, shape)
    outlines = []
    for mask in (predicted, reference):
        padded = np.pad(mask, 1)
        inside = np.ones_like(mask, dtype=bool)
        for axis in range(mask.ndim):
            for step in (-1, 1):
                inside &= np.roll(padded, step, axis)[(slice(1, -1),) * mask.ndim] > 0
        outlines.append(np.argwhere((mask > 0) & ~inside) * spacing)
    distances = np.linalg.norm(outlines[0][:, None] - outlines[1][None], axis=-1)
    to_reference, to_predicted = surface_distances(predicted > 0, reference > 0, spacing)
    np.testing.assert_allclose(to_reference, distances.min(axis=1))
    np.testing.assert_allclose(to_predicted, distances.min(axis=0))


@pytest.mark.parametrize("shape", [(48, 37), (18, 25, 21)])
@pytest.mark.parametrize("seed", range(4))
def test_monai_agrees(shape: tuple[int, ...], seed: int) -> None:
    """MONAI is the second implementation; its surface is the same (the border of the array counts as outside)."""
    prepare_torchvision()
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
        compute_iou,
        compute_surface_dice,
    )

    spacing = (2.5, 0.8, 1.25)[: len(shape)]
    predicted, reference = blobs(seed, shape)
    values = measure(predicted, reference, spacing, tolerance_mm=1.01).values
    pair = [torch.from_numpy(m)[None, None].float() for m in (predicted, reference)]
    monai = {
        "dice": compute_dice(*pair),
        "iou": compute_iou(*pair),
        "hd95": compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing),
        "asd": compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=spacing),
        "surface_dice": compute_surface_dice(*pair, [1.01], include_background=True, spacing=spacing),
    }
    for name, expected in monai.items():
        assert values[name] == pytest.approx(float(expected), rel=1e-5), name
    assert 0 < values["surface_dice"] < 1
    assert values["hd95"] > 0


def test_many_classes_at_once_equal_one_at_a_time() -> None:
    rng = np.random.default_rng(0)
    reference = np.kron(rng.integers(0, 5, (4, 5, 3)), np.ones((4, 4, 4))).astype(np.uint8)
    predicted = np.roll(reference, (1, 0, 2), (0, 1, 2))
    predicted[predicted == 4] = 0
    together = measure_case(predicted, reference, grid_of(reference.shape, (1, 2, 3)), num_classes=6)
    assert [r.state for r in together] == [State.PRESENT] * 3 + [State.MISSED, State.ABSENT]
    for result in together:
        alone = measure(predicted == result.index, reference == result.index, (1, 2, 3))
        assert result.values == pytest.approx(alone.values, nan_ok=True)


def test_confusion_in_chunks_and_any_memory_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    predicted, reference = rng.integers(0, 4, (2, 9, 8, 7), dtype=np.uint8)
    expected = np.zeros((4, 4), dtype=int)
    np.add.at(expected, (predicted.ravel(), reference.ravel()), 1)
    for chunk in (1, 100, 10**6):
        monkeypatch.setattr("medseg.metrics.case._VOXELS_PER_CHUNK", chunk)
        assert (confusion(predicted, np.asfortranarray(reference), 4) == expected).all()


EMPTY, BOX = np.zeros((4, 5, 6), dtype=np.uint8), np.zeros((4, 5, 6), dtype=np.uint8)
BOX[1:3, 1:4, 2:5] = 1
DIAGONAL = math.sqrt((4 * 2.0) ** 2 + 5**2 + 6**2)


def test_a_missed_structure() -> None:
    result = measure(EMPTY, BOX, (2.0, 1.0, 1.0))
    assert result.state is State.MISSED
    for name in ("dice", "iou", "sensitivity", "precision", "surface_dice"):
        assert result.values[name] == 0
    assert result.values["hd95"] == result.values["asd"] == pytest.approx(DIAGONAL)
    assert result.values["relative_volume_error"] == -1
    assert result.values["specificity"] == 1


def test_a_spurious_structure() -> None:
    result = measure(BOX, EMPTY, (2.0, 1.0, 1.0))
    assert result.state is State.SPURIOUS
    for name in ("dice", "iou", "precision", "surface_dice"):
        assert result.values[name] == 0
    assert result.values["hd95"] == result.values["asd"] == pytest.approx(DIAGONAL)
    assert math.isnan(result.values["sensitivity"])
    assert math.isnan(result.values["relative_volume_error"])
    assert result.values["specificity"] == pytest.approx(1 - 18 / 120)


def test_an_absent_structure_is_nan_in_every_metric() -> None:
    result = measure(EMPTY, EMPTY)
    assert result.state is State.ABSENT
    assert all(math.isnan(v) for v in result.values.values())


def test_specificity_without_negatives_is_undefined() -> None:
    full = np.ones((3, 3))
    assert math.isnan(measure(full, full).values["specificity"])


small_masks = arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 1))


@settings(max_examples=150, deadline=None)
@given(small_masks, small_masks, st.sampled_from([0.0, 1.0, 2.0]))
def test_missing_a_structure_is_never_better_than_any_prediction_of_it(
    predicted: IndexMap, reference: IndexMap, tolerance_mm: float
) -> None:
    reference[0, 0, 0] = predicted[2, 3, 4] = 1
    found = measure(predicted, reference, (3.0, 1.0, 0.5), tolerance_mm=tolerance_mm).values
    missed = measure(np.zeros_like(reference), reference, (3.0, 1.0, 0.5), tolerance_mm=tolerance_mm).values
    for m in metrics():
        if m.better == "higher":
            assert missed[m.name] <= found[m.name], m.name
        elif m.better == "lower":
            assert missed[m.name] > found[m.name], m.name


@settings(max_examples=60, deadline=None)
@given(small_masks)
def test_missing_is_never_better_than_perfection_for_values_that_do_not_rank(reference: IndexMap) -> None:
    reference[0, 0, 0], reference[2, 3, 4] = 1, 0
    perfect = measure(reference, reference).values
    missed = measure(np.zeros_like(reference), reference).values
    assert missed["specificity"] <= perfect["specificity"] == 1
    for name in ("absolute_volume_error", "relative_volume_error", "volume_error"):
        assert perfect[name] == 0 < abs(missed[name])


def test_only_the_metrics_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("surfaces are not needed for Dice")

    monkeypatch.setattr("medseg.metrics.masks.surface_distances", refuse)
    (result,) = measure_case(BOX, BOX, grid_of(BOX.shape), num_classes=2, names=("dice",))
    assert result.values == {"dice": 1.0}


def test_a_new_metric_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics()
    monkeypatch.setattr(metric_module, "_metrics", dict(metric_module._metrics))

    @metric("fdr", title="FDR", better="lower", dimension="ratio")
    def false_discovery_rate(masks: ClassMasks) -> float:
        return masks.fp / masks.num_predicted if masks.num_predicted else 1.0

    assert measure(BOX, EMPTY).values["fdr"] == 1
    assert math.isnan(measure(EMPTY, EMPTY).values["fdr"])
    with pytest.raises(MedsegError, match=r"E_NAME.*twice"):
        metric("fdr", title="", better=None, dimension="ratio")(false_discovery_rate)


def test_refusals() -> None:
    grid = grid_of(BOX.shape)
    with pytest.raises(MedsegError, match=r"E_GRID.*\n.*\n.*\(4, 5, 5\)"):
        measure_case(BOX[..., :5], BOX, grid, num_classes=2)
    with pytest.raises(MedsegError, match=r"E_LABEL.*(\n.*)*0 … 3"):
        measure_case(BOX, 3 * BOX, grid, num_classes=2)
    with pytest.raises(MedsegError, match="did you mean 'dice'"):
        measure_case(BOX, BOX, grid, num_classes=2, names=("dcie",))
    with pytest.raises(MedsegError, match="E_CONFIG"):
        measure_case(BOX, BOX, grid, num_classes=2, tolerance_mm=float("nan"))
