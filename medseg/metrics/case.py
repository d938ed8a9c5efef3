"""All metrics of all classes of one case, in one pass over the voxels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import Code, MedsegError
from medseg.labels import IGNORE_INDEX
from medseg.metrics.masks import ClassMasks, InstanceMap, Mask, State
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
        index: class index; with regions the number of the region, from 1 on.
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
    regions: Sequence[tuple[int, ...]] = (),
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    names: Sequence[str] | None = None,
    instances: tuple[InstanceMap, InstanceMap] | None = None,
) -> list[ClassResult]:
    """Measure every foreground class of one case, or every region.

    Voxels where the reference is `IGNORE_INDEX` are left out: there both masks are empty, and nothing is counted.

    Args:
        predicted: class indices 0, 1, … on `grid`.
        reference: class indices on the same grid.
        grid: gives the size of a voxel.
        num_classes: number of classes with the background.
        regions: what is measured instead of classes: the indices of the classes that make up each (`Labels.regions`).
        tolerance_mm: what the surface Dice forgives (pixels for pictures).
        names: metrics to compute; all by default. Without surface metrics it is many times faster.
        instances: maps of instances of prediction and reference, for metrics that count them; else each connected
            component is one.
    Returns:
        One result per class, in the order of the indices, without the background; or one per region.
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
    all_masks = class_masks(
        predicted,
        reference,
        grid,
        num_classes=num_classes,
        regions=regions,
        tolerance_mm=tolerance_mm,
        instances=instances,
    )
    return [
        ClassResult(index, masks.state, {metric.name: metric.measure(masks) for metric in chosen})
        for index, masks in enumerate(all_masks, start=1)
    ]


def class_masks(
    predicted: IndexMap,
    reference: IndexMap,
    grid: Grid,
    *,
    num_classes: int,
    regions: Sequence[tuple[int, ...]] = (),
    tolerance_mm: float,
    instances: tuple[InstanceMap, InstanceMap] | None = None,
) -> Iterator[ClassMasks]:
    """The masks of the foreground classes or regions one after the other; the arguments are those of `measure_case`."""
    ignored = reference == IGNORE_INDEX
    num_ignored = int(ignored.sum())
    if num_ignored:
        predicted, reference = np.where(ignored, 0, predicted), np.where(ignored, 0, reference)
    _check(predicted, reference, num_classes)
    shape, foreground = predicted.shape, _foreground_box(predicted, reference)
    predicted, reference = predicted[foreground], reference[foreground]
    numbered = None if instances is None else tuple(numbers[foreground] for numbers in instances)
    counts = confusion(predicted, reference, num_classes)
    counts[0, 0] += math.prod(shape) - predicted.size - num_ignored
    boxes = [ndimage.find_objects(array, max_label=num_classes - 1) for array in (predicted, reference)]
    volume = float(np.prod(grid.spacing_mm)) / (1.0 if grid.is_picture else MM3_PER_ML)
    diagonal = float(np.linalg.norm(np.multiply(grid.shape, grid.spacing_mm)))
    deep = [axis for axis, size in enumerate(grid.shape) if size > 1] or [0]
    flat = tuple(axis for axis in range(grid.ndim) if axis not in deep)
    spacing_mm = tuple(grid.spacing_mm[axis] for axis in deep)
    for classes in regions or [(index,) for index in range(1, num_classes)]:
        members = list(classes)
        box = _union([of_map[index - 1] for of_map in boxes for index in members], grid.ndim)
        tp = int(counts[np.ix_(members, members)].sum())
        fp, fn = int(counts[members].sum()) - tp, int(counts[:, members].sum()) - tp
        masks = [_mask(indices[box], members) for indices in (predicted, reference)]
        yield ClassMasks(
            tp=tp,
            fp=fp,
            fn=fn,
            tn=int(counts.sum()) - tp - fp - fn,
            predicted=_without(masks[0], flat),
            reference=_without(masks[1], flat),
            spacing_mm=spacing_mm,
            margins=tuple(
                (outer.start + inner.start, size - outer.start - inner.stop)
                for axis, (outer, inner, size) in enumerate(zip(foreground, box, shape, strict=True))
                if axis in deep
            ),
            voxel_volume=volume,
            diagonal_mm=diagonal,
            tolerance_mm=tolerance_mm,
            instances=None if numbered is None else _instances(numbered, box, masks, flat),
        )


def confusion(predicted: IndexMap, reference: IndexMap, num_classes: int) -> NDArray[np.int64]:
    """Joint histogram of two maps of class indices.

    Returns:
        int64, shape (num_classes, num_classes): [p, r] is the number of voxels predicted as p whose reference is r.
    Raises:
        MedsegError: E_LABEL for an index that is not a class.
    """
    _check(predicted, reference, num_classes)
    total = np.zeros(num_classes**2, dtype=np.int64)
    step = max(1, _VOXELS_PER_CHUNK * predicted.shape[0] // max(predicted.size, 1))
    for start in range(0, predicted.shape[0], step):
        joint = predicted[start : start + step].astype(np.int64) * num_classes + reference[start : start + step]
        total += np.bincount(joint.ravel(order="K"), minlength=num_classes**2)
    return total.reshape(num_classes, num_classes)


def _check(predicted: IndexMap, reference: IndexMap, num_classes: int) -> None:
    for name, array in (("prediction", predicted), ("reference", reference)):
        if array.size and not (int(array.min()) >= 0 and int(array.max()) < num_classes):
            raise MedsegError(
                Code.LABEL,
                f"the {name} holds an index that is not a class",
                expected=f"0 … {num_classes - 1}",
                got=f"{int(array.min())} … {int(array.max())}",
            )


def _foreground_box(predicted: IndexMap, reference: IndexMap) -> tuple[slice, ...]:
    """The smallest box around all that is not background in one of the two maps; of one voxel if there is nothing."""
    either = predicted | reference
    box: list[slice] = []
    for axis in range(either.ndim):
        others = tuple(other for other in range(either.ndim) if other != axis)
        found = np.flatnonzero(np.bitwise_or.reduce(either, axis=others))
        box.append(slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 1))
        either = either[(*[slice(None)] * axis, box[-1])]
    return tuple(box)


def _mask(indices: IndexMap, members: list[int]) -> Mask:
    """Where a map holds one of these classes."""
    mask: Mask = indices == members[0] if len(members) == 1 else np.isin(indices, members)
    return mask


def _without(mask: Mask, axes: tuple[int, ...]) -> Mask:
    """The mask without these axes, along which it has at most one voxel."""
    return np.asarray(mask.any(axis=axes)) if axes else mask


def _instances(
    numbered: Sequence[InstanceMap], box: tuple[slice, ...], masks: Sequence[Mask], flat: tuple[int, ...]
) -> tuple[InstanceMap, InstanceMap]:
    """The instances within the masks of a class, without the axes along which there is one voxel."""
    ours, theirs = (np.where(mask, numbers[box], 0) for numbers, mask in zip(numbered, masks, strict=True))
    return (ours.max(axis=flat), theirs.max(axis=flat)) if flat and ours.size else (ours, theirs)


def _union(boxes: Sequence[tuple[slice, ...] | None], ndim: int) -> tuple[slice, ...]:
    """The smallest box around these boxes; an empty one if there is none."""
    found = [box for box in boxes if box is not None]
    if not found:
        return (slice(0, 0),) * ndim
    return tuple(slice(min(s.start for s in side), max(s.stop for s in side)) for side in zip(*found, strict=True))
