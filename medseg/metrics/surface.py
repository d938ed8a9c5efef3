"""Metrics between the surfaces of two masks, in mm; `surface_distances` says what a surface is.

Where one of the masks is empty, distances are the diagonal of the case (see `medseg.metrics`).
"""

from __future__ import annotations

import numpy as np

from medseg.metrics.masks import ROUNDING_MM, ClassMasks, State
from medseg.metrics.metric import metric

PERCENTILE = 95.0


@metric("hd", title="HD", better="lower", dimension="length")
def hausdorff_distance(masks: ClassMasks) -> float:
    """Hausdorff distance, in mm: the largest of all distances. One stray voxel decides it; HD95 is more robust.

    Source:
        Huttenlocher et al., Comparing images using the Hausdorff distance, IEEE TPAMI 1993.
    """
    if masks.state is not State.PRESENT:
        return masks.diagonal_mm
    return float(max(distances.max() for distances in masks.surface_distances))


@metric("hd95", title="HD95", better="lower", dimension="length")
def hd95(masks: ClassMasks) -> float:
    """95th-percentile Hausdorff distance, in mm.

    The larger of the two directed 95th percentiles (interpolated linearly between the nearest ranks), as in MONAI;
    other tools take the percentile over both directions together, which gives smaller values.

    Source:
        Huttenlocher et al., Comparing images using the Hausdorff distance, IEEE TPAMI 1993; Maier-Hein, Reinke et al.,
        Metrics reloaded, Nature Methods 2024 (HD95).
    """
    if masks.state is not State.PRESENT:
        return masks.diagonal_mm
    return float(max(np.percentile(distances, PERCENTILE) for distances in masks.surface_distances))


@metric("asd", title="ASD", better="lower", dimension="length")
def average_surface_distance(masks: ClassMasks) -> float:
    """Average symmetric surface distance, in mm: the mean over the surface voxels of both masks together.

    Source:
        Heimann et al., Comparison and evaluation of methods for liver segmentation from CT datasets, IEEE TMI 2009
        (ASSD).
    """
    if masks.state is not State.PRESENT:
        return masks.diagonal_mm
    return float(np.concatenate(masks.surface_distances).mean())


@metric("surface_dice", title="NSD", better="higher", dimension="ratio")
def surface_dice(masks: ClassMasks) -> float:
    """Normalized surface Dice: the share of both surfaces that lies within the tolerance of the other one.

    Source:
        Nikolov et al., Clinically applicable segmentation of head and neck anatomy for radiotherapy, JMIR 2021. It
        weighs surface elements by their area; here each surface voxel counts once, as in MONAI and in Seidlitz et
        al., Robust deep learning-based semantic organ segmentation in hyperspectral images, MedIA 2022.
    """
    if masks.state is not State.PRESENT:
        return 0.0
    return float((np.concatenate(masks.surface_distances) <= masks.tolerance_mm + ROUNDING_MM).mean())
