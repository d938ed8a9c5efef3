"""The one table from the number of spatial axes to the layer classes of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from medseg.errors import Code, MedsegError

PerAxis = int | tuple[int, ...]
"""One number for all axes, or one per axis in the order of the array."""


@dataclass(frozen=True)
class Layers:
    """The layer classes for one number of spatial axes."""

    convolution: Callable[..., nn.Module]
    transposed_convolution: Callable[..., nn.Module]
    max_pool: Callable[..., nn.Module]
    max_unpool: Callable[..., nn.Module]
    average_pool: Callable[..., nn.Module]
    batch_norm: Callable[..., nn.Module]
    linear_interpolation: str


_LAYERS = {
    2: Layers(nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.MaxUnpool2d, nn.AvgPool2d, nn.BatchNorm2d, "bilinear"),
    3: Layers(nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.MaxUnpool3d, nn.AvgPool3d, nn.BatchNorm3d, "trilinear"),
}


def layers(spatial_dims: int) -> Layers:
    """The layer classes for images with `spatial_dims` axes.

    Raises:
        MedsegError: E_MODEL for anything but 2 and 3.
    """
    if spatial_dims not in _LAYERS:
        raise MedsegError(
            Code.MODEL, "networks are built for images or volumes", expected="spatial_dims 2 or 3", got=spatial_dims
        )
    return _LAYERS[spatial_dims]


def per_axis(value: PerAxis, spatial_dims: int, *, where: str, at_least: int = 1) -> tuple[int, ...]:
    """One number for each axis.

    Args:
        value: one number for all axes, or a number per axis.
        spatial_dims: number of axes.
        where: what the number is, for the message ("kernel", "model.strides").
        at_least: the smallest number allowed.
    Raises:
        MedsegError: E_CONFIG if the numbers are not one per axis, or too small.
    """
    values = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(values) != spatial_dims or min(values) < at_least:
        raise MedsegError(
            Code.CONFIG,
            f"{where} does not fit images with {spatial_dims} axes",
            where=where,
            expected=f"a number of at least {at_least}, or {spatial_dims} of them",
            got=value,
        )
    return values
