"""SegNet: max-pooling that remembers places, and a decoder that puts values back there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import Activation
from medseg.models.blocks.block import Block, Stack
from medseg.models.blocks.convolution import ConvolutionStyle, convolutions
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.pool import DownBlock, IndexedPool, Unpool
from medseg.models.contract import MODELS
from medseg.models.encoder_decoder import DecoderStage, EncoderDecoder, EncoderStage, Parts
from medseg.models.stages import check_stages, per_stage, resolve_stages

CONVOLUTIONS = (2, 2, 3)
"""Convolutions of the first stages where nothing says otherwise; further stages have as many as the last (VGG-16)."""


@dataclass(frozen=True)
class SegNetConfig:
    """Settings of SegNet; the paper's with widths 64, 128, 256, 512, 512, 512."""

    widths: tuple[int, ...] | None = None
    """Filters per stage, highest resolution first, where the lowest only holds pooled maps, and has those of the stage
    above; null: from the plan, else 32, doubled up to 320 (3D) or 512 (2D)."""
    kernels: tuple[int | tuple[int, ...], ...] | None = None
    """Odd filter size per stage, one number or one per axis; null: from the plan, else 3."""
    strides: tuple[int | tuple[int, ...], ...] | None = None
    """Factor from the stage above, one number or one per axis, the first is 1; null: from the plan, else 1, 2, 2, …"""
    num_convolutions: tuple[int, ...] | None = None
    """Convolutions of all stages but the lowest, in the encoder and in the decoder; null: 2, 2, 3, 3, …"""
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

    def __post_init__(self) -> None:
        check_stages(self.widths, self.kernels, self.strides)
        if self.num_groups < 1:
            raise MedsegError(Code.CONFIG, "at least one group", where="model.num_groups", got=self.num_groups)


@MODELS.register("segnet", SegNetConfig)
class SegNet(EncoderDecoder):
    """SegNet in 2D and 3D.

    The encoder is that of VGG-16: convolutions and max-pooling, after each of its stages. No maps come across: the
    decoder gets the places where the largest values stood, puts the maps that come up back there, and convolutions
    fill the voxels between. The last convolution of a decoder stage has the filters of the stage above.

    In medseg's terms the maps after the last pooling are a stage of their own, the lowest, without convolutions: the
    paper's five pairs of encoder and decoder are six stages here. The paper's last convolution, from the 64 maps to
    the classes, has filters of size 3; here it is a head of size 1, as that of all networks. There is no deep
    supervision, and no weights of ImageNet.

    Args:
        config: the settings.
        in_channels: channels of the images.
        num_classes: classes, with the background.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the settings do not fit each other.

    Source:
        Badrinarayanan, Kendall, Cipolla: SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
        Segmentation, TPAMI 2017, arXiv:1511.00561, figures 2 and 3.
    """

    def __init__(self, config: SegNetConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        style = ConvolutionStyle(
            spatial_dims,
            bias=config.bias,
            normalisation=config.normalisation,
            num_groups=config.num_groups,
            activation=config.activation,
            negative_slope=config.negative_slope,
        )
        stages = resolve_stages(config.widths, config.kernels, config.strides, spatial_dims)
        last = len(stages) - 1
        numbers = per_stage(config.num_convolutions, CONVOLUTIONS, last, where="model.num_convolutions")

        def down(channels: int, i: int) -> DownBlock:
            return IndexedPool(channels, stages[i].stride)

        def up(channels: int, i: int) -> Block:
            return Unpool(channels, stages[i + 1].stride)

        def encoder_block(down: DownBlock, i: int) -> Block:
            if i == last:
                return Stack((), down.out_channels)
            return convolutions(numbers[i], down.out_channels, stages[i].width, style, kernel=stages[i].kernel)

        def decoder_block(channels: int, i: int) -> Block:
            kernel = stages[i].kernel
            same = convolutions(numbers[i] - 1, channels, channels, style, kernel=kernel)
            if i == 0:  # the head is the last convolution
                return same
            return Stack((same, convolutions(1, channels, stages[i - 1].width, style, kernel=kernel)), channels)

        parts = Parts(style, style.plain(), down, up, "none", encoder_block, decoder_block)
        super().__init__(
            parts,
            stages,
            in_channels=in_channels,
            num_classes=num_classes,
            deep_supervision=False,
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Class scores; see `SegmentationModel.forward`."""
        if not torch.compiler.is_compiling():
            self.output_size(tuple(x.shape[2:]))
        places = []
        for stage in cast(Iterable[EncoderStage], self.encoder):
            if isinstance(stage.down, IndexedPool):
                x, where = stage.down(x)
                places.append(where)
            x = stage.block(x)
        for step in cast(Iterable[DecoderStage], self.decoder):
            x = step.block(step.up(x, places.pop()))
        logits: Tensor = self.heads[0](x)
        return logits
