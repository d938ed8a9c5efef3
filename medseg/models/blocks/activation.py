"""Activations by name, and how their spread is kept by the initial weights."""

from __future__ import annotations

from typing import Literal

from torch import nn

Activation = Literal["relu", "leaky_relu", "elu", "prelu", "sigmoid", "tanh", "linear"]

PRELU_START = 0.25
"""Slope for negative values from which PReLU learns (He et al. 2015, section 2.1)."""


def make_activation(name: Activation, channels: int, *, negative_slope: float = 0.01) -> nn.Module:
    """An activation.

    The rectifiers work in place: they only ever follow a convolution or a normalisation, neither of which needs its
    own output for the gradient, and one activation map per convolution is saved.

    Args:
        name: which one; "linear" changes nothing.
        channels: K; PReLU learns one slope for each.
        negative_slope: slope of the leaky ReLU below zero.
    """
    match name:
        case "relu":
            return nn.ReLU(inplace=True)
        case "leaky_relu":
            return nn.LeakyReLU(negative_slope, inplace=True)
        case "elu":
            return nn.ELU(inplace=True)
        case "prelu":
            return nn.PReLU(channels, init=PRELU_START)
        case "sigmoid":
            return nn.Sigmoid()
        case "tanh":
            return nn.Tanh()
        case "linear":
            return nn.Identity()


def initial_gain(name: Activation, *, negative_slope: float = 0.01) -> float:
    """What the standard deviation of the weights is multiplied with so that the signal keeps its spread.

    Source:
        He et al., Delving Deep into Rectifiers, ICCV 2015, equations 10 and 15, for the rectifiers (ELU counts as
        ReLU); torch.nn.init.calculate_gain for the others.
    """
    match name:
        case "relu" | "elu":
            return nn.init.calculate_gain("relu")
        case "leaky_relu":
            return nn.init.calculate_gain("leaky_relu", negative_slope)
        case "prelu":
            return nn.init.calculate_gain("leaky_relu", PRELU_START)
        case "sigmoid" | "tanh" | "linear":
            return nn.init.calculate_gain(name)
