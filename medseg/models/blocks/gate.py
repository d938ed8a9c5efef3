"""Gates: what comes across from the encoder, weighted by what comes from below."""

from __future__ import annotations

from torch import Tensor, nn

from medseg.models.blocks.dimensions import layers
from medseg.models.blocks.resample import Interpolation


class Gate(nn.Module):
    """Weights (N, C, *spatial) from the encoder by the maps of the stage below; size and channels stay."""

    def forward(self, across: Tensor, below: Tensor) -> Tensor:
        """The weighted maps.

        Args:
            across: (N, C, *spatial), from the encoder.
            below: (N, B, *spatial / S), from the stage below, before its step up.
        """
        raise NotImplementedError


class NoGate(Gate):
    """Nothing is weighted."""

    def forward(self, across: Tensor, below: Tensor) -> Tensor:
        """What comes across."""
        return across


class AttentionGate(Gate):
    """Additive attention: α · x with α = sigmoid(ψ(relu(Wx x + Wg g))), one α for each voxel of the coarser grid.

    x comes across, g from below. Wx has filters of the size of the step between the two, and takes x to the grid of g;
    Wg and ψ have filters of size 1. α is interpolated linearly to the grid of x.

    Args:
        across_channels: of x; as many does the sum in the middle have, which the paper calls F_int and leaves open.
        below_channels: of g.
        stride: S of the step between the two, per axis.

    Source:
        Oktay et al., Attention U-Net, MIDL 2018, arXiv:1804.03999, equations 1 and 2, figure 2. Their code adds a
        convolution and a normalisation behind the product; the paper has none, nor has this.
    """

    def __init__(self, across_channels: int, below_channels: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        convolution = layers(len(stride)).convolution
        self.from_across = convolution(across_channels, across_channels, stride, stride, bias=False)
        self.from_below = convolution(below_channels, across_channels, 1)
        self.activation = nn.ReLU(inplace=True)
        self.score = convolution(across_channels, 1, 1)
        self.sigmoid = nn.Sigmoid()
        self.up = Interpolation(1, stride)

    def forward(self, across: Tensor, below: Tensor) -> Tensor:
        """α · x."""
        together = self.activation(self.from_across(across) + self.from_below(below))
        weights = self.up(self.sigmoid(self.score(together)))
        result: Tensor = across * weights
        return result
