"""Metrics that count voxels: TP in both masks, FP predicted only, FN in the reference only, TN in neither.

Source: Taha and Hanbury, Metrics for evaluating 3D medical image segmentation, BMC Medical Imaging 2015, section 3.1;
Maier-Hein, Reinke et al., Metrics reloaded, Nature Methods 2024.
"""

from __future__ import annotations

import math

from medseg.metrics.masks import ClassMasks
from medseg.metrics.metric import metric


@metric("dice", title="Dice", better="higher", dimension="ratio")
def dice(masks: ClassMasks) -> float:
    """2 TP / (2 TP + FP + FN)."""
    return 2 * masks.tp / (2 * masks.tp + masks.fp + masks.fn)


@metric("iou", title="IoU", better="higher", dimension="ratio")
def iou(masks: ClassMasks) -> float:
    """Intersection over union (Jaccard index): TP / (TP + FP + FN)."""
    return masks.tp / (masks.tp + masks.fp + masks.fn)


@metric("sensitivity", title="Sens", better="higher", dimension="ratio")
def sensitivity(masks: ClassMasks) -> float:
    """Recall: TP / (TP + FN). NaN for a spurious structure, which has nothing to find."""
    return masks.tp / masks.num_reference if masks.num_reference else math.nan


@metric("precision", title="Prec", better="higher", dimension="ratio")
def precision(masks: ClassMasks) -> float:
    """Positive predictive value: TP / (TP + FP). 0 for a missed structure."""
    return masks.tp / masks.num_predicted if masks.num_predicted else 0.0


@metric("specificity", title="Spec", better=None, dimension="ratio")
def specificity(masks: ClassMasks) -> float:
    """TN / (TN + FP); NaN if the reference fills the whole case.

    Near 1 for any small structure, and exactly 1 where nothing is predicted: it depends on the field of view and does
    not rank predictions.
    """
    negatives = masks.tn + masks.fp
    return masks.tn / negatives if negatives else math.nan
