"""Boundary IoU: the overlap of the rims of two masks, which large structures cannot hide in their bulk."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from medseg.metrics.masks import ROUNDING_MM, ClassMasks, Mask, State
from medseg.metrics.metric import metric

WIDTH_SHARE = 0.02
"""Width of a rim as a share of the diagonal of the case: the paper's choice for pictures."""


@metric("boundary_iou", title="BIoU", better="higher", dimension="ratio", default=False)
def boundary_iou(masks: ClassMasks) -> float:
    """Intersection over union of the two rims; 0 for a missed or spurious structure.

    A rim is what of a mask lies within d of a voxel outside of it (between voxel centres; outside of the case is
    outside of the mask), with d = 2 % of the diagonal of the case in mm, at least the largest voxel size.

    Source:
        Cheng et al., Boundary IoU: improving object-centric image segmentation evaluation, CVPR 2021, equation 2.
        There d is counted in pixels by steps of a 3 × 3 erosion; here it is Euclidean and in mm, so that it means the
        same along all axes of a volume.
    """
    if masks.state is not State.PRESENT:
        return 0.0
    width_mm = max(WIDTH_SHARE * masks.diagonal_mm, *masks.spacing_mm)
    rims = [rim(mask, masks.spacing_mm, width_mm) for mask in (masks.predicted, masks.reference)]
    return float(np.count_nonzero(rims[0] & rims[1]) / np.count_nonzero(rims[0] | rims[1]))


def rim(mask: Mask, spacing_mm: tuple[float, ...], width_mm: float) -> Mask:
    """The voxels of a mask within a distance of what is outside of it.

    Args:
        mask: bool, any number of axes.
        spacing_mm: voxel size along the axes.
        width_mm: distance between voxel centres that still belongs to the rim.
    """
    depth_mm = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=spacing_mm)
    inner = depth_mm[(slice(1, -1),) * mask.ndim]
    near: Mask = mask & (inner <= width_mm + ROUNDING_MM)
    return near
