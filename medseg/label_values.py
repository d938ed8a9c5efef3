"""Label arrays as whole numbers, and the smallest type that holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError

INTEGER_TOLERANCE = 1e-3
"""Label values within this of an integer are rounded (float32 files); others are refused."""


def integer_values(array: NDArray[Any], *, where: object = None) -> NDArray[np.integer[Any]]:
    """A label array as integers.

    Raises:
        MedsegError: E_LABEL if a value is further than `INTEGER_TOLERANCE` from an integer, or not finite.
    """
    if np.issubdtype(array.dtype, np.integer):
        integers: NDArray[np.integer[Any]] = array
        return integers
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    rounded = np.rint(array)
    wrong = ~(np.abs(array - rounded) <= INTEGER_TOLERANCE)
    if wrong.any():
        raise MedsegError(
            Code.LABEL,
            "label values are not integers",
            where=where,
            expected="whole numbers, one per class",
            got=f"{int(wrong.sum())} voxels such as {float(array[wrong][0]):.6g}",
            remedy="is this an image or a probability map? resample labels with nearest neighbour",
        )
    whole: NDArray[np.integer[Any]] = rounded.astype(np.int64)
    return whole


def smallest_integer_type(values: NDArray[np.integer[Any]]) -> np.dtype[Any]:
    """The smallest of uint8, int8, uint16, int16, … that holds all values."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32"):
        limits = np.iinfo(name)
        if limits.min <= low and high <= limits.max:
            return np.dtype(name)
    return np.dtype("int64")
