"""FusionNet: a U-shaped network with residual blocks and additive skips."""

from __future__ import annotations

from dataclasses import dataclass

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import Activation
from medseg.models.blocks.block import Block, Stack
from medseg.models.blocks.convolution import ConvolutionBlock, ConvolutionStyle
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.pool import DownBlock
from medseg.models.blocks.resample import Down, Up
from medseg.models.blocks.residual import ResidualBlock
from medseg.models.blocks.skip import Skip
from medseg.models.contract import MODELS
from medseg.models.encoder_decoder import EncoderDecoder, Parts
from medseg.models.stages import Stage, check_stages, resolve_stages

NUM_RESIDUAL_CONVOLUTIONS = 3
"""Convolutions of a residual block, in the paper."""


@dataclass(frozen=True)
class FusionNetConfig:
    """Settings of FusionNet; the defaults are the paper's."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """Filters per stage, highest resolution first; the last is the bridge."""
    kernels: tuple[int | tuple[int, ...], ...] | None = None
    """Odd filter size per stage, one number or one per axis; null: from the plan, else 3."""
    strides: tuple[int | tuple[int, ...], ...] | None = None
    """Factor from the stage above, one number or one per axis, the first is 1; null: from the plan, else 1, 2, 2, …"""
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
    """Down-sampling: max_pool, average_pool, strided_convolution (one more convolution), residual_block (two more)."""
    up: Up = "transposed_padded"
    """Up-sampling: transposed, transposed_padded, interpolation, interpolation_convolution."""
    skip: Skip = "add"
    """How what comes up is merged with what comes across: add, concat, none (the bottleneck alone tells)."""
    deep_supervision: bool = False
    """While training, return the scores of the coarser decoder stages as well, the lowest excepted."""

    def __post_init__(self) -> None:
        check_stages(self.widths, self.kernels, self.strides)
        if self.num_groups < 1:
            raise MedsegError(Code.CONFIG, "at least one group", where="model.num_groups", got=self.num_groups)


@MODELS.register("fusionnet", FusionNetConfig)
class FusionNet(EncoderDecoder):
    """FusionNet in 2D and 3D.

    Each stage is convolution → residual block of three convolutions → convolution; max-pooling leads down, a
    transposed convolution up, and the maps that come across are added, not concatenated.

    What the paper leaves open, and the choice here: the filters of the transposed convolutions are 3 (with padding,
    so that the size doubles) like all others, with normalisation and activation; normalisation stands before
    activation; in a residual block the activation of the third convolution follows the sum, as in ResNet; the output
    layer has filters of size 1; weights are drawn as He et al. do. The paper's output is one map for a sigmoid; here
    it is one per class. In 3D each 2 and 3 becomes a third axis' too.

    Args:
        config: the settings.
        in_channels: channels of the images.
        num_classes: classes, with the background.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the settings do not fit each other.

    Source:
        Quan, Hildebrand, Jeong: FusionNet, arXiv:1612.05360 (2016); Frontiers in Computer Science 3 (2021), table 1.
    """

    def __init__(self, config: FusionNetConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
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
            return _stage_block(down.out_channels, stages[i], style)

        def decoder_block(channels: int, i: int) -> Block:
            return _stage_block(channels, stages[i], style)

        parts = Parts(style, style, config.down, config.up, config.skip, encoder_block, decoder_block)
        super().__init__(
            parts,
            stages,
            in_channels=in_channels,
            num_classes=num_classes,
            deep_supervision=config.deep_supervision,
        )


def _stage_block(in_channels: int, stage: Stage, style: ConvolutionStyle) -> Block:
    """Convolution → residual block → convolution."""
    blocks = (
        ConvolutionBlock(in_channels, stage.width, style, kernel=stage.kernel),
        ResidualBlock(stage.width, style, num_convolutions=NUM_RESIDUAL_CONVOLUTIONS, kernel=stage.kernel),
        ConvolutionBlock(stage.width, stage.width, style, kernel=stage.kernel),
    )
    return Stack(blocks, in_channels)
