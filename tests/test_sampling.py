"""Patches: where they are cut, what fills them up, and that a step always gives the same batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from medseg.data.prepared import PreparedCase, cut
from medseg.data.sampling import PatchSampler
from medseg.volume import Grid


def case(shape: tuple[int, ...], voxel: tuple[int, ...], case_id: str = "a") -> PreparedCase:
    """An image that counts its voxels, with a single foreground voxel."""
    image = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(1, *shape)
    label = torch.zeros(shape, dtype=torch.uint8)
    label[voxel] = 1
    locations = tuple(np.argwhere(label.numpy() == c).astype(np.int32) for c in (0, 1))
    return PreparedCase(case_id, image, label, Grid.of_picture(shape), locations)


@pytest.mark.parametrize("shape, voxel, patch", [((40, 50), (39, 0), (16, 16)), ((20, 24, 28), (5, 23, 14), (8, 8, 8))])
def test_foreground_samples_hold_the_foreground_and_the_same_image_voxels(shape, voxel, patch) -> None:
    one = case(shape, voxel)
    sampler = PatchSampler([one], patch, batch_size=4, foreground_share=0.5, seed=3)
    for step in range(5):
        image, label = sampler.batch(step)
        assert image.shape == (4, 1, *patch) and label.shape == (4, *patch)
        assert label[2:].flatten(1).sum(1).tolist() == [1, 1]  # the last half is centred on it
        for index in torch.nonzero(label):
            assert image[index[0], 0][tuple(index[1:])] == one.image[0][voxel]


def test_same_step_same_batch_and_prefetch_gives_the_same() -> None:
    cases = [case((30, 30), (3, 3), "a"), case((20, 40), (15, 35), "b")]
    sampler = PatchSampler(cases, (12, 12), batch_size=3, foreground_share=0.3, seed=0)
    again = PatchSampler(cases, (12, 12), batch_size=3, foreground_share=0.3, seed=0)
    batches = sampler.prefetch(5)
    for step, image, label in itertools.islice(batches, 3):
        assert torch.equal(image, again.batch(step)[0]) and torch.equal(label, again.batch(step)[1])
    batches.close()
    assert not torch.equal(again.batch(5)[0], again.batch(6)[0])


def test_error_of_the_thread_arrives_whole() -> None:
    broken = case((20, 20), (3, 3))
    sampler = PatchSampler([broken], (8, 8, 8), batch_size=1, foreground_share=0, seed=0)
    with pytest.raises(ValueError, match="zip"):
        next(sampler.prefetch(0))


def test_case_smaller_than_the_patch_lies_in_its_middle() -> None:
    small = case((4, 6), (1, 1))
    image, label = PatchSampler([small], (8, 8), batch_size=1, foreground_share=1, seed=0).batch(0)
    assert torch.equal(image[0, 0, 2:6, 1:7], small.image[0])
    assert image.sum() == small.image.sum()
    assert label.sum() == 1


def test_cut_fills_by_reflection_as_numpy_does() -> None:
    array = torch.arange(20.0).reshape(1, 4, 5)
    expected = np.pad(array[0].numpy(), ((3, 2), (1, 4)), mode="reflect")
    assert np.array_equal(cut(array, (-3, -1), (9, 10), mirror=True)[0].numpy(), expected)
    far = cut(array, (-20, -20), (44, 45), mirror=True)[0].numpy()
    assert np.array_equal(far, np.pad(array[0].numpy(), 20, mode="reflect"))


def test_cut_outside_is_zero() -> None:
    array = torch.ones(2, 3, 3)
    box = cut(array, (-1, 2), (3, 4))
    assert box.shape == (2, 3, 4) and box.sum() == 2 * 2 * 1
    assert cut(array, (5, 5), (2, 2)).sum() == 0


def test_what_an_unpadded_network_labels_reaches_the_border() -> None:
    """Tiles of 12 of which the middle 4 are labelled: every pixel of the image is in such a middle at some step."""
    one = case((20, 26), (0, 25))
    sampler = PatchSampler(
        [one], (12, 12), batch_size=4, foreground_share=0.25, seed=0, mirror_padding=True, margin=(4, 4)
    )
    seen = torch.zeros(20 * 26, dtype=torch.bool)
    for step in range(1500):
        image, _ = sampler.batch(step)
        seen[image[:, 0, 4:8, 4:8].flatten().long()] = True
    assert seen.all()
