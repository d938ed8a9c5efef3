"""Resampling against scipy's general routine, and what must never happen to labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.resampling import resample, resample_argmax, resample_labels
from medseg.volume import Grid


def general_routine(array: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """scipy.ndimage at the half-pixel positions, continued beyond the outermost centres."""
    positions = [np.clip((np.arange(n) + 0.5) * m / n - 0.5, 0, m - 1) for n, m in zip(shape, array.shape, strict=True)]
    grid = np.meshgrid(*positions, indexing="ij")
    return ndimage.map_coordinates(array.astype(np.float64), grid, order=order, mode="mirror")


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("shape", [(10, 40, 17), (3, 11, 31), (7, 20, 62)])
def test_equals_the_general_routine(order: int, shape: tuple[int, ...]) -> None:
    array = torch.from_numpy(np.random.default_rng(0).normal(size=(7, 20, 31)).astype(np.float32))
    expected = general_routine(array.numpy(), shape, order)
    np.testing.assert_allclose(resample(array, shape, order=order).numpy(), expected, atol=1e-5)


def test_order_per_axis_and_2d() -> None:
    array = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    mixed = resample(array, (6, 8), order=(0, 1))
    np.testing.assert_allclose(mixed[0].numpy(), mixed[1].numpy())  # nearest repeats rows
    np.testing.assert_allclose(mixed[0].numpy(), general_routine(array[:1].numpy(), (1, 8), 1)[0], atol=1e-6)


def test_world_positions_are_kept() -> None:
    """A linear ramp in world coordinates stays that ramp on the resampled grid (inside the outer centres)."""
    affine = np.array([[0, -2.0, 0, 7], [1.5, 0, 0, -3], [0, 0, 3.0, 11], [0, 0, 0, 1]])
    grid = Grid((8, 9, 10), affine)
    new = grid.resampled((16, 7, 13))
    index = np.stack(np.meshgrid(*[np.arange(s) for s in grid.shape], indexing="ij"), -1)
    new_index = np.stack(np.meshgrid(*[np.arange(s) for s in new.shape], indexing="ij"), -1)
    ramp = torch.from_numpy((grid.to_world(index) @ [1.0, 2.0, 3.0]).astype(np.float32))
    expected = new.to_world(new_index) @ [1.0, 2.0, 3.0]
    got = resample(ramp, new.shape, order=1).numpy()
    np.testing.assert_allclose(got[2:-2, 1:-1, 2:-2], expected[2:-2, 1:-1, 2:-2], atol=1e-3)


def test_labels_get_no_new_values() -> None:
    labels = torch.zeros((10, 12), dtype=torch.uint8)
    labels[2:5, 2:9] = 2
    labels[5:8, 2:9] = 7
    resampled = resample_labels(labels, (23, 31), num_classes=8)
    assert set(resampled.unique().tolist()) == {0, 2, 7}
    # Where class 2 borders on class 7 there is nothing else, although 3 ... 6 lie between the numbers.
    assert set(resampled[8:16, 8:20].unique().tolist()) == {2, 7}


def test_streamed_argmax_equals_the_full_one() -> None:
    logits = torch.randn((5, 6, 7, 8), generator=torch.Generator().manual_seed(1))
    full = resample(logits, (11, 5, 16), order=1).argmax(0)
    assert torch.equal(resample_argmax(logits, (11, 5, 16)).long(), full)
    assert torch.equal(resample_argmax(logits, (6, 7, 8)).long(), logits.argmax(0))


def test_single_voxel_axis() -> None:
    array = torch.full((1, 5), 3.0)
    for order in (0, 1, 3):
        assert torch.allclose(resample(array, (4, 5), order=order), torch.full((4, 5), 3.0), atol=1e-6)
