"""Lesion-wise detection: of so many lesions how many were found, and how many finds are none.

A lesion is a connected component (voxels that share a face, an edge or a corner), or, of files that number them, an
instance (`medseg evaluate --instances`). **Matching:** a lesion of the
reference is found if at least one of its voxels is predicted; a predicted lesion is a false positive if none of its
voxels is in the reference. One predicted lesion may find several. How well a lesion is outlined is not asked: read
Dice beside it.

Source: the rule and the F1 score of the ISLES 2022 challenge (Hernandez Petzsche et al., ISLES 2022: a multi-center
magnetic resonance imaging stroke lesion segmentation dataset, Scientific Data 2022), as the lesion-wise true positive
rate of Carass et al., Longitudinal multiple sclerosis lesion segmentation, NeuroImage 2017.
"""

from __future__ import annotations

import math

import numpy as np

from medseg.metrics.components import instances_of
from medseg.metrics.masks import ClassMasks, InstanceMap, Mask
from medseg.metrics.metric import metric


@metric("lesion_sensitivity", title="L-Sens", better="higher", dimension="ratio", default=False)
def lesion_sensitivity(masks: ClassMasks) -> float:
    """Share of the reference's lesions that were found; 0 for a missed structure, NaN for a spurious one.

    A lesion is a connected component (26 neighbours, 8 in 2D); it is found if at least one of its voxels is predicted.

    Source:
        Carass et al., Longitudinal multiple sclerosis lesion segmentation, NeuroImage 2017 (LTPR).
    """
    found, total = touched(instances_of(masks)[1], masks.predicted)
    return found / total if total else math.nan


@metric("lesion_f1", title="L-F1", better="higher", dimension="ratio", default=False)
def lesion_f1(masks: ClassMasks) -> float:
    """TP / (TP + (FP + FN) / 2) over lesions; 0 for a missed or spurious structure.

    TP: lesions of the reference with a predicted voxel; FN: those without; FP: predicted lesions without a voxel of the
    reference.

    Source:
        Hernandez Petzsche et al., ISLES 2022, Scientific Data 2022.
    """
    ours, theirs = instances_of(masks)
    found, total = touched(theirs, masks.predicted)
    right, predicted = touched(ours, masks.reference)
    return 2 * found / (found + total + predicted - right)


@metric("false_positive_lesions", title="L-FP", better=None, dimension="count", default=False)
def false_positive_lesions(masks: ClassMasks) -> float:
    """Number of predicted lesions without a voxel of the reference.

    Predicting nothing has none: it does not rank, read it beside the sensitivity. Cases in which the structure is in
    neither mask are left out of its mean, as of all means.
    """
    right, total = touched(instances_of(masks)[0], masks.reference)
    return total - right


@metric("reference_lesions", title="Lesions", better=None, dimension="count", default=False)
def reference_lesions(masks: ClassMasks) -> float:
    """Number of lesions in the reference."""
    return _number_of(instances_of(masks)[1])


def touched(lesions: InstanceMap, other: Mask) -> tuple[int, int]:
    """How many lesions of a map have a voxel in a mask, and how many there are."""
    return _number_of(lesions[other]), _number_of(lesions)


def _number_of(lesions: InstanceMap) -> int:
    return np.unique(lesions[lesions != 0]).size
