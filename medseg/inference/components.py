"""Connected components of label maps.

Voxels that touch at a face, an edge or a corner are of one component (26 neighbours in 3D, 8 in 2D), as in nnU-Net,
which labels with scikit-image's full connectivity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Indices = NDArray[np.uint8]
Box = tuple[slice, ...]


def boxes_of(indices: Indices) -> Sequence[Box | None]:
    """The box of each class index, from 1 on, that a map holds; None for those that it does not."""
    boxes: Sequence[Box | None] = ndimage.find_objects(indices)
    return boxes


def outside_largest(
    indices: Indices, members: Sequence[int], boxes: Sequence[Box | None]
) -> tuple[Box, NDArray[np.bool_]] | None:
    """The voxels of some classes, taken together, outside their largest component. Of equal ones all are the largest.

    Args:
        indices: class indices, any number of axes.
        members: the classes.
        boxes: `boxes_of` the map, or of one that held more.
    Returns:
        A box and the voxels within it; None where there is one component or none.
    """
    found = [box for index in members if index <= len(boxes) and (box := boxes[index - 1]) is not None]
    if not found:
        return None
    box = tuple(slice(min(s.start for s in side), max(s.stop for s in side)) for side in zip(*found, strict=True))
    chosen = np.zeros(256, dtype=bool)
    chosen[list(members)] = True
    mask = indices[box] == members[0] if len(members) == 1 else chosen[indices[box]]
    components, number = ndimage.label(mask, structure=np.ones((3,) * indices.ndim, dtype=bool))
    if number < 2:
        return None
    sizes = np.bincount(components.ravel())
    smaller = sizes < sizes[1:].max()
    smaller[0] = False
    return (box, smaller[components]) if smaller.any() else None
