"""Connected components of masks, and how those of two maps overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from medseg.errors import Code, MedsegError
from medseg.metrics.masks import ClassMasks, InstanceMap, Mask


def components(mask: Mask, *, by_faces: bool = False) -> tuple[NDArray[np.int32], int]:
    """Number the connected components of a mask.

    Args:
        mask: bool, any number of axes.
        by_faces: voxels of one component share faces (4 neighbours in 2D, 6 in 3D); else faces, edges or corners
            (8 and 26 neighbours).
    Returns:
        int32 map of the same shape, 0 outside and 1, 2, … in the components; and their number.
    """
    neighbours = ndimage.generate_binary_structure(mask.ndim, 1 if by_faces else mask.ndim)
    numbered = np.empty(mask.shape, dtype=np.int32)
    return numbered, int(ndimage.label(mask, neighbours, output=numbered))


def instances_of(masks: ClassMasks) -> tuple[InstanceMap, InstanceMap]:
    """The instances of the prediction and of the reference: those that the files number, else connected components."""
    if masks.instances is not None:
        return masks.instances
    return components(masks.predicted)[0], components(masks.reference)[0]


@dataclass(frozen=True, eq=False)
class Overlaps:
    """The joint histogram of two maps of instances, without its zeros and without what is 0 in both.

    Args:
        predicted: instance of the prediction of each pair that shares voxels; 0 is no instance.
        reference: instance of the reference of each pair.
        voxels: number of voxels that they share.
    """

    predicted: NDArray[np.int64]
    reference: NDArray[np.int64]
    voxels: NDArray[np.int64]

    @classmethod
    def of(cls, predicted: InstanceMap, reference: InstanceMap) -> Overlaps:
        """Count; instances may have any numbers from 0 on.

        Raises:
            MedsegError: E_GRID if the shapes differ, E_LABEL for numbers that are negative or not integers.
        """
        if predicted.shape != reference.shape:
            raise MedsegError(
                Code.GRID,
                "the two maps of instances have other shapes",
                expected=f"both {reference.shape}",
                got=f"prediction {predicted.shape}",
            )
        for name, instances in (("prediction", predicted), ("reference", reference)):
            if instances.dtype.kind not in "iub" or (instances.size and int(instances.min()) < 0):
                raise MedsegError(
                    Code.LABEL,
                    f"the {name} is no map of instances",
                    expected="whole numbers: 0 is no instance, each instance has a number of its own",
                    got=f"{instances.dtype}, from {instances.min()} on",
                )
        where = np.nonzero((predicted != 0) | (reference != 0))
        ids, pairs = zip(
            *(np.unique(array[where], return_inverse=True) for array in (predicted, reference)), strict=True
        )
        table = sparse.coo_array((np.ones(len(pairs[0]), np.int64), pairs), shape=(len(ids[0]), len(ids[1])))
        table.sum_duplicates()
        rows, columns = table.coords
        return cls(ids[0][rows].astype(np.int64), ids[1][columns].astype(np.int64), table.data)

    def sizes(self, of: Literal["predicted", "reference"]) -> dict[int, int]:
        """Instance → its number of voxels, of the prediction or of the reference; without 0."""
        numbers, inverse = np.unique(self.predicted if of == "predicted" else self.reference, return_inverse=True)
        totals = np.bincount(inverse, weights=self.voxels, minlength=len(numbers))
        return {int(n): int(total) for n, total in zip(numbers, totals, strict=True) if n}
