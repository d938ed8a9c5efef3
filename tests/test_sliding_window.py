"""Tiling: coverage, weights, equality with the bare network and with MONAI's tiling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from medseg.data.augment import Mirroring
from medseg.errors import MedsegError
from medseg.inference.sliding_window import (
    WindowConfig,
    first_alike,
    gaussian_weight,
    sliding_window_logits,
    sliding_window_planes,
    tile_starts,
)
from medseg.models import MODELS, SegmentationModel


class Pointwise(SegmentationModel):
    """Scores that depend on each voxel alone: any tiling must give the same."""

    def __init__(self, margin: int = 0) -> None:
        super().__init__()
        self.margin = margin
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.shapes: list[tuple[int, ...]] = []

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n - 2 * self.margin for n in input_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        m = self.margin
        inner = x[(..., *(slice(m, n - m) for n in x.shape[2:]))]
        return torch.cat([inner * self.scale, inner**2], 1)


@pytest.mark.parametrize("shape", [(20, 31), (5, 40), (3, 3), (16, 16), (9, 21, 17), (33, 4, 8)])
@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("step", [0.5, 1.0])
def test_any_size_is_covered_exactly(shape: tuple[int, ...], margin: int, step: float) -> None:
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    model = Pointwise(margin)
    patch = (16,) * len(shape)
    logits = sliding_window_logits(model, image, patch, 2, WindowConfig(step=step, batch_size=3))
    torch.testing.assert_close(logits, torch.cat([image, image**2]), atol=1e-5, rtol=1e-5)
    assert {s[2:] for s in model.shapes} == {patch}  # the network only ever sees whole tiles


def test_mirroring_averages_the_flipped_passes() -> None:
    image = torch.randn(1, 8, 8)

    class FirstRow(Pointwise):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = torch.zeros(x.shape[0], 2, *x.shape[2:])
            out[:, 1, 0] = self.scale  # marks the first row of whatever it sees
            return out

    logits = sliding_window_logits(FirstRow(), image, (8, 8), 2, WindowConfig(mirroring=Mirroring((0,))))
    assert logits[1, 0].tolist() == [0.5] * 8 and logits[1, -1].tolist() == [0.5] * 8
    assert logits[1, 1:-1].abs().sum() == 0


def test_mirrored_passes_swap_sides_back() -> None:
    """A network that calls the low columns class 1 and the high ones class 2, whatever it sees there."""

    class BySide(Pointwise):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = torch.zeros(x.shape[0], 4, *x.shape[2:])
            half = x.shape[-1] // 2
            out[:, 1, ..., :half] = out[:, 2, ..., half:] = self.scale
            out[:, 3] = x[:, 0]
            return out

    image = torch.randn(1, 8, 8)
    plain = sliding_window_logits(BySide(), image, (8, 8), 4, WindowConfig())
    pairs = Mirroring((0, 1), 1, (0, 2, 1, 3))
    swapped = sliding_window_logits(BySide(), image, (8, 8), 4, WindowConfig(mirroring=pairs))
    torch.testing.assert_close(swapped, plain)
    confused = sliding_window_logits(BySide(), image, (8, 8), 4, WindowConfig(mirroring=Mirroring((0, 1))))
    assert (confused[1] == 0.5).all() and (confused[2] == 0.5).all()


@pytest.mark.parametrize(
    "size, tile, step", [(100, 32, 0.5), (32, 32, 0.5), (33, 32, 0.5), (64, 32, 1.0), (50, 7, 0.3)]
)
def test_tiles_cover_and_overlap(size: int, tile: int, step: float) -> None:
    starts = [s for (s,) in tile_starts([size], [tile], step)]
    assert starts[0] == 0 and starts[-1] == size - tile
    assert all(b - a <= np.ceil(tile * step) for a, b in itertools.pairwise(starts))


def test_gaussian_weight() -> None:
    weight = gaussian_weight((9, 17))
    assert weight.argmax() == 4 * 17 + 8 and weight.max() == 1 and weight.min() > 0
    assert weight[4, 10] / weight[4, 8] == pytest.approx(np.exp(-0.5 * (2 / (17 / 8)) ** 2), rel=1e-4)


def test_equals_the_bare_network_on_one_tile() -> None:
    torch.manual_seed(0)
    model = MODELS.build({"name": "unet", "widths": [4, 8]}, in_channels=2, num_classes=3, spatial_dims=3).eval()
    image = torch.randn(2, 8, 12, 16)
    with torch.no_grad():
        expected = model(image[None])[0]
    got = sliding_window_logits(model, image, (8, 12, 16), 3, WindowConfig())
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_agrees_with_monai(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same tiles where sizes divide. Weights are equal here: MONAI discretises its Gaussian otherwise."""
    from medseg.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    from monai.inferers import sliding_window_inference

    torch.manual_seed(0)
    model = MODELS.build({"name": "unet", "widths": [4, 8]}, in_channels=1, num_classes=2, spatial_dims=2).eval()
    image = torch.randn(1, 48, 64)
    with torch.no_grad():
        theirs = sliding_window_inference(image[None], (16, 32), 4, model, overlap=0.5, mode="constant")[0]
    monkeypatch.setattr("medseg.inference.sliding_window.gaussian_weight", torch.ones)
    ours = sliding_window_logits(model, image, (16, 32), 2, WindowConfig())
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_bad_step() -> None:
    with pytest.raises(MedsegError, match="0 < step <= 1"):
        WindowConfig(step=0)


def tiny_unet(dims: int = 3, channels: int = 1, num_classes: int = 3) -> SegmentationModel:
    torch.manual_seed(0)
    settings = {"name": "unet", "widths": [4, 8]}
    return MODELS.build(settings, in_channels=channels, num_classes=num_classes, spatial_dims=dims).eval()


def by_hand(
    model: SegmentationModel, image: torch.Tensor, patch: tuple[int, ...], mirroring: Mirroring
) -> torch.Tensor:
    """All tiles and passes one by one into whole sums."""
    weight = gaussian_weight(patch)
    total, weights = torch.zeros(3, *image.shape[1:]), torch.zeros(image.shape[1:])
    for start in tile_starts(image.shape[1:], patch, 0.5):
        box = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
        tile = image[(slice(None), *box)][None]
        passes = [()] + [c for n in (1, 2, 3) for c in itertools.combinations(mirroring.axes, n)]
        logits = sum(model(tile.flip([a + 2 for a in c])).flip([a + 2 for a in c])[0] for c in passes) / len(passes)
        total[(slice(None), *box)] += logits * weight
        weights[box] += weight
    return total / weights


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [None, 1, 3, 16])
@pytest.mark.parametrize("shape", [(37, 20, 18), (8, 19, 16), (16, 16, 16)])
def test_tiles_and_mirrored_passes_in_one_batch(batch_size: int | None, shape: tuple[int, ...]) -> None:
    model, mirroring = tiny_unet(), Mirroring((0, 2))
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    got = sliding_window_logits(model, image, (8, 16, 16), 3, WindowConfig(mirroring=mirroring, batch_size=batch_size))
    torch.testing.assert_close(got, by_hand(model, image, (8, 16, 16), mirroring), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("margin", [0, 3])
@pytest.mark.parametrize("shape", [(70, 31, 20), (9, 40, 20), (17, 16, 3)])
@pytest.mark.parametrize("step", [0.3, 0.5, 1.0])
def test_planes_come_in_order_and_once(shape: tuple[int, ...], margin: int, step: float) -> None:
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    patch = (16,) * 3
    arguments = (Pointwise(margin), image, patch, 2, WindowConfig(step=step))
    whole = sliding_window_logits(*arguments)
    done, pieces = 0, 0
    for first, planes in sliding_window_planes(*arguments):
        assert first == done and planes.shape[2:] == shape[1:]
        assert torch.equal(planes, whole[:, first : first + planes.shape[1]])
        done, pieces = done + planes.shape[1], pieces + 1
        assert planes.shape[1] <= 16  # a tile's depth, never the whole
    assert done == shape[0] and (pieces > 1) == (shape[0] > 16 - 2 * margin)


def test_sums_of_half_precision() -> None:
    model = tiny_unet()
    image = torch.randn(1, 30, 28, 26, generator=torch.Generator().manual_seed(0))
    full = sliding_window_logits(model, image, (8, 16, 16), 3, WindowConfig())
    half = sliding_window_logits(model, image, (8, 16, 16), 3, WindowConfig(), torch.float16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), full, atol=5e-3, rtol=5e-3)
    assert (half.argmax(0) == full.argmax(0)).float().mean() > 0.995


class Counting(Pointwise):
    """Scores that depend on the whole tile and on the place in it: what is reused must fit to the place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x.shape))
        ramp = torch.arange(x.shape[-1], dtype=x.dtype) * self.scale
        return torch.cat([x + ramp, x.mean(dim=(2, 3, 4), keepdim=True) - ramp + 0 * x], 1)


@pytest.mark.parametrize("mirroring", [Mirroring(), Mirroring((0, 2))])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_tiles_of_one_value_are_computed_once_and_nothing_changes(mirroring: Mirroring, batch_size: int) -> None:
    image = torch.full((1, 40, 40, 64), -1.5)
    image[:, 12:20, 14:22, 40:50] = torch.randn(8, 8, 10, generator=torch.Generator().manual_seed(0))
    image[:, 24:] = 0.25  # another value: not the same tile
    logits, passes = [], []
    for skip in (False, True):
        model = Counting()
        config = WindowConfig(mirroring=mirroring, batch_size=batch_size, skip=skip)
        logits.append(sliding_window_logits(model, image, (8, 8, 16), 2, config))
        passes.append(sum(shape[0] for shape in model.shapes))
    assert torch.equal(*logits)
    assert passes[1] < passes[0] / 3


def test_tiles_of_one_value_in_one_channel_only_are_different() -> None:
    padded = torch.zeros(2, 16, 64)
    padded[1, :, 32:] = torch.randn(16, 32)
    starts = [(0, 0), (0, 16), (0, 32), (0, 0)]
    assert first_alike(padded, starts, (16, 16)) == [0, 0, 2, 0]
    padded[1, 3, 3] = 1e-7  # one voxel of the first and the last, between those that are looked at first
    assert first_alike(padded, starts, (16, 16)) == [0, 1, 2, 3]
