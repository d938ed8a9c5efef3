"""Augmentation: what each transform does, labels moving with the image, sides, reproducibility, nnU-Net's values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.data.augment import AugmentConfig, Augmenter, Mirroring
from medseg.data.augment.draws import Draws
from medseg.data.augment.intensity import blur, curve, make_coarse, stretch, vary
from medseg.data.augment.spatial import MAX_CUT, resample, rotation_matrix
from medseg.data.prepared import cut
from medseg.errors import MedsegError

OFF: dict[str, Any] = {
    "rotation_probability": 0.0,
    "scale_probability": 0.0,
    "noise_probability": 0.0,
    "blur_probability": 0.0,
    "brightness_probability": 0.0,
    "contrast_probability": 0.0,
    "low_resolution_probability": 0.0,
    "gamma_inverted_probability": 0.0,
    "gamma_probability": 0.0,
}
INTENSITIES = [name for name in OFF if name not in ("rotation_probability", "scale_probability")]


def augmenter(
    patch: tuple[int, ...],
    spacing: tuple[float, ...] | None = None,
    *,
    picture: bool = False,
    mirroring: Mirroring | None = None,
    seed: int = 0,
    **changes: Any,
) -> Augmenter:
    return Augmenter(
        AugmentConfig(**{**OFF, **changes}),
        patch_size=patch,
        spacing_mm=spacing or (1.0,) * len(patch),
        is_picture=picture,
        mirroring=mirroring or Mirroring(),
        seed=seed,
    )


def batch(shape: tuple[int, ...] = (2, 1, 24, 24)) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return image, (image[:, 0] > 0.5).to(torch.uint8)


def smooth(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.5)
    return ((field - field.mean()) / field.std()).astype(np.float32)


# --- the whole ---


def test_everything_off_is_the_identity() -> None:
    image, label = batch()
    new, new_label = augmenter((24, 24))(image, label, 0)
    assert torch.equal(new, image) and torch.equal(new_label, label)


def test_probability_0_is_the_identity_and_1_is_not() -> None:
    image, label = batch((3, 2, 12, 12, 12))
    for name in OFF:
        new, new_label = augmenter((12, 12, 12), **{name: 1.0, "channel_probability": 1.0})(image, label, 0)
        assert all(not torch.allclose(new[n, c], image[n, c]) for n in range(3) for c in range(2)), name
        assert torch.isfinite(new).all()
        assert torch.equal(new_label, label) == (name in INTENSITIES)
        assert set(new_label.unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("shape", [(4, 2, 16, 12, 20), (4, 1, 24, 20)])
def test_same_step_same_result_and_inputs_untouched(shape: tuple[int, ...]) -> None:
    image, label = batch(shape)
    before, before_label = image.clone(), label.clone()
    axes = tuple(range(len(shape) - 2))
    settings_ = dict.fromkeys(OFF, 0.5)
    full = augmenter(shape[2:], mirroring=Mirroring(axes), seed=1, picture=len(axes) == 2, **settings_)
    again = augmenter(shape[2:], mirroring=Mirroring(axes), seed=1, picture=len(axes) == 2, **settings_)
    first, second, other = full(image, label, 7), again(image, label, 7), full(image, label, 8)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0]) and first[0].shape == image.shape and first[1].dtype == label.dtype
    assert torch.equal(image, before) and torch.equal(label, before_label)


def test_the_device_is_never_asked() -> None:
    """On the meta device every look at a value raises: no step waits for a GPU."""
    image, label = batch((4, 2, 8, 8, 8))
    all_on = {name: 0.6 for name in OFF if name != "noise_probability"}  # there is no generator for meta
    swap = Mirroring((0, 1, 2), 2, (0, 2, 1))
    for step in range(4):
        new, new_label = augmenter((8, 8, 8), mirroring=swap, **all_on)(image.to("meta"), label.to("meta"), step)
        assert new.is_meta and new_label.is_meta and new.shape == image.shape


def test_rows_apart_and_rows_together_are_changed_alike() -> None:
    """Neighbouring rows are changed as a view, others are gathered: both only touch what was chosen."""
    image, label = batch((6, 3, 10, 10))
    turned_on = {"blur_probability": 0.5, "contrast_probability": 0.5, "gamma_probability": 0.5}
    for step in range(6):
        new, _ = augmenter((10, 10), picture=True, **turned_on)(image, label, step)
        for n, c in itertools.product(range(6), range(3)):
            alone = image.clone()
            alone[:n], alone[n + 1 :] = 0, 0
            again, _ = augmenter((10, 10), picture=True, **turned_on)(alone, label, step)
            torch.testing.assert_close(again[n, c], new[n, c], atol=1e-5, rtol=1e-5)


def test_a_changed_probability_shifts_nothing_else() -> None:
    image, label = batch((8, 1, 12, 12))
    plain, _ = augmenter((12, 12), brightness_probability=0.5)(image, label, 3)
    both, _ = augmenter((12, 12), brightness_probability=0.5, noise_probability=0.4, noise=(0, 0))(image, label, 3)
    torch.testing.assert_close(plain, both)


# --- nnU-Net ---


def test_defaults_are_nnunet_s() -> None:
    """Read off `get_training_transforms` of nnU-Net 2.8.1."""
    config = AugmentConfig()
    got = {name: value for name, value in vars(config).items() if name not in ("mirror_axes", "swap")}
    assert got == {
        "rotation_probability": 0.2,
        "rotation_degrees": None,
        "scale_probability": 0.2,
        "scale": (0.7, 1.4),
        "noise_probability": 0.1,
        "noise": (0.0, 0.1),
        "blur_probability": 0.2,
        "blur": (0.5, 1.0),
        "brightness_probability": 0.15,
        "brightness": (0.75, 1.25),
        "contrast_probability": 0.15,
        "contrast": (0.75, 1.25),
        "low_resolution_probability": 0.25,
        "low_resolution": (0.5, 1.0),
        "channel_probability": 0.5,
        "gamma_inverted_probability": 0.1,
        "gamma_probability": 0.3,
        "gamma": (0.7, 1.5),
    }
    assert augmenter((8, 8, 8)).angle == pytest.approx(math.radians(30))
    assert augmenter((8, 8), picture=True).angle == pytest.approx(math.pi)
    assert augmenter((8, 16), picture=True).angle == pytest.approx(math.radians(15))
    thick = augmenter((8, 8, 8), (5.0, 1.0, 1.0))
    assert thick.thick_axis == 0 and thick.angle == pytest.approx(math.radians(30))


def test_shares_and_ranges() -> None:
    draws = Draws(0, 0)
    assert draws.chosen((20000,), 0.3).float().mean() == pytest.approx(0.3, abs=0.02)
    values = draws.uniform((20000,), (0.7, 1.4))
    assert 0.7 <= values.min() < 0.71 and 1.39 < values.max() < 1.4 and values.mean() == pytest.approx(1.05, abs=0.01)
    factors = draws.factor((20000,), (0.7, 1.5))
    assert 0.7 <= factors.min() < 0.71 and 1.49 < factors.max() <= 1.5
    assert (factors < 1).float().mean() == pytest.approx(0.5, abs=0.02)  # BGContrast: either side of 1 equally often
    assert draws.factor((100,), (1.2, 1.4)).min() >= 1.2 and draws.factor((100,), (0.5, 0.8)).max() <= 0.8
    moves = augmenter((8, 8, 8), rotation_probability=0.2, scale_probability=0.2).mover.moves(Draws(1, 1), 5000)
    assert np.mean([m.matrix is not None for m in moves]) == pytest.approx(1 - 0.8**2, abs=0.03)


def test_channels_draw_apart() -> None:
    """Brightness, contrast and gamma draw a factor per channel; blur and low resolution take half of the channels."""
    image = torch.ones(40, 2, 6, 6) + 0.1 * batch((40, 2, 6, 6))[0]
    vary(bright := image.clone(), AugmentConfig(**{**OFF, "brightness_probability": 1.0}), Draws(0, 0), None)
    factor = (bright / image).mean((2, 3))
    assert (factor[:, 0] - factor[:, 1]).abs().min() > 0 and factor.min() >= 0.75 and factor.max() <= 1.25
    vary(blurred := image.clone(), AugmentConfig(**{**OFF, "blur_probability": 1.0}), Draws(0, 0), None)
    touched = (blurred != image).flatten(2).any(2)
    assert 0.3 < touched.float().mean() < 0.7 and not torch.equal(touched[:, 0], touched[:, 1])


# --- each transform ---


def test_noise_has_the_deviation_that_was_drawn() -> None:
    image, label = torch.zeros(3, 2, 40, 40, 40), torch.zeros(3, 40, 40, 40, dtype=torch.uint8)
    noisy, _ = augmenter((40, 40, 40), noise_probability=1.0, noise=(0.07, 0.07))(image, label, 0)
    for n, c in itertools.product(range(3), range(2)):
        assert float(noisy[n, c].std()) == pytest.approx(0.07, rel=0.02) and abs(float(noisy[n, c].mean())) < 1e-3
    assert not torch.equal(noisy[0, 0], noisy[0, 1]) and not torch.equal(noisy[0, 0], noisy[1, 0])


@pytest.mark.parametrize(
    "shape, sigma", [((17, 23), (0.5, 1.0)), ((9, 12, 15), (1.0, 0.6, 0.8)), ((3, 2, 9), (1, 1, 1))]
)
def test_blur_is_a_gaussian_along_each_axis(shape: tuple[int, ...], sigma: tuple[float, ...]) -> None:
    array = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    rows = torch.from_numpy(array.copy())
    widths = torch.tensor([sigma, [0.7] * len(shape)])
    blur(rows, widths, 3)
    for row, source, width in zip(rows, array, widths, strict=True):
        expected = ndimage.gaussian_filter(source, width.tolist(), mode="mirror", radius=3)
        np.testing.assert_allclose(row.numpy(), expected, atol=1e-5)


def test_contrast_keeps_mean_and_range() -> None:
    rows = torch.from_numpy(smooth((2, 30, 30)))
    old = rows.clone()
    stretch(rows, torch.tensor([0.75, 1.25]))
    mean = old.mean((1, 2), keepdim=True)
    torch.testing.assert_close(rows[0], mean[0] + 0.75 * (old[0] - mean[0]))
    wide = (mean[1] + 1.25 * (old[1] - mean[1])).clamp(old[1].min(), old[1].max())
    torch.testing.assert_close(rows[1], wide)


@pytest.mark.parametrize("inverted", [False, True])
def test_gamma(inverted: bool) -> None:
    rows = torch.from_numpy(smooth((2, 12, 14, 16), 1)) + 3
    old, exponents = rows.clone(), torch.tensor([0.7, 1.5])
    curve(rows, exponents, inverted=inverted)
    sign = -1 if inverted else 1
    for new, x, exponent in zip(rows, sign * old.double(), exponents, strict=True):
        power = ((x - x.min()) / (x.max() - x.min())) ** exponent
        expected = sign * ((power - power.mean()) / power.std() * x.std() + x.mean())
        torch.testing.assert_close(new.double(), expected, atol=1e-4, rtol=1e-4)
    assert rows.mean().item() == pytest.approx(old.mean().item(), abs=1e-4)
    constant = torch.full((1, 8, 8), 2.0)
    curve(constant, exponents[:1], inverted=inverted)
    torch.testing.assert_close(constant, torch.full((1, 8, 8), 2.0))


def test_low_resolution_loses_detail_and_keeps_the_rest() -> None:
    flat = torch.full((20, 20, 20), 3.0)
    make_coarse(flat, 0.5, None)
    torch.testing.assert_close(flat, torch.full((20, 20, 20), 3.0))
    stripes = (torch.arange(20) % 2).float().expand(20, 20, 20).clone()
    make_coarse(stripes, 0.5, None)
    assert stripes.std() < 1e-6  # every second voxel of a comb of period 2
    ramp = torch.arange(20.0).view(20, 1, 1).expand(20, 20, 20).clone()
    make_coarse(ramp, 0.5, 0)
    torch.testing.assert_close(ramp[:, 0, 0], torch.arange(20.0))  # thick slices stay apart
    same = torch.from_numpy(smooth((9, 9)))
    kept = same.clone()
    make_coarse(same, 1.0, None)
    torch.testing.assert_close(same, kept)


# --- moving ---


@pytest.mark.parametrize("shape, size", [((21, 18, 25), (15, 12, 19)), ((31, 22), (21, 30))])
def test_resample_equals_grid_sample(shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    dims = len(shape)
    image, label = torch.randn(2, *shape), torch.randint(0, 5, shape, dtype=torch.uint8)
    matrix = rotation_matrix(torch.tensor([[0.4, 0.2, -0.3]], dtype=torch.float64), dims)[0] * 1.3
    new_image, new_label = torch.empty(2, *size), torch.empty(size, dtype=torch.uint8)
    resample(image, label, matrix, new_image, new_label, reflect=False)
    scaled = torch.diag(1 / torch.tensor(shape).double()) @ matrix @ torch.diag(torch.tensor(size).double())
    theta = torch.cat([scaled.flip(0, 1).float(), torch.zeros(dims, 1)], 1)[None]
    grid = torch.nn.functional.affine_grid(theta, [1, 1, *size], align_corners=False)

    def sampled(source: torch.Tensor, mode: str) -> torch.Tensor:
        return torch.nn.functional.grid_sample(source[None].float(), grid, mode=mode, align_corners=False)[0]

    torch.testing.assert_close(new_image, sampled(image, "bilinear"), atol=1e-4, rtol=1e-4)
    differing = (new_label != sampled(label[None], "nearest")[0]).float().mean()
    assert differing < 0.002  # points half-way between two voxels


def test_reflection_continues_the_cut() -> None:
    """What a small cut lacks is filled as a larger cut would be, which reflects at the same voxels."""
    picture = torch.from_numpy(smooth((1, 20, 24)))
    wide = cut(picture, (-8, -8), (36, 40), mirror=True)
    matrix = rotation_matrix(torch.tensor([[0.7, 0, 0]], dtype=torch.float64), 2)[0]
    results = []
    for source in (picture, wide):
        new, new_label = torch.empty(1, 20, 24), torch.empty(20, 24, dtype=torch.uint8)
        resample(source, (source[0] > 0).to(torch.uint8), matrix, new, new_label, reflect=True)
        results.append((new, new_label))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    assert (results[0][1] != results[1][1]).float().mean() < 0.01


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    patch=st.lists(st.sampled_from([8, 11, 14]), min_size=2, max_size=3).map(tuple),
    thickness=st.sampled_from([1.0, 1.7, 4.0]),
    mirror=st.booleans(),
    large=st.booleans(),
)
def test_label_moves_with_the_image(
    seed: int, patch: tuple[int, ...], thickness: float, mirror: bool, large: bool
) -> None:
    """An image that is its own label, interpolated linearly, is at the label's side of ½ wherever it is clear."""
    axes = tuple(range(len(patch))) if mirror else ()
    turn = augmenter(
        patch,
        (thickness, *(1.0,) * (len(patch) - 1)),
        picture=len(patch) == 2,
        mirroring=Mirroring(axes),
        seed=seed,
        rotation_probability=0.7,
        scale_probability=0.7,
    )
    size = turn.cut_size(5, 3) if large else patch
    label = torch.from_numpy(np.stack([smooth(size, seed + n) > 0 for n in range(3)])).to(torch.uint8)
    moved, moved_label = turn(label[:, None].float(), label, 5)
    assert moved_label.shape == (3, *patch) and set(moved_label.unique().tolist()) <= {0, 1}
    # The nearest of the 2^n corners weighs most: at least 2^-n, so it decides only where all others agree.
    assert (moved[:, 0][moved_label == 1] >= 0.5 ** len(patch) - 1e-4).all()
    assert (moved[:, 0][moved_label == 0] <= 1 - 0.5 ** len(patch) + 1e-4).all()
    assert ((moved[:, 0] > 0.5) == (moved_label > 0)).float().mean() > 0.9


def test_rotation_is_rigid_in_mm() -> None:
    """In a patch of 2 mm rows and 1 mm columns a rotation by 90 degrees swaps a bar of equal length in mm."""
    image = torch.zeros(1, 1, 20, 40)
    image[0, 0, 10, 8:32] = 1  # 24 mm long along the columns
    label = image[:, 0].to(torch.uint8)
    turn = augmenter((20, 40), (2.0, 1.0), rotation_probability=1.0, rotation_degrees=90.0)
    lengths = set()
    for step in range(40):  # angles are drawn: take those close to a right angle
        _, moved = turn(image, label, step)
        rows = int((moved[0].sum(1) > 0).sum())
        columns = int((moved[0].sum(0) > 0).sum())
        lengths.add((rows * 2, columns))
    tallest = max(lengths)
    assert tallest[0] == pytest.approx(24, abs=4) and tallest[1] < 12


def test_a_larger_field_of_view_makes_things_smaller() -> None:
    label = torch.zeros(1, 40, 40, dtype=torch.uint8)
    label[:, 10:30, 10:30] = 1
    _, smaller = augmenter((40, 40), scale_probability=1.0, scale=(1.4, 1.4))(label[:, None].float(), label, 0)
    assert int(smaller.sum()) == pytest.approx((20 / 1.4) ** 2, abs=30)


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_thick_slices_are_turned_only_within_themselves(thick: int) -> None:
    spacing = [1.0, 1.0, 1.0]
    spacing[thick] = 5.0
    turn = augmenter((9, 9, 9), tuple(spacing), rotation_probability=1.0)
    label = torch.zeros(4, 9, 9, 9, dtype=torch.uint8)
    label.select(thick + 1, 4)[...] = 1
    _, moved = turn(label[:, None].float(), label, 0)
    others = [i for i in range(9) if i != 4]
    assert moved.index_select(thick + 1, torch.tensor(others)).sum() == 0
    assert moved.sum() > 0


@pytest.mark.parametrize("patch", [(16, 16, 16), (8, 20, 24), (24, 24)])
def test_cut_leaves_no_empty_corners(patch: tuple[int, ...]) -> None:
    turn = augmenter(patch, rotation_probability=0.5, rotation_degrees=15.0, scale_probability=0.5, scale=(0.8, 1.2))
    larger = 0
    for step in range(12):
        size = turn.cut_size(step, 2)
        assert all(n >= p and (n - p) % 2 == 0 for n, p in zip(size, patch, strict=True))
        assert math.prod(size) <= MAX_CUT * math.prod(patch)
        larger += size != patch
        image, label = torch.ones(2, 1, *size), torch.ones(2, *size, dtype=torch.uint8)
        new_image, new_label = turn(image, label, step)
        assert new_label.min() == 1 and new_image.min() > 0.999
    assert 0 < larger < 12
    assert augmenter(patch).cut_size(0, 8) == patch
    wild = augmenter(patch, rotation_probability=1.0, rotation_degrees=45.0, scale_probability=1.0, scale=(2.0, 2.0))
    assert math.prod(wild.cut_size(0, 4)) <= MAX_CUT * math.prod(patch)


def test_middle_of_a_larger_cut_is_the_patch() -> None:
    image, label = batch((2, 1, 20, 26))
    new, new_label = augmenter((16, 16))(image, label, 0)
    assert torch.equal(new, image[:, :, 2:18, 5:21]) and torch.equal(new_label, label[:, 2:18, 5:21])


def test_mirror() -> None:
    image, label = batch((16, 1, 6, 8))
    new_image, new_label = augmenter((6, 8), picture=True, mirroring=Mirroring((1,)))(image, label, 0)
    flipped = [torch.equal(new_image[i], image[i].flip(2)) for i in range(16)]
    assert 0 < sum(flipped) < 16
    for i in range(16):
        assert torch.equal(new_image[i], image[i].flip(2) if flipped[i] else image[i])
        assert torch.equal(new_label[i], label[i].flip(1) if flipped[i] else label[i])


def test_bad_settings() -> None:
    with pytest.raises(MedsegError, match="between 0 and 1"):
        AugmentConfig(noise_probability=1.5)
    with pytest.raises(MedsegError, match=r"\(low, high\)"):
        AugmentConfig(gamma=(1.5, 0.7))
    with pytest.raises(MedsegError, match="positive"):
        AugmentConfig(blur=(0.0, 1.0))
    with pytest.raises(MedsegError, match="smaller than the patch"):
        AugmentConfig(low_resolution=(0.5, 1.5))


def test_the_strong_option_moves_most_samples() -> None:
    from medseg.config import compose

    moved = {}
    for option in ("default", "strong"):
        config = compose("train", [f"augment={option}"]).augment
        turn = Augmenter(
            config, patch_size=(12, 12, 12), spacing_mm=(1.0,) * 3, is_picture=False, mirroring=Mirroring(), seed=0
        )
        moves = [turn.mover.moves(Draws(0, step), 2) for step in range(200)]
        moved[option] = np.mean([move.matrix is not None for of_step in moves for move in of_step])
        image, label = turn(torch.randn(2, 1, 12, 12, 12), torch.ones(2, 12, 12, 12, dtype=torch.uint8), 0)
        assert image.isfinite().all() and set(label.unique().tolist()) <= {0, 1}
    assert moved["default"] == pytest.approx(0.36, abs=0.07) and moved["strong"] == pytest.approx(0.75, abs=0.07)
