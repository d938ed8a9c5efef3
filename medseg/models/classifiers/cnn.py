"""A small convolutional network: convolution → ReLU → pooling → … → fully connected → scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medseg.errors import Code, MedsegError
from medseg.models.backbones import Backbone
from medseg.models.blocks.activation import Activation
from medseg.models.blocks.block import Block, Stack
from medseg.models.blocks.convolution import ConvolutionBlock, ConvolutionStyle
from medseg.models.blocks.dimensions import PerAxis, per_axis
from medseg.models.blocks.initialisation import initialise
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.pool import Pool
from medseg.models.classifiers.backbone_classifier import BackboneClassifier
from medseg.models.classifiers.contract import CLASSIFIERS
from medseg.models.classifiers.head import ClassificationHead
from medseg.models.stages import MAX_IN_A_ROW


@dataclass(frozen=True)
class CNNConfig:
    """Settings of the small convolutional network."""

    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Filters per stage; each stage ends with pooling that halves the image."""
    num_convolutions: int = 2
    """Convolutions per stage."""
    kernel: int = 3
    """Filter size, odd."""
    normalisation: Normalisation = "batch"
    """What follows each convolution: batch, instance, group, none."""
    num_groups: int = 8
    """Groups of the group normalisation."""
    activation: Activation = "relu"
    """What follows each normalisation: relu, leaky_relu, elu, prelu, sigmoid, tanh, linear."""
    pool: Literal["max_pool", "average_pool"] = "max_pool"
    """What a stage ends with."""
    head: Literal["average", "flatten"] = "average"
    """average: the mean of each map, then scores, for images of any size; flatten: fully connected layers over all
    places, for images of one size (model=fcn makes convolutions of them)."""
    hidden: tuple[int, ...] = (128,)
    """Fully connected layers before the scores, with head=flatten."""
    dropout: float = 0.5
    """Probability of dropping a number between the fully connected layers, or before the scores."""
    image_size: int | tuple[int, ...] | None = None
    """Voxels along each axis, one number or one per axis, which head=flatten needs; null: those of the images."""
    weights: str | None = None
    """Where training begins: a run of medseg with the same convolutions, its bundle, or a file of its weights; null:
    fresh weights."""
    frozen_stages: int = 0
    """How many stages, from the image on, keep their weights and the statistics of their normalisations."""

    def __post_init__(self) -> None:
        counts = (*self.widths, *self.hidden, self.num_convolutions, self.num_groups)
        if not self.widths or min(counts) < 1 or self.num_convolutions > MAX_IN_A_ROW or self.kernel % 2 == 0:
            raise MedsegError(
                Code.CONFIG,
                "model.widths, model.hidden, model.num_convolutions and model.num_groups are at least 1, there are at "
                f"most {MAX_IN_A_ROW} convolutions per stage, and model.kernel is odd",
                where="model",
                got=(self.widths, self.hidden, self.num_convolutions, self.num_groups, self.kernel),
            )
        if not 0 <= self.dropout < 1:
            raise MedsegError(
                Code.CONFIG, "not a probability", where="model.dropout", expected="0 <= p < 1", got=self.dropout
            )


@CLASSIFIERS.register("cnn", CNNConfig)
class CNN(BackboneClassifier):
    """Stages of convolutions and pooling, then a head, in 2D and 3D.

    Convolutions are padded; pooling windows do not overlap, and a last row that fills none is left out.

    Args:
        config: the settings.
        in_channels: channels of the images.
        num_classes: classes; each image has one.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG if fully connected layers over places do not know the size of the images; E_MODEL if it
            is too small for the poolings.

    Source:
        LeCun et al., Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 1998, for the shape;
        Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015, for rows of 3×3 convolutions with ReLU,
        2×2 max pooling and dropout 0.5 between fully connected layers.
    """

    def __init__(self, config: CNNConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        style = ConvolutionStyle(
            spatial_dims,
            normalisation=config.normalisation,
            num_groups=config.num_groups,
            activation=config.activation,
        )
        stride = (2,) * spatial_dims
        stages = []
        for channels, width in zip((in_channels, *config.widths), config.widths, strict=False):
            widths = (channels, *(width,) * (config.num_convolutions - 1))
            blocks: list[Block] = [ConvolutionBlock(c, width, style, kernel=config.kernel) for c in widths]
            stages.append(Stack([*blocks, Pool(config.pool, width, stride)], channels))
        backbone = Backbone(stages, config.widths, [stride] * len(stages))
        initialise(backbone, config.activation)
        is_flat = config.head == "flatten"
        head = ClassificationHead(
            config.widths[-1],
            num_classes,
            window=map_size(config.image_size, backbone.factors[-1]) if is_flat else None,
            hidden=config.hidden if is_flat else (),
            dropout=config.dropout,
        )
        super().__init__(
            backbone,
            head,
            in_channels=in_channels,
            num_classes=num_classes,
            spatial_dims=spatial_dims,
            frozen_stages=config.frozen_stages,
        )


def map_size(image_size: PerAxis | None, factors: tuple[int, ...]) -> tuple[int, ...]:
    """Size of the last map.

    Args:
        image_size: of the images.
        factors: voxels of the image to one of the map, per axis.
    Raises:
        MedsegError: E_CONFIG if the size is not stated; E_MODEL if nothing is left of the image.
    """
    if image_size is None:
        raise MedsegError(
            Code.CONFIG,
            "fully connected layers over places need to know the size of the images",
            where="model.image_size",
            expected="a number, or one per axis",
            remedy="state it, or take model.head=average",
        )
    size = per_axis(image_size, len(factors), where="model.image_size")
    window = tuple(n // f for n, f in zip(size, factors, strict=True))
    if min(window) < 1:
        raise MedsegError(
            Code.MODEL,
            "the poolings leave nothing of the images",
            where="model.image_size",
            expected=f"at least {factors}",
            got=size,
            remedy="take fewer stages (model.widths) or larger images",
        )
    return window
