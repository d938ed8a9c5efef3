"""Where the slices of a stack lie: the affine of a regular one, and what makes a stack irregular.

Everything is in DICOM's patient frame (LPS, mm) but the affine, which is in `medseg.volume.WORLD_FRAME`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.header import Slice
from medseg.volume import SHEAR_TOLERANCE

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""DICOM's patient frame (+x Left, +y Posterior, +z Superior) → `medseg.volume.WORLD_FRAME`."""
COSINE_TOLERANCE = 0.01
"""Largest error of the length of a direction: cosines are written with few digits."""
SPACING_TOLERANCE = 0.01
"""Relative deviation of a slice distance from the usual one that is still called regular: positions are written with
few digits, and 0.1 % of jitter is common."""
DRIFT_TOLERANCE_STEPS = 0.1
"""Farthest that a slice may lie from its place in an even stack, in steps: small deviations of one sign add up."""
TILT_TOLERANCE_PIXELS = 0.5
"""Largest in-plane shift between slices over the whole stack, in pixels: less moves no pixel into its neighbour."""
RESAMPLE = "ask for resampling to a regular grid (--resample-irregular; in training data.resample_irregular=true)"

FloatArray = NDArray[np.float64]


def cosines(item: Slice) -> FloatArray:
    """(2, 3): along a row, down a column."""
    if item.orientation is None:  # refused by `stack.arrange`; said again for the type checker
        raise MedsegError(
            Code.NO_GEOMETRY,
            "a slice has no orientation",
            where=item.path.name,
            expected="ImageOrientationPatient",
            got="none",
            remedy="export the original series again",
        )
    return item.orientation


def slice_positions(stack: Sequence[Slice]) -> FloatArray:
    """(n, 3), mm."""
    return np.array([s.position for s in stack], dtype=np.float64)


def plane_normal(item: Slice) -> FloatArray:
    """Unit vector across the plane: along a row × down a column (PS3.3 C.7.6.2.1.1)."""
    along_row, down_column = cosines(item)
    normal: FloatArray = np.cross(along_row, down_column)
    lengths = np.linalg.norm([along_row, down_column, normal], axis=1)
    if np.abs(lengths - 1).max() > COSINE_TOLERANCE:
        raise MedsegError(
            Code.AFFINE,
            "the direction cosines are not two perpendicular directions of length 1",
            where=item.path.name,
            got=np.array2string(cosines(item), precision=4),
            remedy="export the original series",
        )
    return normal / float(lengths[2])


def slice_heights(stack: Sequence[Slice]) -> FloatArray:
    """Position of each slice along the normal, mm."""
    heights: FloatArray = slice_positions(stack) @ plane_normal(stack[0])
    return heights


def irregularity(stack: Sequence[Slice], name: str) -> MedsegError | None:
    """Gaps, uneven spacing, tilt; an uneven stack that is tilted as well is told both at once."""
    tilt = _tilt(stack)
    heights = slice_heights(stack)
    steps = np.diff(heights)
    if len(steps) > 1:
        usual = float(np.sort(steps)[(len(steps) - 1) // 2])  # the lower median: a gap must not become the usual step
        wrong = np.flatnonzero(np.abs(steps - usual) > SPACING_TOLERANCE * usual)
        also = f"; also a gantry tilt of {tilt[0]:.1f} degrees" if tilt else ""
        multiples = steps[wrong] / usual
        if len(wrong) and (np.rint(multiples) >= 2).all() and _whole(multiples):
            places = [
                f"{round(m) - 1} between {heights[i]:.3f} and {heights[i + 1]:.3f} mm"
                for i, m in zip(wrong, multiples, strict=True)
            ]
            return MedsegError(
                Code.GAP,
                "slices are missing within the series",
                where=name,
                expected=f"a slice every {usual:.4g} mm",
                got="missing " + ", ".join(places[:5]) + also,
                remedy=f"export the whole series again, or {RESAMPLE}",
            )
        even = np.linspace(heights[0], heights[-1], len(heights))
        if len(wrong) or np.abs(heights - even).max() > DRIFT_TOLERANCE_STEPS * usual:
            return MedsegError(
                Code.SPACING,
                "the distance between slices varies",
                where=name,
                expected=f"{usual:.4g} mm everywhere, within {SPACING_TOLERANCE:.0%}, and no slice further than "
                f"{DRIFT_TOLERANCE_STEPS:g} of that from its place in an even stack",
                got=f"{steps.min():.4g} to {steps.max():.4g} mm" + also,
                remedy=f"{RESAMPLE}, or export another reconstruction",
            )
    if tilt:
        return MedsegError(
            Code.TILT,
            "the slices are shifted against each other: the gantry was tilted",
            where=name,
            expected=f"a shift of at most {TILT_TOLERANCE_PIXELS} pixels over the whole series",
            got=f"{tilt[0]:.2f} degrees, a shift of {tilt[1]:.2f} mm",
            remedy=RESAMPLE,
        )
    return None


def _whole(multiples: FloatArray) -> bool:
    """True if each is a whole number within the tolerance of as many regular steps."""
    return bool((np.abs(multiples - np.rint(multiples)) <= SPACING_TOLERANCE * multiples).all())


def _tilt(stack: Sequence[Slice]) -> tuple[float, float] | None:
    """(angle in degrees, shift in mm) of the slice most shifted in-plane against the first, None within tolerance."""
    offsets = slice_positions(stack) - slice_positions(stack[:1])
    heights = offsets @ plane_normal(stack[0])
    shifts = np.linalg.norm(offsets - np.outer(heights, plane_normal(stack[0])), axis=1)
    worst = int(shifts.argmax())
    if shifts[worst] <= TILT_TOLERANCE_PIXELS * min(stack[0].pixel_spacing_mm or (1.0,)):
        return None
    return math.degrees(math.atan2(float(shifts[worst]), float(heights[worst]))), float(shifts[worst])


def stack_affine(stack: Sequence[Slice], name: str, notes: list[str]) -> FloatArray:
    """Indices (i along a row, j down a column, k across slices) → RAS+ mm.

    Source: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1, with the third column from the first to the last position.
    PixelSpacing is (between rows, between columns), so its second number belongs to i.
    """
    first = stack[0]
    along_row, down_column = cosines(first)
    between_rows, between_columns = first.pixel_spacing_mm or (math.nan, math.nan)
    affine = np.eye(4)
    affine[:3, 0] = along_row * between_columns
    affine[:3, 1] = down_column * between_rows
    affine[:3, 2] = _step(stack, name, notes)
    affine[:3, 3] = slice_positions(stack)[0]
    return LPS_TO_RAS @ affine


def _step(stack: Sequence[Slice], name: str, notes: list[str]) -> FloatArray:
    """The vector from one slice to the next, LPS mm."""
    normal = plane_normal(stack[0])
    if len(stack) == 1:
        distance = stack[0].step_mm or stack[0].thickness_mm or 0.0
        if distance <= 0:
            raise MedsegError(
                Code.NO_GEOMETRY,
                "a single slice without a thickness",
                where=name,
                expected="SpacingBetweenSlices or SliceThickness",
                remedy="export the whole series",
            )
        notes.append(f"a single slice; its thickness of {distance:g} mm is taken as spacing")
        return normal * distance
    positions = slice_positions(stack)
    step: FloatArray = (positions[-1] - positions[0]) / (len(stack) - 1)
    if len(stack) == 2:
        notes.append(f"only two slices; whether one is missing between them, {np.linalg.norm(step):g} mm, is not known")
    sideways = np.abs(cosines(stack[0]) @ step).max() / np.linalg.norm(step)
    if sideways > SHEAR_TOLERANCE:
        # less than TILT_TOLERANCE_PIXELS over the whole stack, or it had been found irregular
        notes.append("slices are shifted by less than half a pixel; the shift is ignored")
        step = normal * float(step @ normal)
    return step
