"""Initial weights."""

from __future__ import annotations

import math

from torch import nn

from medseg.models.blocks.activation import Activation, initial_gain

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)


def initialise(network: nn.Module, activation: Activation, *, negative_slope: float = 0.01) -> None:
    """Draw all convolutions from a normal distribution of standard deviation gain / √N; biases are 0.

    N is the number of inputs that meet in one output: C·F·F for a convolution, and C·⌈F/S⌉·⌈F/S⌉ for a transposed
    one, because each of its outputs sees only every S-th place of the filter. (torch's kaiming_normal_, which nnU-Net
    uses, counts K·F·F there.)

    Args:
        network: changed in place.
        activation: what follows the convolutions; √2 is the gain of ReLU, which makes √(2/N).
        negative_slope: slope of the leaky ReLU below zero.

    Source:
        He et al., Delving Deep into Rectifiers, ICCV 2015, equation 10; Ronneberger et al. 2015, section 3.
    """
    gain = initial_gain(activation, negative_slope=negative_slope)
    for layer in network.modules():
        if not isinstance(layer, _CONVOLUTIONS + _TRANSPOSED) or layer.weight.is_meta:
            continue  # weights without values: torch would load its compiler, for two seconds, to draw none
        strides = layer.stride if isinstance(layer, _TRANSPOSED) else (1,) * len(layer.kernel_size)
        places = math.prod(math.ceil(k / s) for k, s in zip(layer.kernel_size, strides, strict=True))
        nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_channels * places))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
