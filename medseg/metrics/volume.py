"""Volumes and their errors, in ml (numbers of pixels for pictures). They do not rank: see `medseg.metrics`."""

from __future__ import annotations

import math

from medseg.metrics.masks import ClassMasks
from medseg.metrics.metric import metric


@metric("reference_volume", title="Volume", better=None, dimension="volume")
def reference_volume(masks: ClassMasks) -> float:
    """Volume of the reference."""
    return masks.num_reference * masks.voxel_volume


@metric("predicted_volume", title="Predicted", better=None, dimension="volume")
def predicted_volume(masks: ClassMasks) -> float:
    """Volume of the prediction."""
    return masks.num_predicted * masks.voxel_volume


@metric("volume_error", title="ΔV", better=None, dimension="volume")
def volume_error(masks: ClassMasks) -> float:
    """Predicted minus reference volume; its mean is the bias."""
    return (masks.num_predicted - masks.num_reference) * masks.voxel_volume


@metric("absolute_volume_error", title="|ΔV|", better=None, dimension="volume")
def absolute_volume_error(masks: ClassMasks) -> float:
    """|Predicted minus reference volume|."""
    return abs(masks.num_predicted - masks.num_reference) * masks.voxel_volume


@metric("relative_volume_error", title="ΔV/V", better=None, dimension="ratio")
def relative_volume_error(masks: ClassMasks) -> float:
    """(Predicted minus reference volume) / reference volume; NaN for a spurious structure."""
    if not masks.num_reference:
        return math.nan
    return (masks.num_predicted - masks.num_reference) / masks.num_reference
