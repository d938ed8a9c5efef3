"""Panoptic quality: whether instances (nuclei, lesions, nodules) are found one by one, and how well each is outlined.

`panoptic_quality` takes maps of instances. The metrics `pq`, `sq` and `rq` take the connected components of a class
(26 neighbours, 8 in 2D) for its instances, where instances that touch each other are one; or, of files that number
them, those (`medseg evaluate --instances`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from medseg.metrics.components import Overlaps, instances_of
from medseg.metrics.masks import ClassMasks, InstanceMap
from medseg.metrics.metric import metric

MATCH_IOU = 0.5
"""Two instances match if their IoU is larger; above one half no instance can match two."""


@dataclass(frozen=True)
class PanopticQuality:
    """How instances agree.

    Args:
        tp: number of pairs that match.
        fp: number of predicted instances without a match.
        fn: number of the reference's instances without a match.
        iou_sum: sum of the IoU of the pairs that match.
    """

    tp: int
    fp: int
    fn: int
    iou_sum: float

    @property
    def rq(self) -> float:
        """Recognition quality, the F1 score of instances: TP / (TP + FP / 2 + FN / 2); NaN without any instance."""
        total = self.tp + (self.fp + self.fn) / 2
        return self.tp / total if total else math.nan

    @property
    def sq(self) -> float:
        """Segmentation quality: mean IoU of the matched pairs; 0 without a match, NaN without any instance."""
        if not self.tp + self.fp + self.fn:
            return math.nan
        return self.iou_sum / self.tp if self.tp else 0.0

    @property
    def pq(self) -> float:
        """Panoptic quality: SQ × RQ."""
        return self.sq * self.rq


def panoptic_quality(predicted: InstanceMap, reference: InstanceMap) -> PanopticQuality:
    """Compare two maps of instances.

    Args:
        predicted: integers, shape (*S): 0 is background, every other number one instance.
        reference: the same shape; the numbers need not be those of the prediction.
    Raises:
        MedsegError: E_GRID if the shapes differ, E_LABEL for numbers that are negative or not integers.
    Source:
        Kirillov et al., Panoptic segmentation, CVPR 2019, equations 1 and 2, for one class and without void regions.
    """
    overlaps = Overlaps.of(predicted, reference)
    sizes = overlaps.sizes("predicted"), overlaps.sizes("reference")
    ious = []
    for of_predicted, of_reference, shared in zip(
        overlaps.predicted.tolist(), overlaps.reference.tolist(), overlaps.voxels.tolist(), strict=True
    ):
        if of_predicted and of_reference:
            iou = shared / (sizes[0][of_predicted] + sizes[1][of_reference] - shared)
            if iou > MATCH_IOU:
                ious.append(iou)
    return PanopticQuality(len(ious), len(sizes[0]) - len(ious), len(sizes[1]) - len(ious), math.fsum(ious))


@metric("pq", title="PQ", better="higher", dimension="ratio", default=False)
def pq(masks: ClassMasks) -> float:
    """Panoptic quality of the class's instances: SQ × RQ; 0 for a missed or spurious structure.

    Instances are the connected components, or with --instances those that the files number.

    Source:
        Kirillov et al., Panoptic segmentation, CVPR 2019. Instances match if their IoU is above 0.5.
    """
    return _of_components(masks).pq


@metric("sq", title="SQ", better="higher", dimension="ratio", default=False)
def sq(masks: ClassMasks) -> float:
    """Segmentation quality: mean IoU of the matched instances; 0 where none matches (see `pq`)."""
    return _of_components(masks).sq


@metric("rq", title="RQ", better="higher", dimension="ratio", default=False)
def rq(masks: ClassMasks) -> float:
    """Recognition quality: TP / (TP + FP / 2 + FN / 2) over instances (see `pq`)."""
    return _of_components(masks).rq


def _of_components(masks: ClassMasks) -> PanopticQuality:
    return panoptic_quality(*instances_of(masks))
