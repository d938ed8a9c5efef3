"""The shape that U-Net and its relatives share: an encoder, a decoder, and skips between them.

    encoder stage  x → block(down(x))
    decoder stage  x, s → block(skip(up(x), gate(s, x)))

Architectures differ by the parts that they name (`Parts`). Encoder stages are numbered from the highest resolution
(0) down; the decoder's stages stand in the order in which they run, from the lowest resolution up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from medseg.errors import Code, MedsegError
from medseg.models.blocks.block import Block
from medseg.models.blocks.convolution import ConvolutionStyle
from medseg.models.blocks.gate import Gate, NoGate
from medseg.models.blocks.head import SegmentationHead
from medseg.models.blocks.initialisation import initialise
from medseg.models.blocks.normalisation import Normalisation
from medseg.models.blocks.pool import DownBlock, NoDown
from medseg.models.blocks.resample import Down, Up, make_down, make_up
from medseg.models.blocks.skip import Skip, SkipBlock, make_skip
from medseg.models.contract import SegmentationModel
from medseg.models.stages import Stage

_ONE_VOXEL_IS_TOO_FEW: frozenset[Normalisation] = frozenset({"instance", "batch"})
"""Normalisations over the voxels of a map: of a single voxel they have no variance, and torch refuses."""


class EncoderStage(nn.Module):
    """One resolution on the way down: block(down(x))."""

    def __init__(self, down: DownBlock, block: Block) -> None:
        super().__init__()
        self.down = down
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """From the maps of the stage above to those of this one."""
        result: Tensor = self.block(self.down(x))
        return result

    def output_length(self, length: int, axis: int) -> int:
        """Length along an axis after the stage."""
        return self.block.output_length(self.down.output_length(length, axis), axis)


class DecoderStage(nn.Module):
    """One resolution on the way up: block(skip(up(x), gate(s, x)))."""

    def __init__(self, up: Block, skip: SkipBlock, block: Block, gate: Gate | None = None) -> None:
        super().__init__()
        self.up = up
        self.gate = gate or NoGate()
        self.skip = skip
        self.block = block

    def forward(self, x: Tensor, across: Tensor) -> Tensor:
        """From the maps of the stage below, and those that come across, to those of this stage."""
        result: Tensor = self.block(self.skip(self.up(x), self.gate(across, x)))
        return result

    def output_length(self, length: int, axis: int) -> int:
        """Length along an axis after the stage; the skip takes the size of what comes up."""
        return self.block.output_length(self.up.output_length(length, axis), axis)


@dataclass(frozen=True)
class Parts:
    """What an architecture is made of."""

    style: ConvolutionStyle
    """What all convolutions have in common; decides the initial weights."""
    up_style: ConvolutionStyle
    """The same for the convolutions of the steps up."""
    down: Down | Callable[[int, int], DownBlock]
    """The steps down, or what makes one of (channels of the stage above, number of the stage)."""
    up: Up | Callable[[int, int], Block]
    """The steps up, or what makes one of (channels of the stage below, number of the stage)."""
    skip: Skip
    """How what comes up is merged with what comes across."""
    encoder_block: Callable[[DownBlock, int], Block]
    """(the step down that it follows, number of the stage) → the block of an encoder stage."""
    decoder_block: Callable[[int, int], Block]
    """(channels of the merged maps, number of the stage) → the block of a decoder stage."""
    gate: Callable[[int, int, int], Gate] | None = None
    """(channels of the stage below, channels across, number of the stage) → what the maps that come across pass."""
    across: Callable[[int, int], int] = lambda channels, stage: channels
    """(channels of an encoder stage, its number) → channels that come across from it."""


class EncoderDecoder(SegmentationModel):
    """An encoder, a decoder with one stage less, and heads.

    Args:
        parts: what its stages are made of.
        stages: filters, filter sizes and strides, highest resolution first.
        in_channels: channels of the images.
        num_classes: classes, with the background.
        deep_supervision: while training, return the scores of several resolutions: of all of the decoder but the
            lowest, whose loss nnU-Net gives no weight.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the parts do not fit each other.
    """

    def __init__(
        self, parts: Parts, stages: Sequence[Stage], *, in_channels: int, num_classes: int, deep_supervision: bool
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.spatial_dims = parts.style.spatial_dims
        self.deep_supervision = deep_supervision
        self._divisor = tuple(math.prod(factors) for factors in zip(*(stage.stride for stage in stages), strict=True))
        self._fewest_voxels = 2 if parts.style.normalisation in _ONE_VOXEL_IS_TOO_FEW else 1
        encoder = _make_encoder(parts, stages, in_channels)
        decoder = _make_decoder(parts, stages, encoder)
        self.encoder = nn.ModuleList(encoder)
        self.decoder = nn.ModuleList(decoder)
        num_heads = max(1, len(decoder) - 1) if deep_supervision else 1
        widths = [stage.block.out_channels for stage in reversed(decoder)][:num_heads]
        self.heads = nn.ModuleList(SegmentationHead(width, num_classes, self.spatial_dims) for width in widths)
        initialise(self, parts.style.activation, negative_slope=parts.style.negative_slope)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Class scores; see `SegmentationModel.forward`."""
        across = self.encoded(x)
        maps = self.decoded(across.pop(), across)
        if not (self.training and self.deep_supervision):
            logits: Tensor = self.heads[0](maps[-1])
            return logits
        return [head(m) for head, m in zip(self.heads, reversed(maps), strict=False)]

    def encoded(self, x: Tensor) -> list[Tensor]:
        """The maps of all stages of the encoder, highest resolution first.

        Raises:
            MedsegError: E_MODEL if the size of the image does not fit.
        """
        if not torch.compiler.is_compiling():
            self.output_size(tuple(x.shape[2:]))
        maps = []
        for stage in self.encoder:
            x = stage(x)
            maps.append(x)
        return maps

    def decoded(self, x: Tensor, across: list[Tensor]) -> list[Tensor]:
        """The maps of all stages of the decoder, lowest resolution first.

        Args:
            x: maps of the lowest stage of the encoder.
            across: what comes across to each stage, highest resolution first; emptied, so that none is held longer
                than it is needed.
        """
        maps = []
        for stage in self.decoder:
            x = stage(x, across.pop())
            maps.append(x)
        return maps

    @property
    def divisor(self) -> tuple[int, ...]:
        """The product of the strides, per axis."""
        return self._divisor

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the result; see `SegmentationModel.output_size`."""
        if len(input_size) != self.spatial_dims:
            raise MedsegError(
                Code.MODEL,
                "the image has another number of axes than the model",
                expected=f"{self.spatial_dims} spatial axes",
                got=input_size,
            )
        if not all(self._fits(length, axis) for axis, length in enumerate(input_size)):
            raise MedsegError(
                Code.MODEL,
                "the model cannot take images of this size",
                expected=f"steps of {self.divisor} voxels along the axes",
                got=input_size,
                remedy="the nearest that fit, axis by axis: " + self._nearest(input_size),
            )
        lengths = [self._lengths(length, axis) for axis, length in enumerate(input_size)]
        if min(math.prod(size) for size in zip(*lengths, strict=True)) < self._fewest_voxels:
            larger = [self._next_fit(length, axis) for axis, length in enumerate(input_size)]
            raise MedsegError(
                Code.MODEL,
                "the maps shrink to a single voxel, which cannot be normalised",
                expected="at least two voxels at the lowest resolution",
                got=input_size,
                remedy=f"enlarge at least one axis, to {larger}",
            )
        return tuple(per_stage[-1] for per_stage in lengths)

    def next_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The smallest size along each axis, from `size` on, that fits."""
        return tuple(n if self._fits(n, axis) else self._next_fit(n, axis) for axis, n in enumerate(size))

    def _lengths(self, length: int, axis: int) -> list[int]:
        """Length along an axis after each stage of the encoder, then of the decoder."""
        lengths = [length]
        for stage in itertools.chain(self.encoder, self.decoder):
            lengths.append(cast(EncoderStage | DecoderStage, stage).output_length(lengths[-1], axis))
        return lengths[1:]

    def _fits(self, length: int, axis: int) -> bool:
        try:
            self._lengths(length, axis)
        except MedsegError:
            return False
        return True

    def _next_fit(self, length: int, axis: int) -> int:
        return next(n for n in itertools.count(length + 1) if self._fits(n, axis))

    def _nearest(self, input_size: tuple[int, ...]) -> str:
        """The nearest lengths that fit, per axis: the length itself, or a smaller and a larger one."""
        nearest = []
        for axis, length in enumerate(input_size):
            if self._fits(length, axis):
                nearest.append(str(length))
                continue
            smaller = next((f"{n} or " for n in range(length - 1, 0, -1) if self._fits(n, axis)), "")
            nearest.append(f"{smaller}{self._next_fit(length, axis)}")
        return "; ".join(nearest)


def _make_encoder(parts: Parts, stages: Sequence[Stage], in_channels: int) -> list[EncoderStage]:
    """The encoder's stages, from the highest resolution down."""
    encoder: list[EncoderStage] = []
    down: DownBlock = NoDown(in_channels)
    for i, stage in enumerate(stages):
        if i > 0:
            channels = encoder[-1].block.out_channels
            if callable(parts.down):
                down = parts.down(channels, i)
            else:
                style = parts.style
                down = make_down(parts.down, channels, stage.width, style, kernel=stage.kernel, stride=stage.stride)
        encoder.append(EncoderStage(down, parts.encoder_block(down, i)))
    return encoder


def _make_decoder(parts: Parts, stages: Sequence[Stage], encoder: list[EncoderStage]) -> list[DecoderStage]:
    """The decoder's stages, from the lowest resolution up."""
    decoder: list[DecoderStage] = []
    channels = encoder[-1].block.out_channels
    for i in reversed(range(len(stages) - 1)):
        below, stage = stages[i + 1], stages[i]
        if callable(parts.up):
            up = parts.up(channels, i)
        else:
            style = parts.up_style
            up = make_up(parts.up, channels, stage.width, style, kernel=below.kernel, stride=below.stride)
        across = parts.across(encoder[i].block.out_channels, i)
        skip = make_skip(parts.skip, up.out_channels, across, stage=i)
        gate = parts.gate(channels, across, i) if parts.gate else None
        decoder.append(DecoderStage(up, skip, parts.decoder_block(skip.out_channels, i), gate))
        channels = decoder[-1].block.out_channels
    return decoder
