"""clDice: whether tubes (vessels, airways, nerves) are found along their centre lines."""

from __future__ import annotations

import numpy as np

from medseg.metrics.masks import ClassMasks, Mask, State
from medseg.metrics.metric import metric


@metric("cldice", title="clDice", better="higher", dimension="ratio", default=False)
def cldice(masks: ClassMasks) -> float:
    """Centre-line Dice: the harmonic mean of topology precision and sensitivity.

    The precision is the share of the prediction's centre line that lies in the reference, the sensitivity the share of
    the reference's centre line that lies in the prediction; voxels count once, whatever their size. 0 for a missed or
    spurious structure.

    Source:
        Shit et al., clDice – a novel topology-preserving loss function for tubular structure segmentation, CVPR 2021,
        equations 1 and 2. Skeletons by scikit-image: Zhang and Suen 1984 in 2D, Lee et al. 1994 in 3D.
    """
    if masks.state is not State.PRESENT:
        return 0.0
    precision = float(masks.reference[skeleton(masks.predicted)].mean())
    sensitivity = float(masks.predicted[skeleton(masks.reference)].mean())
    total = precision + sensitivity
    return 2 * precision * sensitivity / total if total else 0.0


def skeleton(mask: Mask) -> Mask:
    """The centre line of a mask: one voxel wide, and connected where the mask is.

    Args:
        mask: bool, 1 to 3 axes, at least one voxel set.
    """
    from skimage.morphology import skeletonize  # half a second to import, needed by few

    line: Mask = np.asarray(skeletonize(np.atleast_2d(mask)), dtype=bool).reshape(mask.shape)
    # Thinning may remove a component of a few voxels whole; what is its own centre line then is all of it.
    return line if line.any() else mask
