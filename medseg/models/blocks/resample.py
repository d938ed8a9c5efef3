"""Down-sampling and up-sampling.

A factor is the stride S of the step, one number per axis; see `pool.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import make_activation
from medseg.models.blocks.block import Block, Stack
from medseg.models.blocks.convolution import ConvolutionBlock, ConvolutionStyle
from medseg.models.blocks.dimensions import layers
from medseg.models.blocks.normalisation import make_normalisation
from medseg.models.blocks.pool import DownBlock, Pool, divided
from medseg.models.blocks.residual import ResidualBlock

Down = Literal["max_pool", "average_pool", "strided_convolution", "residual_block"]
Up = Literal["transposed", "transposed_padded", "interpolation", "interpolation_convolution"]


class StridedConvolution(DownBlock):
    """A convolution block with stride S.

    Args:
        in_channels: C.
        out_channels: K.
        style: padding (must be "same"), normalisation and activation.
        kernel: F per axis.
        stride: S per axis.
    Raises:
        MedsegError: E_CONFIG without padding: its grid would lie half a voxel beside that of the way up.
    """

    num_convolutions = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: ConvolutionStyle,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        if style.padding != "same":
            raise MedsegError(
                Code.CONFIG,
                "down-sampling by strided convolution needs padding same",
                where="model.down",
                expected="max_pool or average_pool",
                got=f"strided_convolution with padding {style.padding}",
            )
        self.out_channels = out_channels
        self.stride = stride
        self.block = ConvolutionBlock(in_channels, out_channels, style, kernel=kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, K, *spatial / S)."""
        result: Tensor = self.block(x)
        return result

    def output_length(self, length: int, axis: int) -> int:
        """length / S."""
        return divided(length, self.stride[axis])


class PatchConvolution(DownBlock):
    """A convolution block whose filters have the size of its stride: each voxel of the result has its own window.

    Args:
        in_channels: C.
        out_channels: K.
        style: bias, normalisation and activation.
        stride: S = F per axis.
    """

    num_convolutions = 1

    def __init__(
        self, in_channels: int, out_channels: int, style: ConvolutionStyle, *, stride: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stride = stride
        unpadded = replace(style, padding="valid")
        self.block = ConvolutionBlock(in_channels, out_channels, unpadded, kernel=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, K, *spatial / S)."""
        result: Tensor = self.block(x)
        return result

    def output_length(self, length: int, axis: int) -> int:
        """length / S."""
        return divided(length, self.stride[axis])


class StridedResidualBlock(DownBlock):
    """A residual block of two convolutions, the first with stride S.

    Args:
        in_channels: C.
        out_channels: K.
        style: padding (must be "same"), normalisation and activation.
        kernel: F per axis.
        stride: S per axis.
    Raises:
        MedsegError: E_MODEL without padding.
    """

    num_convolutions = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: ConvolutionStyle,
        *,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.block = ResidualBlock(out_channels, style, in_channels=in_channels, kernel=kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, K, *spatial / S)."""
        result: Tensor = self.block(x)
        return result

    def output_length(self, length: int, axis: int) -> int:
        """length / S."""
        return self.block.output_length(length, axis)


def make_down(
    name: Down,
    in_channels: int,
    out_channels: int,
    style: ConvolutionStyle,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
) -> DownBlock:
    """A step down by name. Pooling keeps `in_channels`; the others return `out_channels`."""
    match name:
        case "strided_convolution":
            return StridedConvolution(in_channels, out_channels, style, kernel=kernel, stride=stride)
        case "residual_block":
            return StridedResidualBlock(in_channels, out_channels, style, kernel=kernel, stride=stride)
        case "max_pool" | "average_pool":
            return Pool(name, in_channels, stride)


class TransposedConvolution(Block):
    """Transposed convolution → normalisation → activation: S times as many voxels.

    Without padding F = S and the filters do not overlap (the 2×2 up-convolution of the U-Net). With padding F is
    larger than S, P = (F − 1) / 2 and S − 1 voxels are added at the far end, so that the length is still S·length.

    Args:
        in_channels: C.
        out_channels: K.
        style: bias, normalisation and activation.
        stride: S per axis.
        kernel: F per axis, odd; None is the form without padding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: ConvolutionStyle,
        *,
        stride: tuple[int, ...],
        kernel: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stride = stride
        overlap = [(k - s) if kernel is not None else 0 for k, s in zip(kernel or stride, stride, strict=True)]
        if min(overlap) < 0 or (kernel is not None and any(k % 2 == 0 for k in kernel)):
            raise MedsegError(
                Code.CONFIG,
                "a padded transposed convolution needs odd filters that are not smaller than the stride",
                expected=f"odd, at least {stride}",
                got=kernel,
            )
        padding = tuple((k - 1) // 2 for k in kernel) if kernel is not None else (0,) * len(stride)
        added = tuple(s - 1 for s in stride) if kernel is not None else (0,) * len(stride)
        n = style.spatial_dims
        self.convolution = layers(n).transposed_convolution(
            in_channels, out_channels, kernel or stride, stride, padding, added, bias=style.bias
        )
        self.normalisation = make_normalisation(style.normalisation, out_channels, n, num_groups=style.num_groups)
        self.activation = make_activation(style.activation, out_channels, negative_slope=style.negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, K, *spatial · S)."""
        result: Tensor = self.activation(self.normalisation(self.convolution(x)))
        return result

    def output_length(self, length: int, axis: int) -> int:
        """length · S."""
        return length * self.stride[axis]


class Interpolation(Block):
    """Linear interpolation by S; voxel edges coincide, the channels stay.

    Args:
        channels: C = K.
        stride: S per axis.
    """

    def __init__(self, channels: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = channels
        self.stride = stride
        mode = layers(len(stride)).linear_interpolation
        self.interpolation = nn.Upsample(scale_factor=tuple(float(s) for s in stride), mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, C, *spatial · S)."""
        result: Tensor = self.interpolation(x)
        return result

    def output_length(self, length: int, axis: int) -> int:
        """length · S."""
        return length * self.stride[axis]


class Repetition(Block):
    """Each voxel S times along each axis; the channels stay.

    Args:
        channels: C = K.
        stride: S per axis.
    """

    def __init__(self, channels: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = channels
        self.stride = stride
        self.repetition = nn.Upsample(scale_factor=tuple(float(s) for s in stride), mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, C, *spatial · S)."""
        result: Tensor = self.repetition(x)
        return result

    def output_length(self, length: int, axis: int) -> int:
        """length · S."""
        return length * self.stride[axis]


def make_up(
    name: Up,
    in_channels: int,
    out_channels: int,
    style: ConvolutionStyle,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
) -> Block:
    """A step up by name. Interpolation alone keeps `in_channels`; the others return `out_channels`.

    Args:
        name: "transposed" (F = S), "transposed_padded" (F = kernel, at least 3 where S > 1), "interpolation", or
            "interpolation_convolution"
            (F = kernel).
        in_channels: C.
        out_channels: K.
        style: what its convolution has in common with others.
        kernel: filter size per axis where the form has one of its own.
        stride: S per axis.
    """
    match name:
        case "transposed":
            return TransposedConvolution(in_channels, out_channels, style, stride=stride)
        case "transposed_padded":
            # A filter smaller than the stride would leave gaps between what it writes.
            wide = tuple(max(f, 3) if s > 1 else f for f, s in zip(kernel, stride, strict=True))
            return TransposedConvolution(in_channels, out_channels, style, stride=stride, kernel=wide)
        case "interpolation":
            return Interpolation(in_channels, stride)
        case "interpolation_convolution":
            convolution = ConvolutionBlock(in_channels, out_channels, style, kernel=kernel)
            return Stack((Interpolation(in_channels, stride), convolution), in_channels)
