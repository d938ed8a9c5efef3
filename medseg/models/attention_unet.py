"""Attention U-Net: a U-Net whose skips are weighted by gates."""

from __future__ import annotations

from dataclasses import dataclass

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import Activation
from medseg.models.blocks.block import Block
from medseg.models.blocks.convolution import ConvolutionStyle, convolutions
from medseg.models.blocks.gate import AttentionGate, Gate, NoGate
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.pool import DownBlock
from medseg.models.blocks.resample import Down, Up
from medseg.models.contract import MODELS
from medseg.models.encoder_decoder import EncoderDecoder, Parts
from medseg.models.stages import MAX_IN_A_ROW, check_stages, resolve_stages


@dataclass(frozen=True)
class AttentionUNetConfig:
    """Settings of the attention U-Net; the paper's where the first stage has 16 filters."""

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
    up: Up = "interpolation"
    """Up-sampling: transposed, transposed_padded, interpolation, interpolation_convolution."""
    deep_supervision: bool = True
    """While training, return the scores of the coarser decoder stages as well, the lowest excepted."""

    def __post_init__(self) -> None:
        check_stages(self.widths, self.kernels, self.strides)
        if not 1 <= self.num_convolutions <= MAX_IN_A_ROW or self.num_groups < 1:
            raise MedsegError(
                Code.CONFIG,
                f"model.num_convolutions and model.num_groups are at least 1, num_convolutions at most {MAX_IN_A_ROW}",
                where="model",
                got=(self.num_convolutions, self.num_groups),
            )


@MODELS.register("attention_unet", AttentionUNetConfig)
class AttentionUNet(EncoderDecoder):
    """Attention U-Net in 2D and 3D.

    A U-Net with max-pooling and interpolation, in which the maps that come across are multiplied, voxel by voxel, with
    weights between 0 and 1 that are computed of them and of the stage below. The highest resolution has no gate, as in
    the paper: its maps do not represent the image "in a high dimensional space".

    What the paper leaves open, and the choice here: a gate has as many maps in its middle as come across. Deep
    supervision scores the coarser stages at their own resolution; the paper's code enlarges those scores and mixes
    them into the result.

    Args:
        config: the settings.
        in_channels: channels of the images.
        num_classes: classes, with the background.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the settings do not fit each other.

    Source:
        Oktay et al.: Attention U-Net: Learning Where to Look for the Pancreas, MIDL 2018, arXiv:1804.03999, figures 1
        and 2, section 3.
    """

    def __init__(self, config: AttentionUNetConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
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

        def gate(channels_below: int, channels_across: int, i: int) -> Gate:
            return AttentionGate(channels_across, channels_below, stages[i + 1].stride) if i else NoGate()

        parts = Parts(style, style.plain(), config.down, config.up, "concat", encoder_block, decoder_block, gate)
        super().__init__(
            parts,
            stages,
            in_channels=in_channels,
            num_classes=num_classes,
            deep_supervision=config.deep_supervision,
        )
