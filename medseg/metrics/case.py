"""All metrics of all classes of one case, in one pass over the voxels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import Code, MedsegError
from medseg.metrics.masks import ClassMasks, Mask, State
from medseg.metrics.metric import metrics
from medseg.volume import Grid

DEFAULT_TOLERANCE_MM = 2.0
"""What the surface Dice forgives unless told otherwise, in mm (in pixels for pictures)."""
MM3_PER_ML = 1000.0
_VOXELS_PER_CHUNK = 2**22
"""The joint histogram needs 8 bytes per voxel of a chunk: 32 MiB, however large the case."""

IndexMap = NDArray[np.integer]


@dataclass(frozen=True)
class ClassResult:
    """The metrics of one class of one case.

    Args:
        index: class index.
        state: which of the two masks has voxels.
        values: metric name → value, NaN where undefined.
    """

    index: int
    state: State
    values: dict[str, float]


def measure_case(
    predicted: IndexMap,
    reference: IndexMap,
    grid: Grid,
    *,
    num_classes: int,
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    names: Sequence[str] | None = None,
) -> list[ClassResult]:
    """Measure every foreground class of one case.

    Args:
        predicted: class indices 0, 1, … on `grid`.
        reference: class indices on the same grid.
        grid: gives the size of a voxel.
        num_classes: number of classes with the background.
        tolerance_mm: what the surface Dice forgives (pixels for pictures).
        names: metrics to compute; all by default. Without surface metrics it is many times faster.
    Returns:
        One result per class, in the order of the indices, without the background.
    Raises:
        MedsegError: E_GRID if the shapes differ, E_LABEL for an index that is not a class, E_NAME for an unknown
            metric, E_CONFIG for a tolerance below zero.
    """
    if not tolerance_mm >= 0:
        raise MedsegError(Code.CONFIG, "a tolerance is 0 mm or more", where="tolerance_mm", got=tolerance_mm)
    if predicted.shape != grid.shape or reference.shape != grid.shape:
        raise MedsegError(
            Code.GRID,
            "prediction and reference have other shapes",
            expected=f"both {grid.shape}",
            got=f"prediction {predicted.shape}, reference {reference.shape}",
        )
    chosen = metrics(names)
    all_masks = class_masks(predicted, reference, grid, num_classes=num_classes, tolerance_mm=tolerance_mm)
    return [
        ClassResult(index, masks.state, {metric.name: metric.measure(masks) for metric in chosen})
        for index, masks in enumerate(all_masks, start=1)
    ]


def class_masks(
    predicted: IndexMap, reference: IndexMap, grid: Grid, *, num_classes: int, tolerance_mm: float
) -> Iterator[ClassMasks]:
    """The masks of the foreground classes one after the other; the arguments are those of `measure_case`."""
    counts = confusion(predicted, reference, num_classes)
    boxes = [ndimage.find_objects(array, max_label=num_classes - 1) for array in (predicted, reference)]
    volume = float(np.prod(grid.spacing_mm)) / (1.0 if grid.is_picture else MM3_PER_ML)
    diagonal = float(np.linalg.norm(np.multiply(grid.shape, grid.spacing_mm)))
    deep = [axis for axis, size in enumerate(grid.shape) if size > 1] or [0]
    flat = tuple(axis for axis in range(grid.ndim) if axis not in deep)
    spacing_mm = tuple(grid.spacing_mm[axis] for axis in deep)
    for index in range(1, num_classes):
        box = _union(boxes[0][index - 1], boxes[1][index - 1], grid.ndim)
        tp = int(counts[index, index])
        fp, fn = int(counts[index].sum()) - tp, int(counts[:, index].sum()) - tp
        yield ClassMasks(
            tp=tp,
            fp=fp,
            fn=fn,
            tn=int(counts.sum()) - tp - fp - fn,
            predicted=_without(predicted[box] == index, flat),
            reference=_without(reference[box] == index, flat),
            spacing_mm=spacing_mm,
            voxel_volume=volume,
            diagonal_mm=diagonal,
            tolerance_mm=tolerance_mm,
        )


def confusion(predicted: IndexMap, reference: IndexMap, num_classes: int) -> NDArray[np.int64]:
    """Joint histogram of two maps of class indices.

    Returns:
        int64, shape (num_classes, num_classes): [p, r] is the number of voxels predicted as p whose reference is r.
    Raises:
        MedsegError: E_LABEL for an index that is not a class.
    """
    for name, array in (("prediction", predicted), ("reference", reference)):
        if array.size and not (int(array.min()) >= 0 and int(array.max()) < num_classes):
            raise MedsegError(
                Code.LABEL,
                f"the {name} holds an index that is not a class",
                expected=f"0 … {num_classes - 1}",
                got=f"{int(array.min())} … {int(array.max())}",
            )
    total = np.zeros(num_classes**2, dtype=np.int64)
    step = max(1, _VOXELS_PER_CHUNK * predicted.shape[0] // max(predicted.size, 1))
    for start in range(0, predicted.shape[0], step):
        joint = predicted[start : start + step].astype(np.int64) * num_classes + reference[start : start + step]
        total += np.bincount(joint.ravel(order="K"), minlength=num_classes**2)
    return total.reshape(num_classes, num_classes)


def _without(mask: Mask, axes: tuple[int, ...]) -> Mask:
    """The mask without these axes, along which it has at most one voxel."""
    return np.asarray(mask.any(axis=axes)) if axes else mask


def _union(a: tuple[slice, ...] | None, b: tuple[slice, ...] | None, ndim: int) -> tuple[slice, ...]:
    """The smallest box around two boxes; an empty one if there is none."""
    if a is None or b is None:
        return a or b or (slice(0, 0),) * ndim
    return tuple(slice(min(s.start, t.start), max(s.stop, t.stop)) for s, t in zip(a, b, strict=True))
