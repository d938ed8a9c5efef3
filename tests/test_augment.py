"""Augmentation: properties of each transform, labels moving with the image, reproducibility."""

from __future__ import annotations

import math

import pytest
import torch

from medseg.data.augment import AugmentConfig, Augmenter, rotation_matrix
from medseg.errors import MedsegError

OFF = {
    "rotation_probability": 0.0,
    "scale_probability": 0.0,
    "mirror_axes": (),
    "noise_probability": 0.0,
    "brightness_probability": 0.0,
    "contrast_probability": 0.0,
    "gamma_probability": 0.0,
    "gamma_inverted_probability": 0.0,
}


def augmenter(spacing: tuple[float, ...] = (1.0, 1.0), picture: bool = True, **changes: object) -> Augmenter:
    config = AugmentConfig(**{**OFF, **changes})  # type: ignore[arg-type]
    return Augmenter(config, spacing_mm=spacing, is_picture=picture, seed=0)


def batch(shape: tuple[int, ...] = (2, 1, 24, 24)) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return image, (image[:, 0] > 0.5).to(torch.uint8)


def test_everything_off_is_the_identity() -> None:
    image, label = batch()
    new_image, new_label = augmenter()(image, label, 0)
    assert torch.equal(new_image, image) and torch.equal(new_label, label)


def test_same_step_same_result_and_inputs_untouched() -> None:
    image, label = batch((4, 2, 16, 16, 16))
    before = image.clone()
    full = Augmenter(AugmentConfig(), spacing_mm=(1.0, 1.0, 1.0), is_picture=False, seed=1)
    first, second, other = full(image, label, 7), full(image, label, 7), full(image, label, 8)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_probability": 1.0},
        {"brightness_probability": 1.0},
        {"contrast_probability": 1.0},
        {"gamma_probability": 1.0},
        {"gamma_inverted_probability": 1.0},
    ],
)
def test_intensity_transforms_change_the_image_and_leave_labels(change: dict[str, float]) -> None:
    image, label = batch()
    new_image, new_label = augmenter(**change)(image, label, 0)
    assert torch.equal(new_label, label)
    assert not torch.allclose(new_image, image)
    assert torch.isfinite(new_image).all()


def test_gamma_keeps_mean_and_deviation_and_survives_a_constant_image() -> None:
    image, label = batch()
    curved, _ = augmenter(gamma_probability=1.0)(image, label, 0)
    assert torch.allclose(curved.mean((2, 3)), image.mean((2, 3)), atol=1e-4)
    assert torch.allclose(curved.std((2, 3)), image.std((2, 3)), atol=1e-3)
    constant, _ = augmenter(gamma_probability=1.0)(torch.full((1, 1, 8, 8), 2.0), label[:1, :8, :8], 0)
    assert torch.isfinite(constant).all()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.5, 1.0)])
def test_label_moves_with_the_image(spacing: tuple[float, ...]) -> None:
    axes = [torch.arange(32.0) for _ in range(3)]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    blob = ((z - 12) ** 2 + (y - 18) ** 2 + (x - 15) ** 2 < 64).float()
    image, label = blob[None, None].repeat(8, 1, 1, 1, 1), blob[None].repeat(8, 1, 1, 1).to(torch.uint8)
    turn = augmenter(spacing, picture=False, rotation_probability=1.0, scale_probability=1.0, scale=(0.8, 1.2))
    moved, moved_label = turn(image, label, 0)
    assert not torch.equal(moved_label, label)
    agree = ((moved[:, 0] > 0.5) == (moved_label > 0)).float().mean()
    assert agree > 0.995


def test_rotation_is_rigid_in_mm() -> None:
    """In a patch of 2 mm rows and 1 mm columns a rotation by 90 degrees swaps a bar of equal length in mm."""
    image = torch.zeros(1, 1, 20, 40)
    image[0, 0, 10, 8:32] = 1  # 24 mm long along the columns
    label = image[:, 0].to(torch.uint8)
    turn = augmenter((2.0, 1.0), rotation_probability=1.0, rotation_degrees=90.0)
    matrix = rotation_matrix(torch.tensor([[math.pi / 2, 0, 0]]), 2)
    assert torch.allclose(matrix[0].abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), atol=1e-6)
    lengths = set()
    for step in range(40):  # angles are drawn: take those close to a right angle
        _, moved = turn(image, label, step)
        rows = int((moved[0].sum(1) > 0).sum())
        columns = int((moved[0].sum(0) > 0).sum())
        lengths.add((rows * 2, columns))
    tallest = max(lengths)
    assert tallest[0] == pytest.approx(24, abs=4) and tallest[1] < 12


def test_zoom_enlarges() -> None:
    image = torch.zeros(1, 1, 40, 40)
    image[..., 15:25, 15:25] = 1
    _, bigger = augmenter(scale_probability=1.0, scale=(1.4, 1.4))(image, image[:, 0].to(torch.uint8), 0)
    assert int(bigger.sum()) == pytest.approx(14 * 14, abs=30)


def test_mirror() -> None:
    image, label = batch((16, 1, 6, 8))
    new_image, new_label = augmenter(mirror_axes=(1,))(image, label, 0)
    flipped = [torch.equal(new_image[i], image[i].flip(2)) for i in range(16)]
    assert 0 < sum(flipped) < 16
    for i in range(16):
        assert torch.equal(new_image[i], image[i].flip(2) if flipped[i] else image[i])
        assert torch.equal(new_label[i], label[i].flip(1) if flipped[i] else label[i])


def test_defaults_respect_sides_of_the_body() -> None:
    assert Augmenter(AugmentConfig(), spacing_mm=(1.0,) * 3, is_picture=False, seed=0).mirror_axes == ()
    assert Augmenter(AugmentConfig(), spacing_mm=(1.0,) * 2, is_picture=True, seed=0).mirror_axes == (0, 1)
    thick = Augmenter(AugmentConfig(), spacing_mm=(5.0, 1.0, 1.0), is_picture=False, seed=0)
    assert thick.in_plane_only and thick.angle == pytest.approx(math.radians(15))


def test_bad_settings() -> None:
    with pytest.raises(MedsegError, match="between 0 and 1"):
        AugmentConfig(noise_probability=1.5)
    with pytest.raises(MedsegError, match="axes 0 to 1"):
        augmenter(mirror_axes=(2,))


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_thick_slices_are_turned_only_within_themselves(thick: int) -> None:
    spacing = [1.0, 1.0, 1.0]
    spacing[thick] = 5.0
    turn = augmenter(tuple(spacing), picture=False, rotation_probability=1.0, rotation_degrees=30.0)
    label = torch.zeros(4, 9, 9, 9, dtype=torch.uint8)
    label.select(thick + 1, 4)[...] = 1
    _, moved = turn(label[:, None].float(), label, 0)
    others = [i for i in range(9) if i != 4]
    assert moved.index_select(thick + 1, torch.tensor(others)).sum() == 0
    assert moved.sum() > 0
