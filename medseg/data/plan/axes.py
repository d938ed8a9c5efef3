"""Which way the network's axes run, and what the cases are along them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from medseg.data.facts import AXIS_PAIRS, Survey, axis_of
from medseg.data.nnunet_plan import FloatArray, coarsest_first, resampled_median, target_spacing
from medseg.data.plan.schema import PlanConfig
from medseg.errors import Code, MedsegError
from medseg.volume import MODEL_ORIENTATION


@dataclass(frozen=True, eq=False)
class Seen:
    """The training cases along the network's axes."""

    orientation: str
    """Of these axes; "" for pictures."""
    spacing_mm: FloatArray
    """That full resolution has."""
    median: FloatArray
    """Median shape there, without borders of zeros where the plan cuts them off."""
    num_cases: int


def see(survey: Survey, config: PlanConfig, *, crop: bool, slices: bool, reasons: dict[str, str]) -> Seen:
    """Choose orientation and target spacing.

    Args:
        survey: facts about the training cases.
        config: the user's overrides.
        crop: whether borders of zeros are cut off.
        slices: the plan is for single slices, which are stacked along the first axis.
        reasons: gets those of orientation and spacing_mm.
    Raises:
        MedsegError: E_CONFIG for letters that are no orientation, and for a spacing of pictures.
    """
    orientation = _orientation(survey, config, slices=slices, crop=crop, reasons=reasons)
    spacings, shapes = _along(survey, orientation, crop=crop)
    target = target_spacing(spacings, shapes)
    coarse = int(np.argmax(target))
    reasons["spacing_mm"] = "the median spacing of the training cases"
    if not np.isclose(target[coarse], np.median(spacings, axis=0)[coarse]):
        reasons["spacing_mm"] += f"; axis {coarse} is coarse and takes its 10th percentile"
    if not orientation:
        reasons["spacing_mm"] = "pictures are not resampled"
    if config.spacing_mm is not None:
        if not orientation and any(length != 1 for length in config.spacing_mm):
            raise MedsegError(
                Code.CONFIG,
                "pictures are not resampled: they have pixels, and no mm",
                where="data.plan.spacing_mm",
                expected="nothing, or 1 along each axis",
                got=config.spacing_mm,
                remedy="leave the key out, or scale the pictures beforehand",
            )
        target = np.array(config.spacing_mm, dtype=np.float64)
        reasons["spacing_mm"] = "set by data.plan.spacing_mm"
    return Seen(orientation, target, resampled_median(spacings, shapes, target), len(shapes))


def _orientation(survey: Survey, config: PlanConfig, *, slices: bool, crop: bool, reasons: dict[str, str]) -> str:
    if survey.spatial_dims == 2:
        reasons["orientation"] = "pictures have no orientation in a patient"
        if config.orientation:
            raise MedsegError(
                Code.CONFIG,
                "pictures have no orientation in a patient",
                where="data.plan.orientation",
                got=config.orientation,
            )
        return ""
    if config.orientation is not None:
        return _checked(config.orientation, reasons)
    usual = MODEL_ORIENTATION
    reasons["orientation"] = "medseg's axes run to the superior, posterior and left"
    if config.preset == "auto" and not slices:
        return usual
    if config.preset != "auto":
        # nnU-Net takes axes as files hold them, from the last to the first; where files differ, as most of them do.
        stored = Counter("".join(axis_of(x) for x in case.orientation[::-1]) for case in survey.cases)
        pairs = stored.most_common(1)[0][0]
        usual = "".join(next(x for x in MODEL_ORIENTATION if x in pairs[2 * i : 2 * i + 2]) for i in range(3))
        reasons["orientation"] = "the axes of most files, from the last to the first"
    spacings, shapes = _along(survey, usual, crop=crop)
    single = np.flatnonzero(np.median(shapes, axis=0) == 1)
    first = int(single[0]) if slices and len(single) else coarsest_first(target_spacing(spacings, shapes))[0]
    reasons["orientation"] += ", the coarsest one first" if not (slices and len(single)) else ", slices first"
    return usual[first] + usual[:first] + usual[first + 1 :]


def _checked(letters: str, reasons: dict[str, str]) -> str:
    letters = letters.upper()
    if sorted("".join(pair for pair in AXIS_PAIRS if letter in pair) for letter in letters) != sorted(AXIS_PAIRS):
        raise MedsegError(
            Code.CONFIG,
            "these letters are no orientation of three axes",
            where="data.plan.orientation",
            expected="where the three axes run to, such as SPL or RAS",
            got=letters,
        )
    reasons["orientation"] = "set by data.plan.orientation"
    return letters


def _along(survey: Survey, orientation: str, *, crop: bool) -> tuple[FloatArray, FloatArray]:
    """Spacings and shapes of all cases along the axes of an orientation, each (N, dims)."""
    spacings, shapes = [], []
    for case in survey.cases:
        shape = case.nonzero_shape if crop else case.shape
        axes = case.axes_along(orientation)
        spacings.append([case.spacing_mm[axis] for axis in axes])
        shapes.append([shape[axis] for axis in axes])
    return np.array(spacings, dtype=np.float64), np.array(shapes, dtype=np.float64)
