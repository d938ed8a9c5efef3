"""Residual block."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from medseg.errors import Code, MedsegError
from medseg.models.blocks.activation import make_activation
from medseg.models.blocks.block import Block, Stack
from medseg.models.blocks.convolution import ConvolutionBlock, ConvolutionStyle
from medseg.models.blocks.dimensions import PerAxis, per_axis
from medseg.models.blocks.normalisation import make_normalisation
from medseg.models.blocks.pool import Pool


class ResidualBlock(Block):
    """activation(shortcut(x) + F(x)), where F is a row of convolutions.

    Each convolution has its normalisation and activation; the last one's activation comes after the sum. The first
    one has the stride. The shortcut is the input itself; where F changes its size, the mean of each window of size S;
    where F changes the channels, after that a convolution with filters of size 1, without bias, and its normalisation.

    Args:
        channels: K.
        style: padding (must be "same"), normalisation and activation.
        in_channels: C; None: C = K.
        num_convolutions: how many stand in the row.
        kernel: F, the filter size.
        stride: S.
    Raises:
        MedsegError: E_MODEL with other padding than "same": the sum would have nothing to match.

    Source:
        He et al., Deep Residual Learning, CVPR 2016, equations 1 and 2. He et al., Bag of Tricks for Image
        Classification, CVPR 2019, figure 2c (ResNet-D): the mean of windows before the projection.
    """

    def __init__(
        self,
        channels: int,
        style: ConvolutionStyle,
        *,
        in_channels: int | None = None,
        num_convolutions: int = 2,
        kernel: PerAxis = 3,
        stride: PerAxis = 1,
    ) -> None:
        super().__init__()
        if style.padding != "same":
            raise MedsegError(
                Code.MODEL, "a residual block adds its input to its output", expected="padding same", got=style.padding
            )
        self.out_channels = channels
        first = channels if in_channels is None else in_channels
        factors = per_axis(stride, style.spatial_dims, where="stride")
        last = replace(style, activation="linear")
        convolutions = (
            ConvolutionBlock(
                channels if i else first,
                channels,
                style if i < num_convolutions - 1 else last,
                kernel=kernel,
                stride=1 if i else factors,
            )
            for i in range(num_convolutions)
        )
        self.convolutions = Stack(convolutions, first)
        self.shortcut = _shortcut(first, channels, style, factors)
        self.activation = make_activation(style.activation, channels, negative_slope=style.negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, K, *spatial / S)."""
        result: Tensor = self.activation(self.shortcut(x) + self.convolutions(x))
        return result

    def output_length(self, length: int, axis: int) -> int:
        """length / S."""
        return self.shortcut.output_length(length, axis)

    def start_as_shortcut(self) -> None:
        """Set scale and shift of the last normalisation to 0: F gives nothing until it has learnt something.

        Source:
            Goyal et al., Accurate, Large Minibatch SGD, 2017, section 5.1.
        """
        last = self.convolutions[-1]
        for parameter in last.normalisation.parameters():  # type: ignore[union-attr]
            nn.init.zeros_(parameter)


class PreActivationResidualBlock(Block):
    """shortcut(x) + F(x), where F is a row of normalisation → activation → convolution.

    The shortcut is that of `ResidualBlock`, but its convolution has no normalisation.

    Args:
        channels: K.
        style: padding (must be "same"), normalisation and activation.
        in_channels: C.
        num_convolutions: how many stand in the row.
        kernel: F, the filter size.
        stride: S, of the first convolution.
        is_first: leave out the first normalisation and activation, where the block stands at the start of a network.

    Source:
        He et al., Identity Mappings in Deep Residual Networks, ECCV 2016, figure 4e.
    """

    def __init__(
        self,
        channels: int,
        style: ConvolutionStyle,
        *,
        in_channels: int,
        num_convolutions: int = 2,
        kernel: PerAxis = 3,
        stride: PerAxis = 1,
        is_first: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = channels
        factors = per_axis(stride, style.spatial_dims, where="stride")
        self.convolutions = nn.Sequential()
        for i in range(num_convolutions):
            width = channels if i else in_channels
            if i or not is_first:
                self.convolutions.append(_NormalisedActivation(width, style))
            one = 1 if i else factors
            self.convolutions.append(ConvolutionBlock(width, channels, style.plain(), kernel=kernel, stride=one))
        self.shortcut = _shortcut(in_channels, channels, style.plain(), factors)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) → (N, K, *spatial / S)."""
        result: Tensor = self.shortcut(x) + self.convolutions(x)
        return result

    def output_length(self, length: int, axis: int) -> int:
        """length / S."""
        return self.shortcut.output_length(length, axis)


class _NormalisedActivation(nn.Module):
    """Normalisation → activation."""

    def __init__(self, channels: int, style: ConvolutionStyle) -> None:
        super().__init__()
        n = style.spatial_dims
        self.normalisation = make_normalisation(style.normalisation, channels, n, num_groups=style.num_groups)
        self.copies = style.normalisation == "none"
        self.activation = make_activation(style.activation, channels, negative_slope=style.negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        # Activations work in place, and x itself goes on through the shortcut.
        result: Tensor = self.activation(x.clone() if self.copies else self.normalisation(x))
        return result


def _shortcut(in_channels: int, out_channels: int, style: ConvolutionStyle, stride: tuple[int, ...]) -> Stack:
    """From the input to the size and channels of the output; empty where they are its own."""
    blocks: list[Block] = []
    if max(stride) > 1:
        blocks.append(Pool("average_pool", in_channels, stride))
    if in_channels != out_channels:
        projection = replace(style, bias=False, activation="linear")
        blocks.append(ConvolutionBlock(in_channels, out_channels, projection, kernel=1))
    return Stack(blocks, in_channels)
