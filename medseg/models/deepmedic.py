"""DeepMedic: two pathways, one of them on a coarser grid with a wider view, and dense training on image segments."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import Activation
from medseg.models.blocks.block import Stack
from medseg.models.blocks.convolution import ConvolutionBlock, ConvolutionStyle
from medseg.models.blocks.dropout import Dropout
from medseg.models.blocks.head import SegmentationHead
from medseg.models.blocks.initialisation import initialise
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.resample import Repetition
from medseg.models.blocks.skip import centre_crop
from medseg.models.contract import MODELS, SegmentationModel
from medseg.models.stages import MAX_IN_A_ROW

KERNEL = 3
"""F of all convolutions of the pathways."""
FIRST_RESIDUAL = 4
"""The first layer, counted from 1, with a residual connection, and then every second one."""
LEAST_PLACES = 3
"""Voxels of the coarser pathway's answer, along each axis, in the smallest patch that `next_size` proposes: the paper's
segments of 25 voxels, which label 9."""


@dataclass(frozen=True)
class DeepMedicConfig:
    """Settings of DeepMedic; the defaults are the paper's network of eleven layers."""

    filters: tuple[int, ...] = (30, 30, 40, 40, 40, 40, 50, 50)
    """Filters of each layer of a pathway; both pathways have the same."""
    hidden: tuple[int, ...] = (150, 150)
    """Filters, of size 1, of each layer between the pathways and the scores: the fully connected layers."""
    factor: int = 3
    """Odd factor by which the grid of the second pathway is coarser."""
    residual: bool = False
    """Add what enters a layer to the answer of the next one, at layers 4, 6, 8, … of each pathway (BRATS 2016)."""
    dropout: float = 0.5
    """Probability of dropping a number after each hidden layer."""
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

    def __post_init__(self) -> None:
        for where, widths in (("model.filters", self.filters), ("model.hidden", self.hidden)):
            if not 1 <= len(widths) <= MAX_IN_A_ROW or min(widths) < 1:
                expected = f"1 to {MAX_IN_A_ROW} layers of at least one filter"
                raise MedsegError(Code.CONFIG, "not the filters of layers", where=where, expected=expected, got=widths)
        if self.factor < 2 or self.factor % 2 == 0:
            raise MedsegError(
                Code.CONFIG,
                "a coarser grid keeps the voxel in the middle of each block",
                where="model.factor",
                expected="3, 5, 7, …",
                got=self.factor,
            )
        if self.num_groups < 1:
            raise MedsegError(Code.CONFIG, "at least one group", where="model.num_groups", got=self.num_groups)
        if not 0 <= self.dropout < 1:
            raise MedsegError(
                Code.CONFIG, "not a probability", where="model.dropout", expected="0 <= p < 1", got=self.dropout
            )


class Pathway(nn.Module):
    """Convolutions without padding, one after the other.

    Args:
        in_channels: C.
        filters: K of each.
        style: what they have in common; padding "valid".
        residual: add what enters a layer to the answer of the next one, cut to its size, from `FIRST_RESIDUAL` on.
            Where there are more filters than channels, the further ones get nothing.
    """

    def __init__(self, in_channels: int, filters: tuple[int, ...], style: ConvolutionStyle, *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        channels = (in_channels, *filters)
        self.layers = nn.ModuleList(
            ConvolutionBlock(c, k, style, kernel=KERNEL) for c, k in itertools.pairwise(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, K, *spatial − 2 · layers)."""
        before = x
        for number, layer in enumerate(self.layers, start=1):
            answer: Tensor = layer(x)
            if self.residual and number >= FIRST_RESIDUAL and number % 2 == 0:
                answer = answer + _with_channels(centre_crop(before, answer.shape[2:]), answer.shape[1])
            before, x = x, answer
        return x


@MODELS.register("deepmedic", DeepMedicConfig)
class DeepMedic(SegmentationModel):
    """DeepMedic in 3D, and the same in 2D.

    The first pathway sees the middle of the patch, 25³ voxels where 9³ are labelled; the second sees the whole of it
    through every third voxel along each axis (the middle one of each 3³), 19³ of them. Both are eight convolutions 3³
    without padding. The answer of the second is repeated three times along each axis and concatenated with that of the
    first; two layers of filters of size 1, with dropout, and the scores follow. All voxels of the middle are labelled
    at once (dense training on image segments): a patch is 48 voxels larger than what is labelled of it, and the
    paper's segments are patches of 57³, of which half are centred on foreground
    (`medseg train experiment=deepmedic`).

    What the paper leaves open, and the choice here: "down-sampled" means every third voxel, without a mean, as in
    their code; the residual connections of BRATS 2016 are added after the activation. The fully connected conditional
    random field that the paper runs over the result is not built.

    Args:
        config: the settings.
        in_channels: channels of the images, such as MR sequences.
        num_classes: classes, with the background.
        spatial_dims: 3, or 2.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the settings do not fit each other.

    Source:
        Kamnitsas et al.: Efficient multi-scale 3D CNN with fully connected CRF for accurate brain lesion segmentation,
        Medical Image Analysis 2017, arXiv:1603.05959, sections 2.1 to 2.4, figure 5.
        Kamnitsas et al.: DeepMedic for Brain Tumor Segmentation, BrainLes (BRATS) 2016: the residual connections.
    """

    def __init__(self, config: DeepMedicConfig, *, in_channels: int, num_classes: int, spatial_dims: int) -> None:
        super().__init__()
        self.in_channels, self.num_classes, self.spatial_dims = in_channels, num_classes, spatial_dims
        self.factor = config.factor
        self.lost = (KERNEL - 1) * len(config.filters)
        self._fewest_places = 2 if config.normalisation in ("batch", "instance") else 1
        style = ConvolutionStyle(
            spatial_dims,
            padding="valid",
            bias=config.bias,
            normalisation=config.normalisation,
            num_groups=config.num_groups,
            activation=config.activation,
            negative_slope=config.negative_slope,
        )
        self.fine = Pathway(in_channels, config.filters, style, residual=config.residual)
        self.coarse = Pathway(in_channels, config.filters, style, residual=config.residual)
        self.up = Repetition(config.filters[-1], (config.factor,) * spatial_dims)
        channels = (2 * config.filters[-1], *config.hidden)
        hidden = []
        for c, k in itertools.pairwise(channels):
            hidden += [ConvolutionBlock(c, k, style, kernel=1), Dropout(k, config.dropout)]
        self.hidden = Stack(hidden, channels[0])
        self.heads = nn.ModuleList([SegmentationHead(config.hidden[-1], num_classes, spatial_dims)])
        initialise(self, style.activation, negative_slope=style.negative_slope)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Class scores of the middle of x; see `SegmentationModel.forward`."""
        size = tuple(x.shape[2:])
        if not torch.compiler.is_compiling():
            self.output_size(size)
        segment = centre_crop(x, torch.Size(length - self._wider for length in size))
        every = slice(self.factor // 2, None, self.factor)
        context = x[..., every, every] if self.spatial_dims == 2 else x[..., every, every, every]
        together = torch.cat((self.fine(segment), self.up(self.coarse(context))), dim=1)
        logits: Tensor = self.heads[0](self.hidden(together))
        return logits

    @property
    def _wider(self) -> int:
        """Voxels that the whole patch is longer than the segment that the first pathway sees."""
        return (self.factor - 1) * self.lost

    @property
    def divisor(self) -> tuple[int, ...]:
        """The factor of the coarser grid, along each axis."""
        return (self.factor,) * self.spatial_dims

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the result; see `SegmentationModel.output_size`."""
        if len(input_size) != self.spatial_dims:
            raise MedsegError(
                Code.MODEL,
                "the image has another number of axes than the model",
                expected=f"{self.spatial_dims} spatial axes",
                got=input_size,
            )
        margin = self._wider + self.lost
        least = margin + self.factor
        if any(length % self.factor or length < least for length in input_size):
            nearest = []
            for length in input_size:
                below, above = length - length % self.factor, -(-length // self.factor) * self.factor
                fitting = sorted({max(least, below), max(least, above)})
                nearest.append(" or ".join(map(str, fitting)))
            raise MedsegError(
                Code.MODEL,
                "the model cannot take images of this size",
                expected=f"multiples of {self.factor} from {least} voxels on",
                got=input_size,
                remedy="the nearest that fit, axis by axis: " + "; ".join(nearest),
            )
        output = tuple(length - margin for length in input_size)
        if math.prod(length // self.factor for length in output) < self._fewest_places:
            raise MedsegError(
                Code.MODEL,
                "the maps of the coarser pathway shrink to a single voxel, which cannot be normalised",
                expected=f"an axis of at least {least + self.factor} voxels",
                got=input_size,
            )
        return output

    def next_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The smallest size along each axis, from `size` on, that fits and labels no less than the paper's segments."""
        least = self._wider + self.lost + LEAST_PLACES * self.factor
        return tuple(max(least, -(-length // self.factor) * self.factor) for length in size)


def _with_channels(x: Tensor, channels: int) -> Tensor:
    """The first `channels` channels, followed by zeros where there are fewer."""
    if x.shape[1] >= channels:
        return x.narrow(1, 0, channels)
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, channels - x.shape[1]))
