"""Convolution → normalisation → activation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import Activation, make_activation
from medseg.models.blocks.block import Block, Stack, convolved_length
from medseg.models.blocks.dimensions import PerAxis, layers, per_axis
from medseg.models.blocks.normalisation import Normalisation, make_normalisation


@dataclass(frozen=True)
class ConvolutionStyle:
    """What the convolutions of a network have in common."""

    spatial_dims: int
    """Number of spatial axes: 2 or 3."""
    padding: Literal["same", "valid"] | PerAxis = "same"
    """P: "same" (with stride 1 the size stays), "valid" (no padding), or voxels on each side, also per axis."""
    bias: bool = True
    """Add a learnt number to each filter's answer."""
    normalisation: Normalisation = "instance"
    """What follows the convolution."""
    num_groups: int = 8
    """Groups of the group normalisation."""
    activation: Activation = "leaky_relu"
    """What follows the normalisation."""
    negative_slope: float = 0.01
    """Slope of the leaky ReLU below zero."""

    def plain(self) -> ConvolutionStyle:
        """The same without normalisation and activation."""
        return replace(self, normalisation="none", activation="linear")


class ConvolutionBlock(Block):
    """Convolution → normalisation → activation.

    Args:
        in_channels: C.
        out_channels: K, the number of filters.
        style: padding, normalisation and activation.
        kernel: F, the filter size; odd where the padding is "same".
        stride: S.
    Raises:
        MedsegError: E_CONFIG or E_MODEL if the numbers do not fit.
    """

    def __init__(
        self, in_channels: int, out_channels: int, style: ConvolutionStyle, *, kernel: PerAxis = 3, stride: PerAxis = 1
    ) -> None:
        super().__init__()
        n = style.spatial_dims
        self.out_channels = out_channels
        self.kernel = per_axis(kernel, n, where="kernel")
        self.stride = per_axis(stride, n, where="stride")
        self.padding = padding_per_axis(style.padding, self.kernel)
        self.convolution = layers(n).convolution(
            in_channels, out_channels, self.kernel, self.stride, self.padding, bias=style.bias
        )
        self.normalisation = make_normalisation(style.normalisation, out_channels, n, num_groups=style.num_groups)
        self.activation = make_activation(style.activation, out_channels, negative_slope=style.negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, K, *spatial')."""
        result: Tensor = self.activation(self.normalisation(self.convolution(x)))
        return result

    def output_length(self, length: int, axis: int) -> int:
        """floor((length + 2P − F) / S) + 1."""
        return convolved_length(length, self.kernel[axis], self.stride[axis], self.padding[axis])


def convolutions(
    number: int, in_channels: int, out_channels: int, style: ConvolutionStyle, *, kernel: PerAxis = 3
) -> Stack:
    """So many convolution blocks in a row, with stride 1; none keep the channels."""
    channels = (out_channels if i else in_channels for i in range(number))
    return Stack((ConvolutionBlock(c, out_channels, style, kernel=kernel) for c in channels), in_channels)


def padding_per_axis(padding: Literal["same", "valid"] | PerAxis, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Voxels of zeros on each side of each axis.

    Raises:
        MedsegError: E_CONFIG for "same" with an even filter, which has no centre.
    """
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        if any(k % 2 == 0 for k in kernel):
            raise MedsegError(
                Code.CONFIG, "a filter of even size cannot keep the size of an image", expected="odd", got=kernel
            )
        return tuple(k // 2 for k in kernel)
    return per_axis(padding, len(kernel), where="padding", at_least=0)
