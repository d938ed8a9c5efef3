"""Series that are no regular stack, resampled to one: gantry tilt, missing slices, uneven spacing.

The planes stay where they are: the new grid has their orientation, their pixel spacing and the pixel centres of the
first slice; its slices are evenly spaced along the normal, from the first measured slice to the last.

- **In-plane** each slice is moved by the part of its shift that is no whole pixel (cubic B-spline along one axis, then
  the other; a linear kernel would blur each slice differently) and laid on a canvas that holds all of them. No value
  leaves the range of its slice.
- **Through-plane** a new slice is interpolated linearly between the measured ones below and above. A measured slice
  that already lies at its height is taken as it is.
- **Spacing.** Where all steps are multiples of the usual one (a tilt alone, missing slices, jitter), the usual one
  stays. Else it is the step that no more than a tenth of all steps fall below: the smallest would follow a single
  overlap of two scans (1.08 mm in a head of 4 and 7 mm slices), the median would drop slices of a finely scanned part.
- **What nobody measured** - the corners of the canvas - gets the darkest value of the series, which is air in CT. Where
  only one of two neighbouring slices reaches, a voxel follows the nearer one: nothing is blended with that filling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import Code, MedsegError
from medseg.formats.limits import MAX_VOXELS

FloatArray = NDArray[np.float64]

MULTIPLE_TOLERANCE = 0.1
"""A step that deviates by less (in usual steps) from a whole number of usual steps counts as that number of them."""
FINE_SHARE = 0.1
"""Share of the steps of an uneven series that may be finer than the grid."""
MAX_SLICES_GROWTH = 4
"""Most new slices for each step between measured ones: a tenth of very fine steps must not blow up the rest."""
MAX_GROWTH = 16
"""Most voxels of the result for each voxel measured. A tilt of 45 degrees over a long stack doubles the canvas; slices
that need more do not belong to one stack."""
MAX_HOLE_MM = 30.0
"""Widest hole between two slices that is interpolated: two missing slices of a thick series. What lies in a wider one
(two parts of the body in one series) nobody can tell."""
SAME_PLACE = 0.01
"""Pixels in-plane, or slices through-plane, within which a measured slice is used without interpolation."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The regular grid for a series, from its headers alone."""

    shape: tuple[int, int, int]
    """(slices, rows, columns) of the result."""
    affine_lps: FloatArray
    """(4, 4): (i along a row, j down a column, k from slice to slice) of the result → LPS mm."""
    sources: FloatArray
    """For each new slice the index of the measured slice at its height; between two slices it is a fraction."""
    shifts: FloatArray
    """(measured slices, 2): where the first pixel of each lies on the canvas (down a column, along a row), pixels."""
    tilt_degrees: float
    """Angle of the slice most shifted in-plane against the normal; 0 where none is."""
    steps_mm: tuple[float, float]
    """Smallest and largest distance of measured slices."""

    @property
    def step_mm(self) -> float:
        """Distance of the slices of the result."""
        return float(np.linalg.norm(self.affine_lps[:3, 2]))

    @cached_property
    def note(self) -> str:
        """What is done to the series, for `Volume.notes`; "" where it is regular already."""
        parts = []
        if self.tilt_degrees:
            parts.append(f"gantry tilt of {self.tilt_degrees:.3g} degrees")
        interpolated = int(np.count_nonzero(self.sources != np.rint(self.sources)))
        if interpolated:
            low, high = self.steps_mm
            parts.append(f"slice spacing from {low:.4g} to {high:.4g} mm made {self.step_mm:.4g} mm")
            parts.append(f"{interpolated} of {len(self.sources)} slices interpolated")
        return "resampled: " + ", ".join(parts) if parts else ""


def plan_grid(
    matrix: tuple[int, int],
    positions: FloatArray,
    orientation: FloatArray,
    pixel_spacing: tuple[float, float],
    *,
    where: object = None,
) -> Plan:
    """The regular grid that holds a series; no pixel is needed.

    Args:
        matrix: (rows, columns) of each slice.
        positions: (slices, 3): centre of the first pixel of each slice, LPS mm, sorted along the normal.
        orientation: (2, 3): direction cosines along a row and down a column, LPS.
        pixel_spacing: distance between rows, then between columns, mm.
        where: what messages call the series.
    Raises:
        MedsegError: E_SPACING for fewer than two slices or several at one height; E_GAP for a hole wider than
            `MAX_HOLE_MM`; E_LIMIT for a result larger than `MAX_VOXELS` or `MAX_GROWTH` times the series.
    """
    rows, columns = matrix
    if len(positions) < 2:
        raise MedsegError(
            Code.SPACING,
            "a single slice has no spacing that could be made even",
            where=where,
            expected="at least two slices",
            got=f"{len(positions)}",
            remedy="export the whole series",
        )
    along_row, down_column = orientation
    normal = np.cross(along_row, down_column)
    normal /= np.linalg.norm(normal)
    # the world in units of pixels and of mm along the normal; cosines need not be perfectly perpendicular
    frame = np.stack([down_column * pixel_spacing[0], along_row * pixel_spacing[1], normal], axis=1)
    places = np.linalg.solve(frame, (positions - positions[0]).T).T
    shifts, heights = places[:, :2], places[:, 2]
    shifts[np.abs(shifts) < SAME_PLACE] = 0
    steps = np.diff(heights)
    _check_steps(steps, where)
    num_slices = _num_steps(steps) + 1
    first = np.floor(shifts + 0.5).min(axis=0)
    last = np.floor(shifts + 0.5).max(axis=0)
    height, width = (int(n) for n in last - first)
    shape = (num_slices, rows + height, columns + width)
    _check_growth(shape, len(positions) * rows * columns, where)

    affine = np.eye(4)
    affine[:3, 0] = frame[:, 1]
    affine[:3, 1] = frame[:, 0]
    affine[:3, 2] = normal * heights[-1] / (num_slices - 1)
    affine[:3, 3] = positions[0] + frame[:, :2] @ first
    offsets = np.linalg.norm(frame[:, :2] @ shifts.T, axis=0)
    worst = int(offsets.argmax())
    tilt = math.degrees(math.atan2(offsets[worst], heights[worst])) if offsets[worst] > 0 else 0.0
    return Plan(
        shape, affine, _sources(heights, num_slices), shifts - first, tilt, (float(steps.min()), float(steps.max()))
    )


def resampled(array: NDArray[np.float32], plan: Plan) -> NDArray[np.float32]:
    """A series on the grid that was planned for it.

    Args:
        array: float32 (slices, rows, columns), the slices in the order of the plan's positions.
        plan: of `plan_grid`.
    Returns:
        float32, shape `plan.shape`. Memory: the result and a few slices.
    """
    filling = array.min()
    result = np.empty(plan.shape, dtype=np.float32)
    laid: dict[int, tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
    for index, source in enumerate(plan.sources):
        low = math.floor(source)
        wanted = [low] if source == low else [low, low + 1]
        laid = {k: laid[k] if k in laid else _lay(array[k], plan.shifts[k], plan.shape[1:]) for k in wanted}
        if len(wanted) == 1:
            values, inside = laid[low]
            result[index] = np.where(inside, values, filling)
            continue
        share = np.float32(source - low)
        (below, has_below), (above, has_above) = laid[low], laid[low + 1]
        nearer, has_nearer = laid[low + (share >= 0.5)]
        between = np.where(has_below & has_above, below + share * (above - below), nearer)
        result[index] = np.where(has_nearer, between, filling)
    return result


def _check_steps(steps: FloatArray, where: object) -> None:
    if not (steps > 0).all():
        raise MedsegError(
            Code.SPACING,
            "two slices lie at one height",
            where=where,
            expected="slices at growing heights along the normal",
            got=f"a step of {steps.min():.4g} mm",
            remedy="split the series",
        )
    if steps.max() > MAX_HOLE_MM:
        raise MedsegError(
            Code.GAP,
            "a hole in the series is too wide to be interpolated",
            where=where,
            expected=f"slices at most {MAX_HOLE_MM:g} mm apart",
            got=f"{steps.max():.4g} mm",
            remedy="export the whole series, or each of its parts as a series of its own",
        )


def _check_growth(shape: tuple[int, ...], measured: int, where: object) -> None:
    voxels = math.prod(shape)
    if voxels > min(MAX_VOXELS, MAX_GROWTH * measured):
        raise MedsegError(
            Code.LIMIT,
            "the slices are shifted so far against each other that no sensible grid holds them",
            where=where,
            expected=f"at most {MAX_GROWTH} times the voxels measured, and at most {MAX_VOXELS}",
            got=f"{' × '.join(str(n) for n in shape)} (slices, rows, columns)",
            remedy="the positions are damaged, or the series mixes several stacks: split it",
        )


def _num_steps(steps: FloatArray) -> int:
    """Into how many even steps the stack is cut; why, says the module's docstring."""
    most = MAX_SLICES_GROWTH * len(steps)
    usual = np.sort(steps)[(len(steps) - 1) // 2]  # the lower median: a gap must not become the usual step
    multiples = steps / usual
    whole = np.rint(multiples)
    if whole.min() >= 1 and np.abs(multiples - whole).max() < MULTIPLE_TOLERANCE and whole.sum() <= most:
        return int(whole.sum())
    fine = float(np.sort(steps)[int(FINE_SHARE * len(steps))])
    return min(math.ceil(float(steps.sum()) / fine - SAME_PLACE), most)


def _sources(heights: FloatArray, num_slices: int) -> FloatArray:
    """Index of the measured slice at each even height, a fraction between two."""
    even = np.linspace(heights[0], heights[-1], num_slices)
    nearest = np.abs(even[:, None] - heights).argmin(axis=1)
    step = even[1] - even[0]
    there = np.abs(heights[nearest] - even) <= SAME_PLACE * step
    return np.where(there, nearest, np.interp(even, heights, np.arange(len(heights))))


def _lay(
    plane: NDArray[np.float32], shift: FloatArray, canvas: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A slice on the canvas, 0 around it; and where it lies there."""
    corner = np.floor(shift + 0.5).astype(int)
    moved = plane
    for axis, fraction in enumerate(shift - corner):
        if abs(fraction) > SAME_PLACE:
            moved = _nudged(moved, float(fraction), axis)
    if moved is not plane:
        moved = moved.clip(plane.min(), plane.max())  # splines overshoot at edges
    place = tuple(slice(c, c + n) for c, n in zip(corner, plane.shape, strict=True))
    values = np.zeros(canvas, dtype=np.float32)
    inside = np.zeros(canvas, dtype=np.bool_)
    values[place] = moved
    inside[place] = True
    return values, inside


def _nudged(plane: NDArray[np.float32], fraction: float, axis: int) -> NDArray[np.float32]:
    """Move a slice along an axis by -½ … ½ pixel to higher indices; mirrored at its edges.

    Source:
        Unser, Splines: a perfect fit for signal and image processing, IEEE Signal Processing Magazine 1999: the cubic
        B-spline. All pixels move alike, so it is one filter of four taps behind the usual prefilter.
    """
    coefficients = ndimage.spline_filter1d(plane, order=3, axis=axis, mode="mirror", output=np.float32)
    padded = np.moveaxis(np.pad(coefficients, [(2, 2) if a == axis else (0, 0) for a in (0, 1)], "reflect"), axis, 0)
    start = math.floor(-fraction)
    f = -fraction - start
    taps = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
    count = plane.shape[axis]
    moved = sum(np.float32(tap / 6) * padded[start + t + 1 :][:count] for t, tap in enumerate(taps))
    return np.moveaxis(np.asarray(moved, dtype=np.float32), 0, axis)
