"""Resampling against scipy's general routine, and what must never happen to labels."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import peak
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.axis_matrices import BLOCK
from medseg.errors import MedsegError
from medseg.resampling import resample, resample_labels
from medseg.volume import Grid

SHAPES = [
    ((7, 20, 31), (10, 40, 17)),
    ((7, 20, 31), (3, 11, 31)),
    ((7, 20, 31), (7, 20, 62)),
    ((33, 40, 37), (41, 33, 55)),  # several blocks along each axis
    ((1, 5, 6), (4, 5, 9)),
    ((2, 3, 5), (9, 1, 2)),
    ((64, 51), (51, 77)),
    ((12, 9), (12, 4)),
    ((100,), (33,)),
]
"""Odd and even, up and down, axes that stay, axes of one voxel."""


def general_routine(array: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """scipy.ndimage over the same box, the edge value continued without end."""
    zoom = [new / old for old, new in zip(array.shape, shape, strict=True)]
    return ndimage.zoom(array.astype(np.float64), zoom, order=order, mode="nearest", grid_mode=True)


def naive_labels(labels: np.ndarray, shape: tuple[int, ...], num_classes: int) -> np.ndarray:
    """Argmax of the interpolated one-hot volumes, all in whole numbers: weights of an axis sum up to 2 n_out."""
    shares = np.stack([labels == c for c in range(num_classes)]).astype(np.int64)
    for axis, (old, new) in enumerate(zip(labels.shape, shape, strict=True)):
        matrix = np.zeros((new, old), np.int64)
        for i in range(new):
            position = min(max((2 * i + 1) * old - new, 0), 2 * new * (old - 1))
            low, rest = divmod(position, 2 * new)
            matrix[i, low] += 2 * new - rest
            if rest:
                matrix[i, low + 1] += rest
        shares = np.moveaxis(np.tensordot(matrix, shares, axes=(1, axis + 1)), 0, axis + 1)
    return shares.argmax(0)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_equals_the_general_routine(order: int, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=old).astype(np.float32)
    got = resample(torch.from_numpy(array), new, order=order)
    assert (got.dtype, tuple(got.shape)) == (torch.float32, new)
    np.testing.assert_allclose(got.numpy(), general_routine(array, new, order), atol=3e-6)


def test_the_edge_value_is_continued() -> None:
    """A spline over data that just goes on with its edge value: far inside a longer array of the same."""
    array = np.random.default_rng(1).normal(size=20).astype(np.float32)
    longer = np.pad(array, 40, mode="edge")
    expected = resample(torch.from_numpy(longer), (150,), order=3)[60:90]
    np.testing.assert_allclose(resample(torch.from_numpy(array), (30,), order=3), expected, atol=2e-6)


def test_channels_and_integers() -> None:
    """Leading axes are resampled one by one, whatever lies in memory how; integers as the floats they stand for."""
    array = torch.from_numpy(np.random.default_rng(2).integers(-1000, 2000, (2, 3, 20, 9, 7)).astype(np.int16))
    got = resample(array, (25, 13, 5), order=3)
    assert torch.equal(got, resample(array.float(), (25, 13, 5), order=3))
    assert torch.equal(got[1, 2], resample(array[1, 2], (25, 13, 5), order=3))
    turned = array.permute(0, 1, 4, 3, 2)
    np.testing.assert_allclose(resample(turned, (5, 13, 25), order=3), got.permute(0, 1, 4, 3, 2), atol=2e-3)


def test_clip_holds_each_channel_within_its_range() -> None:
    array = torch.zeros((2, 12, 12))
    array[0, 4:8, 4:8] = 100
    array[1, 4:8, 4:8] = -7
    free, clipped = (resample(array, (31, 17), order=3, clip=clip) for clip in (False, True))
    assert free[0].max() > 100
    assert free[0].min() < 0
    for channel, low, high in ((0, 0, 100), (1, -7, 0)):
        assert torch.equal(clipped[channel], free[channel].clamp(low, high))


def test_the_number_of_threads_changes_nothing() -> None:
    """Not the result, and a call leaves torch's setting as it was, also where it fails."""
    array = torch.randn((50, 20, 30), generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(resample(array, (70, 31, 17), order=3))
            assert torch.get_num_threads() == num_threads
        with pytest.raises(RuntimeError):
            resample(torch.empty((40, 5), device="cpu").to_sparse(), (50, 5))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


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


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_labels_equal_the_naive_argmax(data: st.DataObject) -> None:
    """Also where classes have equal shares, which random maps of few voxels are full of."""
    ndim, num_classes = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([2, 3, 7, 256]))
    old, new = (tuple(data.draw(st.integers(1, most)) for _ in range(ndim)) for most in (12, 2 * BLOCK + 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    # Of 256 classes the last ones: 255 stands for something within
    labels = (num_classes - 1 - rng.integers(0, min(num_classes, 7), old)).astype(np.uint8)
    got = resample_labels(torch.from_numpy(labels), new, num_classes).numpy()
    np.testing.assert_array_equal(got, naive_labels(labels, new, num_classes))


def test_labels_of_large_blobs_equal_the_naive_argmax() -> None:
    field = ndimage.gaussian_filter(np.random.default_rng(4).normal(size=(60, 44, 50)), 4)
    labels = np.digitize(field, np.quantile(field, [0.2, 0.5, 0.8])).astype(np.uint8)
    for new in ((48, 35, 75), (60, 88, 25), (90, 44, 50)):
        got = resample_labels(torch.from_numpy(labels).clone(), new, 4).numpy()
        np.testing.assert_array_equal(got, naive_labels(labels, new, 4))


def test_an_undeclared_class_is_refused() -> None:
    with pytest.raises(MedsegError) as caught:
        resample_labels(torch.full((3, 3), 4, dtype=torch.uint8), (5, 5), num_classes=4)
    assert caught.value.code == "E_LABEL"


@pytest.mark.skipif(sys.platform == "win32", reason="getrusage")
@pytest.mark.parametrize(
    ("array", "call", "most_mib"),
    [
        ("torch.ones((240, 240, 240), dtype=torch.int16)", "resample(array, (300, 300, 300), order=3)", 103 + 40),
        ("torch.eye(240, dtype=torch.uint8).repeat(240, 1, 1)", "resample_labels(array, (300, 300, 300), 2)", 26 + 60),
    ],
)
def test_memory_beside_input_and_result_is_a_few_slabs(array: str, call: str, most_mib: int) -> None:
    """What is added, the result (the first summand) included. In float32 the input of the first would take 53 MiB more
    and its first axes 69 and 86, each class of the others' results 103 and 64 and several of them at a time."""
    program = f"""{peak.IMPORT}
import torch
from medseg.resampling import resample, resample_labels
torch.set_num_threads(2)
resample(torch.ones(20, 20, 20), (33, 33, 33), order=3)
array = {array}
before = peak_bytes()
result = {call}
print((peak_bytes() - before) / 2**20)
"""
    # One arena, and large pieces go back at once: which arena a slab comes from, and what stays in it, is chance
    environ = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environ)
    assert float(done.stdout) <= most_mib


def test_single_voxel_axis() -> None:
    array = torch.full((1, 5), 3.0)
    for order in (0, 1, 3):
        assert torch.allclose(resample(array, (4, 5), order=order), torch.full((4, 5), 3.0), atol=1e-6)
