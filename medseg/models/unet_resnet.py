"""U-Net with a ResNet of torchvision as its encoder: `model=unet_resnet model.weights=imagenet`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medseg.errors import Code, MedsegError
from medseg.models.backbones import DEPTH_STRIDES, NUM_STEPS, ResNet, make_torchvision_backbone
from medseg.models.blocks.activation import Activation
from medseg.models.blocks.block import Block, Stack
from medseg.models.blocks.convolution import ConvolutionBlock, ConvolutionStyle
from medseg.models.blocks.head import SegmentationHead
from medseg.models.blocks.initialisation import initialise
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.resample import Up, make_up
from medseg.models.blocks.skip import Skip, make_skip
from medseg.models.contract import MODELS, SegmentationModel
from medseg.models.encoder_decoder import DecoderStage
from medseg.models.freezing import Freezable
from medseg.models.sizes import check_multiples
from medseg.models.stages import MAX_IN_A_ROW


@dataclass(frozen=True)
class UNetResNetConfig:
    """Settings of the U-Net with a ResNet encoder."""

    encoder: ResNet = "resnet18"
    """resnet18, resnet34, resnet50."""
    weights: str | None = None
    """Where training begins: imagenet (torchvision's weights, from its cache), a safetensors or .pth file, a run of
    medseg with the same ResNet (a classifier too), or its bundle; null: fresh weights. Nothing is downloaded."""
    frozen_stages: int = 0
    """How many of the encoder's five stages, from the image on, keep their weights and the statistics of their
    normalisations."""
    keep_statistics: bool = False
    """Whether all batch normalisations of the encoder keep the statistics that come with the weights, for batches of a
    few patches."""
    decoder_widths: tuple[int, int, int, int, int] = (256, 128, 64, 32, 16)
    """Filters of the decoder's stages, lowest resolution first; the last number also of the convolutions at the image's
    own resolution."""
    num_convolutions: int = 2
    """Convolutions per stage of the decoder, and at the image's own resolution."""
    normalisation: Normalisation = "instance"
    """What follows each convolution of the decoder: batch, instance, group, none. The encoder has batch normalisation,
    as its weights were trained."""
    num_groups: int = 8
    """Groups of the group normalisation."""
    activation: Activation = "relu"
    """What follows each normalisation of the decoder: relu, leaky_relu, elu, prelu, sigmoid, tanh, linear."""
    up: Up = "transposed"
    """Up-sampling: transposed, transposed_padded, interpolation, interpolation_convolution."""
    skip: Skip = "concat"
    """How what comes up is merged with what comes across: concat, add."""
    depth_strides: tuple[int, int, int, int, int] = DEPTH_STRIDES
    """In 3D, the factor along the depth at each of the five steps down: 2, or 1 for volumes of few slices."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_convolutions <= MAX_IN_A_ROW or self.num_groups < 1 or min(self.decoder_widths) < 1:
            raise MedsegError(
                Code.CONFIG,
                "model.num_convolutions, model.num_groups and model.decoder_widths are at least 1, num_convolutions at "
                f"most {MAX_IN_A_ROW}",
                where="model",
                got=(self.num_convolutions, self.num_groups, self.decoder_widths),
            )


@MODELS.register("unet_resnet", UNetResNetConfig)
class UNetResNet(Freezable, SegmentationModel):
    """The five stages of a ResNet, convolutions at the image's own resolution beside them, and a U-Net's decoder.

    A decoder stage is a step up, the skip, and convolutions. The skips come from the ResNet's stages at 1/16, 1/8, 1/4
    and 1/2 of the resolution, and from convolutions of the image itself, which a ResNet does not have. With
    `skip=add` a step up has as many filters as what comes across, as in LinkNet.

    Args:
        config: the settings.
        in_channels: channels of the images.
        num_classes: classes, with the background.
        spatial_dims: 2, or 3 by inflation (`medseg.models.backbones`).
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the settings do not fit each other.

    Source:
        Ronneberger, Fischer, Brox: U-Net, MICCAI 2015, for the decoder; He et al., Deep Residual Learning, CVPR 2016,
        for the encoder; Chaurasia and Culurciello, LinkNet, VCIP 2017, for such an encoder with skips that add. The
        widths of the decoder are those of segmentation_models.pytorch, which has no skip at the image's resolution.
    """

    def __init__(self, config: UNetResNetConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = spatial_dims
        style = ConvolutionStyle(
            spatial_dims,
            normalisation=config.normalisation,
            num_groups=config.num_groups,
            activation=config.activation,
        )

        def convolutions(channels: int, width: int) -> Stack:
            inputs = (channels, *(width,) * (config.num_convolutions - 1))
            return Stack((ConvolutionBlock(c, width, style) for c in inputs), channels)

        *widths, narrowest = config.decoder_widths
        self.stem = convolutions(in_channels, narrowest)
        decoder: list[DecoderStage] = []
        backbone = make_torchvision_backbone(
            config.encoder, in_channels=in_channels, spatial_dims=spatial_dims, depth_strides=config.depth_strides
        )
        across = (narrowest, *backbone.widths)
        channels = across[-1]
        for i, width in zip(reversed(range(NUM_STEPS)), (*widths, narrowest), strict=True):
            up: Block = make_up(
                config.up,
                channels,
                across[i] if config.skip == "add" else width,
                style.plain(),
                kernel=(3,) * spatial_dims,
                stride=backbone.strides[i],
            )
            skip = make_skip(config.skip, up.out_channels, across[i], stage=i)
            decoder.append(DecoderStage(up, skip, convolutions(skip.out_channels, width)))
            channels = width
        self.decoder = nn.ModuleList(decoder)
        self.heads = nn.ModuleList([SegmentationHead(narrowest, num_classes, spatial_dims)])
        initialise(self, config.activation)
        self.backbone = backbone  # after that: its weights are drawn as torchvision does
        backbone.keeps_statistics = config.keep_statistics
        if config.frozen_stages:
            self.freeze(config.frozen_stages)

    @property
    def stages(self) -> Sequence[tuple[str, nn.Module]]:
        """stage_0, stage_1, … of the ResNet, then what a segmenter adds."""
        stages = [(f"stage_{i}", stage) for i, stage in enumerate(self.backbone.stages)]
        return [*stages, ("stem", self.stem), ("decoder", self.decoder), ("heads", self.heads)]

    def forward(self, x: Tensor) -> Tensor:
        """Class scores; see `SegmentationModel.forward`."""
        if not torch.compiler.is_compiling():
            self.output_size(tuple(x.shape[2:]))
        across = [self.stem(x), *self.backbone(x)]
        x = across.pop()
        for stage in self.decoder:
            x = stage(x, across.pop())
        scores: Tensor = self.heads[0](x)
        return scores

    @property
    def divisor(self) -> tuple[int, ...]:
        """The product of the strides, per axis: 32 unless `depth_strides` says otherwise."""
        return self.backbone.factors[-1]

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the input; see `SegmentationModel.output_size`."""
        check_multiples(input_size, self.divisor, fewest_voxels=2)
        return tuple(input_size)
