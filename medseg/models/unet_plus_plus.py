"""U-Net++: a U-Net whose skips are themselves networks, nested and dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import Activation
from medseg.models.blocks.block import Block
from medseg.models.blocks.convolution import ConvolutionStyle, convolutions
from medseg.models.blocks.head import SegmentationHead
from medseg.models.blocks.initialisation import initialise
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.pool import DownBlock
from medseg.models.blocks.resample import Down, Up, make_up
from medseg.models.blocks.skip import make_skip
from medseg.models.contract import MODELS
from medseg.models.encoder_decoder import DecoderStage, EncoderDecoder, Parts
from medseg.models.stages import MAX_IN_A_ROW, check_stages, resolve_stages


@dataclass(frozen=True)
class UNetPlusPlusConfig:
    """Settings of U-Net++; the defaults are the paper's for images in 2D, but for the normalisation."""

    widths: tuple[int, ...] | None = None
    """Filters per stage, highest resolution first; null: from the plan, else 32, doubled up to 320 (3D) or 512 (2D)."""
    kernels: tuple[int | tuple[int, ...], ...] | None = None
    """Odd filter size per stage, one number or one per axis; null: from the plan, else 3."""
    strides: tuple[int | tuple[int, ...], ...] | None = None
    """Factor from the stage above, one number or one per axis, the first is 1; null: from the plan, else 1, 2, 2, …"""
    num_convolutions: int = 2
    """Convolutions per stage of the encoder and of the decoder."""
    normalisation: Normalisation = "batch"
    """What follows each convolution: batch, instance, group, none."""
    num_groups: int = 8
    """Groups of the group normalisation."""
    activation: Activation = "relu"
    """What follows each normalisation: relu, leaky_relu, elu, prelu, sigmoid, tanh, linear."""
    negative_slope: float = 0.01
    """Slope of the leaky ReLU below zero."""
    bias: bool = True
    """Whether convolutions add a learnt number."""
    down: Down = "max_pool"
    """Down-sampling: max_pool, average_pool, strided_convolution, residual_block (strided, of two convolutions)."""
    up: Up = "transposed"
    """Up-sampling: transposed, transposed_padded, interpolation, interpolation_convolution."""
    deep_supervision: bool = True
    """While training, return the scores of all nodes of the highest resolution; while predicting, their mean."""

    def __post_init__(self) -> None:
        check_stages(self.widths, self.kernels, self.strides)
        if not 1 <= self.num_convolutions <= MAX_IN_A_ROW or self.num_groups < 1:
            raise MedsegError(
                Code.CONFIG,
                f"model.num_convolutions and model.num_groups are at least 1, num_convolutions at most {MAX_IN_A_ROW}",
                where="model",
                got=(self.num_convolutions, self.num_groups),
            )


@MODELS.register("unet_plus_plus", UNetPlusPlusConfig)
class UNetPlusPlus(EncoderDecoder):
    """U-Net++ in 2D and 3D.

    Node X(i, j) stands at resolution i, 0 is the highest, and is the j-th of its row. X(i, 0) are the stages of the
    encoder; every other node gets all nodes before it in its row, concatenated, and X(i+1, j−1), one step up. The last
    node of each row is a stage of the decoder of a U-Net; the others are `nested`.

    With deep supervision each node X(0, j > 0) has a head: all of them learn, and the result is the mean of their
    scores (the paper's accurate mode; its fast mode, which leaves the last nodes out, is not built).

    What the paper leaves open or has otherwise: the losses of the heads are weighted ½, ¼, … from the last node on, as
    with deep supervision elsewhere in medseg, where the paper weighs them alike; there is a normalisation after each
    convolution (the paper has none: `model.normalisation=none`).

    Args:
        config: the settings.
        in_channels: channels of the images.
        num_classes: classes, with the background.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the settings do not fit each other.

    Source:
        Zhou, Siddiquee, Tajbakhsh, Liang: UNet++: A Nested U-Net Architecture for Medical Image Segmentation, DLMIA
        2018, arXiv:1807.10165, figure 1, equation 1, table 3 (9.04 million weights; a U-Net of these widths 7.76).
    """

    def __init__(self, config: UNetPlusPlusConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        style = ConvolutionStyle(
            spatial_dims,
            bias=config.bias,
            normalisation=config.normalisation,
            num_groups=config.num_groups,
            activation=config.activation,
            negative_slope=config.negative_slope,
        )
        stages = resolve_stages(config.widths, config.kernels, config.strides, spatial_dims)

        def encoder_block(down: DownBlock, i: int) -> Block:
            number = config.num_convolutions - down.num_convolutions
            return convolutions(number, down.out_channels, stages[i].width, style, kernel=stages[i].kernel)

        def decoder_block(channels: int, i: int) -> Block:
            return convolutions(config.num_convolutions, channels, stages[i].width, style, kernel=stages[i].kernel)

        last = len(stages) - 1

        def across(channels: int, i: int) -> int:
            return channels * (last - i)

        up_style = style.plain()
        parts = Parts(style, up_style, config.down, config.up, "concat", encoder_block, decoder_block, across=across)
        super().__init__(parts, stages, in_channels=in_channels, num_classes=num_classes, deep_supervision=False)
        self.deep_supervision = config.deep_supervision

        def node(i: int, j: int) -> DecoderStage:
            width, below = stages[i].width, stages[i + 1]
            up = make_up(config.up, below.width, width, up_style, kernel=below.kernel, stride=below.stride)
            skip = make_skip("concat", up.out_channels, width * j, stage=i)
            return DecoderStage(up, skip, decoder_block(skip.out_channels, i))

        self.nested = nn.ModuleList(nn.ModuleList(node(i, j) for j in range(1, last - i)) for i in range(last - 1))
        if self.deep_supervision:
            more = (SegmentationHead(stages[0].width, num_classes, spatial_dims) for _ in range(last - 1))
            self.heads.extend(more)
        initialise(self, style.activation, negative_slope=style.negative_slope)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Class scores; see `SegmentationModel.forward`."""
        rows = [[maps] for maps in self.encoded(x)]
        for j in range(1, len(rows) - 1):
            for i in range(len(rows) - 1 - j):
                node = cast(nn.ModuleList, self.nested[i])[j - 1]
                rows[i].append(node(rows[i + 1][j - 1], torch.cat(rows[i], dim=1)))
        branches = rows[0][:0:-1]
        bottom = rows.pop()[0]
        maps = self.decoded(bottom, [torch.cat(row, dim=1) for row in rows])
        if not self.deep_supervision:
            logits: Tensor = self.heads[0](maps[-1])
            return logits
        scores = [head(branch) for head, branch in zip(self.heads, (maps[-1], *branches), strict=True)]
        return scores if self.training else torch.stack(scores).mean(dim=0)
