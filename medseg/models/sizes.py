"""Sizes of images that networks with padding take: multiples of the product of their strides."""

from __future__ import annotations

import math

from medseg.errors import Code, MedsegError


def check_multiples(size: tuple[int, ...], divisor: tuple[int, ...], *, fewest_voxels: int = 1) -> None:
    """Refuse a size that a network cannot take.

    Args:
        size: voxels along each axis of the image.
        divisor: what they must be multiples of.
        fewest_voxels: that the smallest map must have: 2 where batch or instance normalisation follows, which has no
            variance of a single voxel.
    Raises:
        MedsegError: E_MODEL; names the nearest sizes that fit.
    """
    if len(size) != len(divisor):
        raise MedsegError(
            Code.MODEL,
            "the image has another number of axes than the model",
            expected=f"{len(divisor)} spatial axes",
            got=size,
        )
    if any(n % d or n < d for n, d in zip(size, divisor, strict=True)):
        nearest = [
            str(n) if n % d == 0 and n else " or ".join(str(m) for m in (n // d * d, (n // d + 1) * d) if m)
            for n, d in zip(size, divisor, strict=True)
        ]
        raise MedsegError(
            Code.MODEL,
            "the model cannot take images of this size",
            expected=f"multiples of {divisor} voxels along the axes",
            got=size,
            remedy="the nearest that fit, axis by axis: " + "; ".join(nearest),
        )
    if math.prod(n // d for n, d in zip(size, divisor, strict=True)) < fewest_voxels:
        raise MedsegError(
            Code.MODEL,
            "the maps shrink to a single voxel, which cannot be normalised",
            expected="at least two voxels at the lowest resolution",
            got=size,
            remedy=f"enlarge at least one axis, to {[2 * d for d in divisor]}",
        )
