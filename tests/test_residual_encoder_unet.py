"""The residual-encoder U-Net: layers and numbers of weights as nnU-Net has them. Equal answers:
test_nnunet_weights.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medseg.errors import Code, MedsegError
from medseg.models import MODELS
from medseg.models.blocks.residual import ResidualBlock

COUNTS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "goldens" / "nnunet_weight_counts.json").read_text(encoding="utf-8")
)
"""nnU-Net's own networks for its own plans (scripts/make_nnunet_goldens.py)."""


def build(spatial_dims: int = 3, in_channels: int = 1, num_classes: int = 3, **settings: Any) -> nn.Module:
    return MODELS.build(
        {"name": "residual_encoder_unet", **settings},
        in_channels=in_channels,
        num_classes=num_classes,
        spatial_dims=spatial_dims,
    )


@pytest.mark.parametrize("golden", COUNTS, ids=lambda g: f"{len(g['plan']['patch_size'])}d-{g['channels']}")
def test_as_many_weights_as_nnunet_without_its_lowest_head(golden: dict[str, Any]) -> None:
    plan = golden["plan"]
    with torch.device("meta"):
        model = build(
            len(plan["patch_size"]), golden["channels"], golden["classes"],
            widths=plan["widths"], kernels=plan["kernels"], strides=plan["strides"],
        )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == golden["weights"] - golden["weights_of_lowest_head"]
    blocks = [sum(isinstance(m, ResidualBlock) for m in stage.modules()) for stage in model.encoder]
    assert blocks == plan["blocks"]


def test_a_stage_has_its_stride_in_the_first_block() -> None:
    model = build(widths=[4, 6, 6], num_blocks=[1, 2, 1], strides=[1, [1, 2, 2], 2])
    stem, block = model.encoder[0].block
    assert stem.convolution.in_channels == 1 and isinstance(block, ResidualBlock)
    assert len(block.shortcut) == 0
    first = model.encoder[1].down.block
    assert [c.stride for c in first.convolutions] == [(1, 2, 2), (1, 1, 1)]
    pool, projection = first.shortcut
    assert pool.stride == (1, 2, 2) and isinstance(pool.pool, nn.AvgPool3d)
    assert projection.convolution.kernel_size == (1, 1, 1) and projection.convolution.bias is None
    assert isinstance(projection.activation, nn.Identity)
    assert len(model.encoder[1].block) == 1
    assert len(model.encoder[2].down.block.shortcut) == 1  # as many channels: the mean alone
    assert len(model.encoder[2].block) == 0


def test_training_begins_with_every_block_as_its_shortcut() -> None:
    model = build(2, widths=[4, 8], num_blocks=[1, 2], normalisation="batch")
    block = model.encoder[1].down.block
    x = torch.randn(2, 4, 8, 10)
    torch.testing.assert_close(block(x), block.activation(block.shortcut(x)))
    with torch.no_grad():
        block.convolutions[-1].normalisation.weight.fill_(1.0)
    assert not torch.allclose(block(x), block.activation(block.shortcut(x)))


def test_a_residual_block_by_value() -> None:
    torch.manual_seed(0)
    block = build(2, widths=[2, 3], num_blocks=[1, 1], normalisation="none", activation="relu").encoder[1].down.block
    x = torch.randn(1, 2, 6, 8)
    first, second = (c.convolution for c in block.convolutions)
    expected = second(first(x).relu())
    expected = (expected + block.shortcut[1].convolution(nn.functional.avg_pool2d(x, 2))).relu()
    torch.testing.assert_close(block(x), expected)


def test_a_unet_can_go_down_by_residual_blocks() -> None:
    settings = {"name": "unet", "widths": [4, 6, 8], "down": "residual_block", "num_convolutions": 3}
    model = MODELS.build(settings, in_channels=1, num_classes=2, spatial_dims=2).eval()
    assert isinstance(model.encoder[1].down.block, ResidualBlock)
    assert len(model.encoder[1].block[0]) == 1
    assert model(torch.zeros(1, 1, 8, 12)).shape == (1, 2, 8, 12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_blocks": [1, 2]},
        {"widths": [4, 8, 8], "num_blocks": [1, 0, 1]},
        {"num_decoder_convolutions": 0},
        {"widths": [4]},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MedsegError) as refusal:
        build(2, **wrong)
    assert refusal.value.code == Code.CONFIG
