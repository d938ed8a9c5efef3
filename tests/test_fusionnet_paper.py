"""FusionNet against table 1 of the paper, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg.models import MODELS
from medseg.models.blocks.residual import ResidualBlock
from medseg.models.blocks.skip import Addition

WIDTHS = (64, 128, 256, 512, 1024)


def build(spatial_dims: int = 2, num_classes: int = 2, **settings):
    return MODELS.build(
        {"name": "fusionnet", **settings}, in_channels=1, num_classes=num_classes, spatial_dims=spatial_dims
    )


def stage_weights(channels: int, width: int, taps: int) -> int:
    """conv → (three convs, summed) → conv; each with bias and with scale and shift of its normalisation."""
    return (channels * taps + 3) * width + 4 * (width * taps + 3) * width


def weights_by_hand(spatial_dims: int, num_classes: int) -> int:
    taps = 3**spatial_dims
    down = sum(stage_weights(c, k, taps) for c, k in zip((1, *WIDTHS), WIDTHS, strict=False))
    up = sum((below * taps + 3) * k + stage_weights(k, k, taps) for below, k in zip(WIDTHS[1:], WIDTHS, strict=False))
    return down + up + (WIDTHS[0] + 1) * num_classes


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_number_of_weights_by_hand(spatial_dims):
    with torch.device("meta"):
        model = build(spatial_dims, num_classes=3)
    assert sum(p.numel() for p in model.parameters()) == weights_by_hand(spatial_dims, 3)


def test_layers_of_table_1():
    """Nine stages of five convolutions, four of each step, additions only; sizes and channels as in the table."""
    with torch.device("meta"):
        model = build().eval()
    kinds = [type(m) for m in model.modules()]
    counts = {
        kind: kinds.count(kind) for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.ConvTranspose2d)
    }
    assert counts == {
        nn.Conv2d: 9 * 5 + 1,
        nn.BatchNorm2d: 9 * 5 + 4,
        nn.ReLU: 9 * 5 + 4,
        nn.MaxPool2d: 4,
        nn.ConvTranspose2d: 4,
    }
    assert kinds.count(ResidualBlock) == 9
    assert kinds.count(Addition) == 4
    maps = []
    for stage in (*model.encoder, *model.decoder):
        stage.register_forward_hook(lambda _layer, _inputs, output: maps.append((output.shape[1], output.shape[-1])))
    output = model(torch.empty(1, 1, 640, 640, device="meta"))
    assert maps == [
        *((64, 640), (128, 320), (256, 160), (512, 80), (1024, 40)),
        *((512, 80), (256, 160), (128, 320), (64, 640)),
    ]
    assert output.shape == (1, 2, 640, 640)


def test_order_within_a_stage():
    """The residual sum is that of the first convolution's maps, and the last convolution follows it."""
    model = build(widths=(4, 8)).eval()
    block = model.encoder[0].block
    x = torch.randn(1, 1, 8, 8)
    first, residual, last = block
    torch.testing.assert_close(block(x), last(torch.relu(first(x) + residual.convolutions(first(x)))))


def test_maps_that_come_across_are_added():
    model = build(widths=(4, 8)).eval()
    stage = model.decoder[0]
    below, across = torch.randn(1, 8, 4, 4), torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(stage(below, across), stage.block(stage.up(below) + across))


def test_pooling_and_filters_per_axis():
    model = build(3, widths=(4, 8, 8), kernels=[(1, 3, 3), 3, 3], strides=[1, (1, 2, 2), 2]).eval()
    assert model.divisor == (2, 4, 4)
    assert model.encoder[0].block[0].convolution.kernel_size == (1, 3, 3)
    assert model(torch.zeros(1, 1, 4, 8, 12)).shape == (1, 2, 4, 8, 12)
