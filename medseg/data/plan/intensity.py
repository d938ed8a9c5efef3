"""What is done to intensities: cutting off borders of zeros, and the normalisation of each channel."""

from __future__ import annotations

import math

import numpy as np

from medseg.data.facts import Survey
from medseg.data.plan.schema import Normalisation, PlanConfig
from medseg.errors import Code, MedsegError

CROPPED = 0.95
"""Borders of zeros are cut off where the median case keeps less than this share of its voxels."""
MASKED = 0.75
"""A z-score counts nonzero voxels only where the median case keeps less than this share (nnU-Net's rule)."""
RGB = "rgb_to_0_1"
BY_CHANNEL_NAME: dict[str, Normalisation] = {
    "ct": "ct", "nonorm": "none", "zscore": "z-score", "rescale_to_0_1": "rescale", RGB: "ct",
}  # fmt: skip
"""What nnU-Net's names of channels ask for."""
RGB_INTENSITY = (0.0, 255.0, 0.0, 255.0)
"""Low and high clip, mean and deviation that map 0-255 to 0-1."""
WHY: dict[Normalisation, str] = {
    "ct": "CT values mean the same in every scan: clip to the 0.5-99.5 percentiles of the foreground, one z-score for "
    "all",
    "z-score": "intensities have no unit: each image gets its own z-score",
    "rescale": "the channel's name asks for 0 to 1",
    "none": "the channel's name asks for none",
}

Intensity = tuple[tuple[float, float, float, float], ...]


def plan_normalisation(
    survey: Survey, config: PlanConfig, reasons: dict[str, str]
) -> tuple[tuple[Normalisation, ...], Intensity]:
    """How the intensities of each channel are normalised, and the numbers of the training set for it."""
    names = [name.casefold() for name in survey.channel_names]
    default: Normalisation = "ct" if survey.modality == "CT" else "z-score"
    schemes = tuple(BY_CHANNEL_NAME.get(name, default) for name in names)
    intensity = tuple((c.p00_5, c.p99_5, c.mean, max(c.std, 1e-8)) for c in survey.intensity)
    reasons["normalisation"] = "; ".join(dict.fromkeys(WHY[scheme] for scheme in schemes))
    reasons["intensity"] = (
        "percentiles 0.5 and 99.5, mean and deviation of the training cases' foreground, for each channel"
    )
    if RGB in names:
        intensity = tuple(RGB_INTENSITY if n == RGB else i for n, i in zip(names, intensity, strict=True))
        reasons["normalisation"] = f"the channels' names ask for 0-255 to become 0-1 ({RGB})"
    if config.normalisation is not None:
        given = config.normalisation
        schemes = (given,) * len(names) if isinstance(given, str) else given
        reasons["normalisation"] = "set by data.plan.normalisation"
        if len(schemes) != len(names):
            raise MedsegError(
                Code.CONFIG,
                f"the images have {len(names)} channel(s)",
                where="data.plan.normalisation",
                expected=f"one name for all, or {len(names)}",
                got=given,
            )
    if "ct" not in schemes:
        reasons["intensity"] += "; only the normalisation ct uses them"
    return schemes, intensity


def plan_crop(
    survey: Survey, config: PlanConfig, schemes: tuple[Normalisation, ...], reasons: dict[str, str]
) -> tuple[bool, bool]:
    """Whether borders of zeros are cut off, and whether a z-score counts the voxels that are not 0 only."""
    kept = float(np.median([math.prod(case.nonzero_shape) / math.prod(case.shape) for case in survey.cases]))
    is_ct = survey.modality == "CT" or {name.casefold() for name in survey.channel_names} == {"ct"}
    what = f"borders of zeros are {1 - kept:.0%} of the median case"
    if config.preset != "auto":
        crop, reasons["crop"] = True, f"{what}; nnU-Net always cuts them off"
    elif is_ct:
        crop, reasons["crop"] = False, f"{what}; 0 is water in CT, not emptiness"
    else:
        crop = kept < CROPPED
        reasons["crop"] = what if crop else f"{what}: too little to cut off"
    masked = kept < MASKED and "z-score" in schemes
    reasons["mask_normalisation"] = (
        f"{what}: {'more' if masked else 'not more'} than {1 - MASKED:.0%} (nnU-Net's rule)"
        if "z-score" in schemes
        else "no channel has a z-score of its own"
    )
    if config.crop is not None:
        crop, reasons["crop"] = config.crop, "set by data.plan.crop"
    if config.mask_normalisation is not None:
        masked, reasons["mask_normalisation"] = config.mask_normalisation, "set by data.plan.mask_normalisation"
    return crop, masked
