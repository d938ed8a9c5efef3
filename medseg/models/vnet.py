"""V-Net: residual stages of large filters, down by strided convolutions."""

from __future__ import annotations

from dataclasses import dataclass

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import Activation
from medseg.models.blocks.block import Block
from medseg.models.blocks.convolution import ConvolutionStyle
from medseg.models.blocks.dimensions import per_axis
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.pool import DownBlock, NoDown
from medseg.models.blocks.resample import PatchConvolution
from medseg.models.blocks.residual import ResidualBlock
from medseg.models.contract import MODELS
from medseg.models.encoder_decoder import EncoderDecoder, Parts
from medseg.models.stages import check_stages, per_stage, resolve_stages

CONVOLUTIONS = (1, 2, 3)
"""Convolutions of the first stages where nothing says otherwise; further stages have as many as the last."""


@dataclass(frozen=True)
class VNetConfig:
    """Settings of V-Net; filters, their sizes and numbers are the paper's where the first stage has 16 of them."""

    widths: tuple[int, ...] | None = None
    """Filters per stage, highest resolution first; null: from the plan, else 32, doubled up to 320 (3D) or 512 (2D)."""
    kernel: int | tuple[int, ...] = 5
    """Odd filter size of all stages, one number or one per axis; the plan has no say in it."""
    strides: tuple[int | tuple[int, ...], ...] | None = None
    """Factor from the stage above, one number or one per axis, the first is 1; null: from the plan, else 1, 2, 2, …"""
    num_convolutions: tuple[int, ...] | None = None
    """Convolutions per stage, in the encoder and in the decoder; null: 1, 2, 3, 3, …"""
    normalisation: Normalisation = "batch"
    """What follows each convolution: batch, instance, group, none."""
    num_groups: int = 8
    """Groups of the group normalisation."""
    activation: Activation = "prelu"
    """What follows each normalisation: relu, leaky_relu, elu, prelu, sigmoid, tanh, linear."""
    negative_slope: float = 0.01
    """Slope of the leaky ReLU below zero."""
    bias: bool = True
    """Whether convolutions add a learnt number."""
    deep_supervision: bool = False
    """While training, return the scores of the coarser decoder stages as well, the lowest excepted."""

    def __post_init__(self) -> None:
        check_stages(self.widths, None, self.strides)
        if self.num_groups < 1:
            raise MedsegError(Code.CONFIG, "at least one group", where="model.num_groups", got=self.num_groups)


@MODELS.register("vnet", VNetConfig)
class VNet(EncoderDecoder):
    """V-Net in 2D and 3D.

    Each stage is a residual block: what enters it is added to the answer of its last convolution. Convolutions whose
    filters have the size of their stride lead down (2³ with stride 2), transposed ones up, each followed by PReLU as
    all others; skips concatenate, and a stage of the decoder works on all the channels that this makes: twice those
    of the encoder's.

    What the paper leaves open, and the choice here: the sum is followed by the activation of the last convolution. The
    paper adds the one channel of its image to each of the 16 maps of the first stage; here a convolution with filters
    of size 1 takes the channels of the image to the filters, so that there may be several. The paper has no
    normalisation; here is one after each convolution, as in the implementations that followed
    (`model.normalisation=none` takes it away). Its Dice loss is a choice of `loss`, for any network.

    Args:
        config: the settings.
        in_channels: channels of the images.
        num_classes: classes, with the background.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the settings do not fit each other.

    Source:
        Milletari, Navab, Ahmadi: V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation,
        3DV 2016, arXiv:1606.04797, figure 2 and table 1.
    """

    def __init__(self, config: VNetConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        style = ConvolutionStyle(
            spatial_dims,
            bias=config.bias,
            normalisation=config.normalisation,
            num_groups=config.num_groups,
            activation=config.activation,
            negative_slope=config.negative_slope,
        )
        stages = resolve_stages(config.widths, None, config.strides, spatial_dims)
        kernel = per_axis(config.kernel, spatial_dims, where="model.kernel")
        numbers = per_stage(config.num_convolutions, CONVOLUTIONS, len(stages), where="model.num_convolutions")

        def down(channels: int, i: int) -> DownBlock:
            return PatchConvolution(channels, stages[i].width, style, stride=stages[i].stride)

        def encoder_block(down: DownBlock, i: int) -> Block:
            before = down.out_channels if isinstance(down, NoDown) else stages[i].width
            return ResidualBlock(stages[i].width, style, in_channels=before, num_convolutions=numbers[i], kernel=kernel)

        def decoder_block(channels: int, i: int) -> Block:
            return ResidualBlock(channels, style, num_convolutions=numbers[i], kernel=kernel)

        parts = Parts(style, style, down, "transposed", "concat", encoder_block, decoder_block)
        super().__init__(
            parts,
            stages,
            in_channels=in_channels,
            num_classes=num_classes,
            deep_supervision=config.deep_supervision,
        )
