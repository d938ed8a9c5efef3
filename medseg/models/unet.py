"""U-Net: as published in 2015, and as the nnU-Net family builds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import Activation
from medseg.models.blocks.block import Block, Stack
from medseg.models.blocks.convolution import ConvolutionStyle, convolutions
from medseg.models.blocks.dropout import Dropout
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.pool import DownBlock
from medseg.models.blocks.resample import Down, Up
from medseg.models.blocks.skip import Skip
from medseg.models.contract import MODELS
from medseg.models.encoder_decoder import EncoderDecoder, Parts
from medseg.models.stages import MAX_IN_A_ROW, check_stages, resolve_stages


@dataclass(frozen=True)
class UNetConfig:
    """Settings of the U-Net; the defaults are nnU-Net's."""

    widths: tuple[int, ...] | None = None
    """Filters per stage, highest resolution first; null: from the plan, else 32, doubled up to 320 (3D) or 512 (2D)."""
    kernels: tuple[int | tuple[int, ...], ...] | None = None
    """Odd filter size per stage, one number or one per axis; null: from the plan, else 3."""
    strides: tuple[int | tuple[int, ...], ...] | None = None
    """Factor from the stage above, one number or one per axis, the first is 1; null: from the plan, else 1, 2, 2, …"""
    num_convolutions: int = 2
    """Convolutions per stage of the encoder and of the decoder; a strided convolution counts as the first."""
    padding: Literal["same", "valid"] = "same"
    """same: the result has the size of the input; valid: no padding, it is smaller and skips are cropped."""
    normalisation: Normalisation = "instance"
    """What follows each convolution: batch, instance, group, none."""
    num_groups: int = 8
    """Groups of the group normalisation."""
    activation: Activation = "leaky_relu"
    """What follows each normalisation: relu, leaky_relu, elu, prelu, sigmoid, tanh, linear."""
    negative_slope: float = 0.01
    """Slope of the leaky ReLU below zero."""
    bias: bool = True
    """Whether convolutions add a learnt number."""
    down: Down = "strided_convolution"
    """Down-sampling: max_pool, average_pool, strided_convolution, residual_block (strided, of two convolutions)."""
    up: Up = "transposed"
    """Up-sampling: transposed, transposed_padded, interpolation, interpolation_convolution."""
    skip: Skip = "concat"
    """How what comes up is merged with what comes across: concat, add, none (the bottleneck alone tells)."""
    dropout: float | tuple[float, ...] = 0.0
    """Probability of dropping a number at the end of an encoder stage: for all stages, or one per stage."""
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
        probabilities = self.dropout if isinstance(self.dropout, tuple) else (self.dropout,)
        if not all(0 <= p < 1 for p in probabilities):
            raise MedsegError(
                Code.CONFIG, "not a probability", where="model.dropout", expected="0 <= p < 1", got=self.dropout
            )
        if self.padding == "valid" and self.deep_supervision:
            raise MedsegError(
                Code.CONFIG,
                "without padding the coarser maps of deep supervision cover other regions than the result",
                where="model.deep_supervision",
                expected="false with padding valid",
                got=True,
            )


@MODELS.register("unet", UNetConfig)
class UNet(EncoderDecoder):
    """U-Net in 2D and 3D.

    An encoder stage is a step down and convolutions; a decoder stage is a step up to the filters of its resolution,
    the skip, and convolutions. With `configs/model/unet_2015.yaml` it is the published network, with the defaults the
    plain U-Net of nnU-Net. Steps up have neither normalisation nor activation of their own.

    Args:
        config: the settings.
        in_channels: channels of the images.
        num_classes: classes, with the background.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the settings do not fit each other.

    Source:
        Ronneberger, Fischer, Brox: U-Net, MICCAI 2015, arXiv:1505.04597, figure 1 and section 3 (drop-out at the end
        of the contracting path, weights of standard deviation √(2/N)). The paper gives no place and probability of
        the drop-out; 0.5 after the last two stages is what its published model does.
        Isensee et al.: nnU-Net, Nature Methods 2021: two convolutions per stage with instance normalisation and leaky
        ReLU 0.01, strided convolutions, transposed convolutions, deep supervision.
    """

    def __init__(self, config: UNetConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        style = ConvolutionStyle(
            spatial_dims,
            padding=config.padding,
            bias=config.bias,
            normalisation=config.normalisation,
            num_groups=config.num_groups,
            activation=config.activation,
            negative_slope=config.negative_slope,
        )
        stages = resolve_stages(config.widths, config.kernels, config.strides, spatial_dims)
        dropout = _dropout_per_stage(config.dropout, len(stages))

        def encoder_block(down: DownBlock, i: int) -> Block:
            num_convolutions = config.num_convolutions - down.num_convolutions
            row = convolutions(num_convolutions, down.out_channels, stages[i].width, style, kernel=stages[i].kernel)
            return Stack((row, Dropout(row.out_channels, dropout[i])), row.out_channels)

        def decoder_block(channels: int, i: int) -> Block:
            return convolutions(config.num_convolutions, channels, stages[i].width, style, kernel=stages[i].kernel)

        parts = Parts(style, style.plain(), config.down, config.up, config.skip, encoder_block, decoder_block)
        super().__init__(
            parts,
            stages,
            in_channels=in_channels,
            num_classes=num_classes,
            deep_supervision=config.deep_supervision,
        )


def _dropout_per_stage(dropout: float | tuple[float, ...], num_stages: int) -> tuple[float, ...]:
    """One probability for each stage.

    Raises:
        MedsegError: E_CONFIG if a list has another length.
    """
    if not isinstance(dropout, tuple):
        return (dropout,) * num_stages
    if len(dropout) != num_stages:
        raise MedsegError(
            Code.CONFIG,
            "dropout needs one probability per stage",
            where="model.dropout",
            expected=f"{num_stages} numbers, or one for all",
            got=dropout,
        )
    return dropout
