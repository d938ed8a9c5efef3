"""Receptive fields along one axis, exactly: which voxels of the image a voxel of a map depends on.

A convolution with filters of F voxels sees an interval; so does what is computed from it. Up-sampling makes the
interval depend on where a voxel lies between the coarser ones: the first voxel of a pair sees others than the second.
So a map's intervals are kept for one period of them, and repeat from there on, in an image without borders.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction


@dataclass(frozen=True)
class Reach:
    """Voxel o of a map depends on the voxels low(o) … high(o) of the image, along one axis.

    Both repeat: low(o + period) = low(o) + advance, where the period is the length of `lows`. Normalisations are not
    counted: their mean and deviation are of the whole image, but hardly depend on one voxel.

    Args:
        lows: low(0), low(1), …
        highs: high(0), high(1), …
        advance: voxels of the image in one period.
        whole: besides this interval it depends on the whole image, or on what is not known: of maps that were weighted
            with their mean over the image, for example.

    Source:
        Araujo, Norris, Sim: Computing Receptive Fields of Convolutional Neural Networks, Distill 2019, equations for
        chains and for graphs with branches; extended to up-sampling by the period.
    """

    lows: tuple[int, ...] = (0,)
    highs: tuple[int, ...] = (0,)
    advance: int = 1
    whole: bool = False

    @property
    def size(self) -> int | None:
        """Voxels of the image that a voxel of the map depends on, at most; None: on all of them, or not known."""
        if self.whole:
            return None
        return max(high - low + 1 for low, high in zip(self.lows, self.highs, strict=True))

    @property
    def jump(self) -> Fraction:
        """Voxels of the image from one voxel of the map to the next; 1/2 on a map of twice the resolution."""
        return Fraction(self.advance, len(self.lows))

    def low(self, o: int) -> int:
        """First voxel of the image that voxel o depends on; negative beyond the border."""
        return self.lows[o % len(self.lows)] + self.advance * (o // len(self.lows))

    def high(self, o: int) -> int:
        """Last voxel of the image that voxel o depends on."""
        return self.highs[o % len(self.highs)] + self.advance * (o // len(self.highs))

    def windowed(self, size: int, *, stride: int = 1, padding: int = 0) -> Reach:
        """After a convolution or pooling: voxel o depends on the voxels o·S − P … o·S − P + F − 1.

        Args:
            size: F, with the gaps of a dilated filter.
            stride: S.
            padding: P, of the side where the axis begins; negative where it is cut off.
        """
        period = math.lcm(len(self.lows), stride) // stride
        return self._of(period, period * stride, lambda o: (o * stride - padding, o * stride - padding + size - 1))

    def transposed(self, size: int, *, stride: int = 1, padding: int = 0) -> Reach:
        """After a transposed convolution: voxel i is written to i·S − P … i·S − P + F − 1.

        Args:
            size: F, with the gaps of a dilated filter.
            stride: S.
            padding: P.
        """

        def window(o: int) -> tuple[int, int]:
            first, last = -((size - 1 - o - padding) // stride), (o + padding) // stride
            return min(first, last), last  # F < S leaves gaps, which depend on nothing

        period = len(self.lows) * stride
        return self._of(period, len(self.lows), window)

    def interpolated(self, factor: int, *, linear: bool, corners: bool = False) -> Reach:
        """After up-sampling.

        Args:
            factor: voxels for each one before.
            linear: between two voxels; otherwise the nearest one is taken.
            corners: the corners' centres stay where they are (align_corners). The place between two voxels then depends
                on the length of the axis; the interval covers all of them.
        """

        def window(o: int) -> tuple[int, int]:
            if not linear:
                return o // factor, o // factor
            if corners:
                return o // factor - 1, o // factor + 1
            place = Fraction(2 * o + 1, 2 * factor) - Fraction(1, 2)
            return math.floor(place), math.ceil(place)

        return self._of(len(self.lows) * factor, len(self.lows), window)

    def merged(self, other: Reach) -> Reach | None:
        """After two maps were added or stacked; None where one of them is coarser, which no such layer is."""
        if self.jump != other.jump:
            return None
        period = math.lcm(len(self.lows), len(other.lows))
        places = range(period)
        return Reach(
            tuple(min(self.low(o), other.low(o)) for o in places),
            tuple(max(self.high(o), other.high(o)) for o in places),
            int(period * self.jump),
            self.whole or other.whole,
        )

    def everywhere(self) -> Reach:
        """The same grid of voxels, each of which depends on the whole image too."""
        return replace(self, whole=True)

    def _of(self, period: int, steps: int, window: Callable[[int], tuple[int, int]]) -> Reach:
        """The reach of a map whose voxel o depends on an interval of this map's voxels.

        Args:
            period: of the new map.
            steps: voxels of this map in it.
            window: o → first and last voxel.
        """
        windows = [window(o) for o in range(period)]
        advance = int(steps * self.jump)
        lows, highs = (tuple(self.low(a) for a, _ in windows), tuple(self.high(b) for _, b in windows))
        return Reach(lows, highs, advance, self.whole)
