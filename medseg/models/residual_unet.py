"""Residual U-Net: a U-Net of pre-activation residual blocks."""

from __future__ import annotations

from dataclasses import dataclass

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import Activation
from medseg.models.blocks.block import Block
from medseg.models.blocks.convolution import ConvolutionStyle
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.pool import DownBlock, NoDown
from medseg.models.blocks.resample import Up
from medseg.models.blocks.residual import PreActivationResidualBlock
from medseg.models.contract import MODELS
from medseg.models.encoder_decoder import EncoderDecoder, Parts
from medseg.models.stages import MAX_IN_A_ROW, check_stages, resolve_stages


@dataclass(frozen=True)
class ResidualUNetConfig:
    """Settings of the residual U-Net; the paper's with widths 64, 128, 256, 512."""

    widths: tuple[int, ...] | None = None
    """Filters per stage, highest resolution first; null: from the plan, else 32, doubled up to 320 (3D) or 512 (2D)."""
    kernels: tuple[int | tuple[int, ...], ...] | None = None
    """Odd filter size per stage, one number or one per axis; null: from the plan, else 3."""
    strides: tuple[int | tuple[int, ...], ...] | None = None
    """Factor from the stage above, one number or one per axis, the first is 1; null: from the plan, else 1, 2, 2, …"""
    num_convolutions: int = 2
    """Convolutions of each residual block; a stage is one block."""
    normalisation: Normalisation = "batch"
    """What precedes each convolution: batch, instance, group, none."""
    num_groups: int = 8
    """Groups of the group normalisation."""
    activation: Activation = "relu"
    """What follows each normalisation: relu, leaky_relu, elu, prelu, sigmoid, tanh, linear."""
    negative_slope: float = 0.01
    """Slope of the leaky ReLU below zero."""
    bias: bool = True
    """Whether convolutions add a learnt number."""
    up: Up = "interpolation"
    """Up-sampling: transposed, transposed_padded, interpolation, interpolation_convolution."""
    deep_supervision: bool = False
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


@MODELS.register("residual_unet", ResidualUNetConfig)
class ResidualUNet(EncoderDecoder):
    """Residual U-Net (ResUNet) in 2D and 3D.

    Each stage is one residual block in which normalisation and activation precede the convolutions; the first
    convolution of an encoder stage has the stride. Interpolation leads up, skips concatenate. The first convolution of
    the network has neither normalisation nor activation before it.

    What the paper leaves open, and the choice here: the shortcut of a block that changes size or channels is the mean
    of windows and a convolution with filters of size 1 (ResNet-D); its own 7.8 million weights are those of all other
    convolutions. Interpolation is linear. The paper's output is one map for a sigmoid; here it is one per class.
    `residual_encoder_unet` is another network: nnU-Net's of 2024.

    Args:
        config: the settings.
        in_channels: channels of the images.
        num_classes: classes, with the background.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the settings do not fit each other.

    Source:
        Zhang, Liu, Wang: Road Extraction by Deep Residual U-Net, IEEE Geoscience and Remote Sensing Letters 2018,
        arXiv:1711.10684, figure 2 and table I.
    """

    def __init__(self, config: ResidualUNetConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        style = ConvolutionStyle(
            spatial_dims,
            bias=config.bias,
            normalisation=config.normalisation,
            num_groups=config.num_groups,
            activation=config.activation,
            negative_slope=config.negative_slope,
        )
        stages = resolve_stages(config.widths, config.kernels, config.strides, spatial_dims)

        def down(channels: int, i: int) -> DownBlock:
            return NoDown(channels)  # the block has the stride

        def encoder_block(down: DownBlock, i: int) -> Block:
            stage = stages[i]
            return PreActivationResidualBlock(
                stage.width,
                style,
                in_channels=down.out_channels,
                num_convolutions=config.num_convolutions,
                kernel=stage.kernel,
                stride=stage.stride,
                is_first=i == 0,
            )

        def decoder_block(channels: int, i: int) -> Block:
            stage, number = stages[i], config.num_convolutions
            return PreActivationResidualBlock(
                stage.width, style, in_channels=channels, num_convolutions=number, kernel=stage.kernel
            )

        parts = Parts(style, style.plain(), down, config.up, "concat", encoder_block, decoder_block)
        super().__init__(
            parts,
            stages,
            in_channels=in_channels,
            num_classes=num_classes,
            deep_supervision=config.deep_supervision,
        )
