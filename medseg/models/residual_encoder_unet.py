"""Residual-encoder U-Net: nnU-Net's network of 2024."""

from __future__ import annotations

from dataclasses import dataclass

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import Activation
from medseg.models.blocks.block import Block, Stack
from medseg.models.blocks.convolution import ConvolutionBlock, ConvolutionStyle
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.pool import DownBlock, NoDown
from medseg.models.blocks.residual import ResidualBlock
from medseg.models.contract import MODELS
from medseg.models.encoder_decoder import EncoderDecoder, Parts
from medseg.models.stages import MAX_IN_A_ROW, check_stages, per_stage, resolve_stages

BLOCKS = (1, 3, 4, 6)
"""Residual blocks of the first stages where nothing says otherwise; further stages have as many as the last."""


@dataclass(frozen=True)
class ResidualEncoderUNetConfig:
    """Settings of the residual-encoder U-Net; the defaults are nnU-Net's."""

    widths: tuple[int, ...] | None = None
    """Filters per stage, highest resolution first; null: from the plan, else 32, doubled up to 320 (3D) or 512 (2D)."""
    kernels: tuple[int | tuple[int, ...], ...] | None = None
    """Odd filter size per stage, one number or one per axis; null: from the plan, else 3."""
    strides: tuple[int | tuple[int, ...], ...] | None = None
    """Factor from the stage above, one number or one per axis, the first is 1; null: from the plan, else 1, 2, 2, …"""
    num_blocks: tuple[int, ...] | None = None
    """Residual blocks per stage of the encoder, at least 1; null: 1, 3, 4, 6, 6, …"""
    num_decoder_convolutions: int = 1
    """Convolutions per stage of the decoder."""
    normalisation: Normalisation = "instance"
    """What follows each convolution: batch, instance, group, none."""
    num_groups: int = 8
    """Groups of the group normalisation."""
    activation: Activation = "leaky_relu"
    """What follows each normalisation: relu, leaky_relu, elu, prelu, sigmoid, tanh, linear."""
    negative_slope: float = 0.01
    """Slope of the leaky ReLU below zero."""
    bias: bool = True
    """Whether convolutions add a learnt number; the projections of the shortcuts never do."""
    deep_supervision: bool = True
    """While training, return the scores of the coarser decoder stages as well, the lowest excepted."""

    def __post_init__(self) -> None:
        check_stages(self.widths, self.kernels, self.strides)
        in_a_row = (self.num_decoder_convolutions, *(self.num_blocks or ()))
        if min((self.num_groups, *in_a_row)) < 1 or max(in_a_row) > MAX_IN_A_ROW:
            raise MedsegError(
                Code.CONFIG,
                "model.num_blocks, model.num_decoder_convolutions and model.num_groups are at least 1, the first two "
                f"at most {MAX_IN_A_ROW}",
                where="model",
                got=(self.num_blocks, self.num_decoder_convolutions, self.num_groups),
            )


@MODELS.register("residual_encoder_unet", ResidualEncoderUNetConfig)
class ResidualEncoderUNet(EncoderDecoder):
    """U-Net with a deep encoder of residual blocks and a shallow decoder, in 2D and 3D.

    The first stage is a convolution (the stem) and residual blocks; each further one is residual blocks of which the
    first has the stride. A decoder stage is a transposed convolution without normalisation and activation, the
    concatenation with what comes across, and convolutions. At the beginning of training each residual block is its
    shortcut.

    Args:
        config: the settings.
        in_channels: channels of the images.
        num_classes: classes, with the background.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the settings do not fit each other.

    Source:
        Isensee et al., nnU-Net Revisited: A Call for Rigorous Validation in 3D Medical Image Segmentation, MICCAI
        2024, arXiv:2404.09556, section 2; their ResidualEncoderUNet. It has one more head, at the lowest resolution
        of the decoder, whose loss has no weight.
    """

    def __init__(
        self, config: ResidualEncoderUNetConfig, *, in_channels: int, num_classes: int, spatial_dims: int
    ) -> None:
        style = ConvolutionStyle(
            spatial_dims,
            bias=config.bias,
            normalisation=config.normalisation,
            num_groups=config.num_groups,
            activation=config.activation,
            negative_slope=config.negative_slope,
        )
        stages = resolve_stages(config.widths, config.kernels, config.strides, spatial_dims)
        num_blocks = per_stage(config.num_blocks, BLOCKS, len(stages), where="model.num_blocks")

        def encoder_block(down: DownBlock, i: int) -> Block:
            stage = stages[i]
            blocks: list[Block] = []
            remaining = num_blocks[i]
            if isinstance(down, NoDown):
                blocks.append(ConvolutionBlock(down.out_channels, stage.width, style, kernel=stage.kernel))
            else:
                remaining -= 1
            blocks += [ResidualBlock(stage.width, style, kernel=stage.kernel) for _ in range(remaining)]
            return Stack(blocks, down.out_channels)

        def decoder_block(channels: int, i: int) -> Block:
            stage = stages[i]
            widths = [channels] + [stage.width] * (config.num_decoder_convolutions - 1)
            return Stack((ConvolutionBlock(c, stage.width, style, kernel=stage.kernel) for c in widths), channels)

        parts = Parts(style, style.plain(), "residual_block", "transposed", "concat", encoder_block, decoder_block)
        super().__init__(
            parts,
            stages,
            in_channels=in_channels,
            num_classes=num_classes,
            deep_supervision=config.deep_supervision,
        )
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.start_as_shortcut()
