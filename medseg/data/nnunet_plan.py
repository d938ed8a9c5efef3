"""nnU-Net's planner, rule by rule: from the spacings and shapes of a data set to its configurations.

`data.plan.preset=nnunet` (or resenc_m, resenc_l, resenc_xl) plans as nnU-Net 2.8 does, so that results can be compared
and its weights loaded. Axes here are the array's with the coarsest first, as nnU-Net transposes them.

Source:
    Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, Nature
    Methods 2021, supplementary note 2; Isensee et al., nnU-Net Revisited, MICCAI 2024 (residual-encoder presets). The
    tests derive the expected plans from the installed package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Axes = tuple[int, ...]
FloatArray = NDArray[np.float64]
PerCase = Sequence[Sequence[float]] | FloatArray
"""Numbers along the axes of each case, (N, dims)."""

ANISOTROPY = 3.0
"""An axis is coarse when its spacing is more than this times the next one's, and its size less than 1/this."""
COARSE_PERCENTILE = 10
"""A coarse axis is resampled to this percentile of its spacings: the median would invent too many slices."""
MIN_EDGE = 4
"""Smallest edge of the deepest feature map."""
INITIAL_EDGE = {2: 2048, 3: 256}
"""The patch that is shrunk until it fits has the volume of a cube (square) with this edge."""
MAX_WIDTH = {2: 512, 3: 320}
BASE_WIDTH = 32
LOWRES_SHARE = 0.25
"""A low-resolution configuration is made where the patch holds less than this share of the median volume."""
LOWRES_STEP = 1.03
"""Factor by which its spacing grows until the patch holds that share."""
LOWRES_GAIN = 2.0
"""It is dropped where its volumes are not smaller by at least this factor."""
MIN_BATCH = 2


@dataclass(frozen=True)
class Preset:
    """What a network may cost, and how many convolutions its stages have."""

    elements: dict[int, float]
    """Elements of all feature maps together that the reference batch may have, by spatial dimensions."""
    encoder: Axes
    """Convolutions, or residual blocks, of each encoder stage."""
    decoder: int
    """Convolutions of each decoder stage."""
    residual: bool
    dataset_share: float
    """Largest share of the data set's voxels in one batch."""


REFERENCE_BATCH = {2: 12, 3: 2}
"""Batch sizes that `Preset.elements` were measured with."""
RESIDUAL_BLOCKS = (1, 3, 4) + (6,) * 10
PRESETS = {
    "nnunet": Preset({2: 85e6, 3: 560e6}, (2,) * 14, 2, residual=False, dataset_share=0.05),
    "resenc_m": Preset({2: 135e6, 3: 680e6}, RESIDUAL_BLOCKS, 1, residual=True, dataset_share=1.0),
    "resenc_l": Preset({2: 380e6, 3: 2.1e9}, RESIDUAL_BLOCKS, 1, residual=True, dataset_share=1.0),
    "resenc_xl": Preset({2: 560e6, 3: 3.6e9}, RESIDUAL_BLOCKS, 1, residual=True, dataset_share=1.0),
}
"""For 8, 8, 24 and 40 GB of device memory."""


@dataclass(frozen=True)
class NetworkPlan:
    """One network and the grid that it sees."""

    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    """Median shape of the cases at this spacing."""
    patch_size: Axes
    batch_size: int
    strides: tuple[Axes, ...]
    kernels: tuple[Axes, ...]
    widths: Axes
    blocks: Axes
    """Convolutions (residual: blocks) of each encoder stage."""
    decoder_blocks: Axes
    residual: bool


@dataclass(frozen=True)
class Topology:
    """Where a network halves which axis."""

    strides: tuple[Axes, ...]
    kernels: tuple[Axes, ...]
    patch_size: Axes
    """Padded to a multiple of `divisor`."""
    divisor: Axes


def configurations(
    spacings_mm: Sequence[Sequence[float]],
    shapes: Sequence[Sequence[int]],
    *,
    num_channels: int,
    num_classes: int,
    preset: Preset = PRESETS["nnunet"],
) -> tuple[Axes, dict[str, NetworkPlan]]:
    """All configurations of a data set.

    Args:
        spacings_mm: of each case, in array order (nnU-Net reads k, j, i).
        shapes: of each case after cropping to its nonzero box, in the same order.
        num_channels: channels of an image.
        num_classes: with the background.
        preset: what the network may cost.
    Returns:
        The transposition that puts the coarsest axis first, and configurations by nnU-Net's names: "2d", and for
        volumes "3d_fullres" and, where the patch sees too little, "3d_lowres".
    """
    target = target_spacing(spacings_mm, shapes)
    order = coarsest_first(target)
    spacing = target[list(order)]
    median = resampled_median(spacings_mm, shapes, target)[list(order)]
    num_voxels = float(np.prod(median)) * len(shapes)

    def configure(spacing: FloatArray, median: ArrayLike, voxels: float) -> NetworkPlan:
        return configuration(spacing, median, voxels, num_channels=num_channels, num_classes=num_classes, preset=preset)

    found = {"2d": configure(spacing[1:], median[1:], num_voxels)}
    if median[0] == 1:
        return order, found
    found["3d_fullres"] = full = configure(spacing, median, num_voxels)
    low = lower_resolution(spacing, median, full.patch_size, len(shapes), configure)
    if low is not None:
        found["3d_lowres"] = low
    return order, found


def coarsest_first(spacing_mm: FloatArray) -> Axes:
    """The order of axes that puts the coarsest one first."""
    coarse = int(np.argmax(spacing_mm))
    return (coarse, *(axis for axis in range(len(spacing_mm)) if axis != coarse))


def resampled_median(spacings_mm: PerCase, shapes: PerCase, target: FloatArray) -> FloatArray:
    """Median shape of the cases at the target spacing."""
    resampled = [
        [round(old / new * size) for old, new, size in zip(spacing, target, shape, strict=True)]
        for spacing, shape in zip(spacings_mm, shapes, strict=True)
    ]
    median: FloatArray = np.median(resampled, axis=0)
    return median


def lower_resolution(
    spacing_mm: FloatArray,
    median: FloatArray,
    patch_size: Axes,
    num_cases: int,
    configure: Callable[[FloatArray, ArrayLike, float], NetworkPlan],
) -> NetworkPlan | None:
    """The configuration whose patch holds `LOWRES_SHARE` of the median volume; None where full resolution's does.

    Args:
        spacing_mm: of full resolution.
        median: shape there.
        patch_size: there.
        num_cases: of the data set.
        configure: makes a configuration of a spacing, a median shape and the voxels of the whole data set.
    """
    low, low_spacing = None, spacing_mm.copy()
    voxels, in_patch = float(np.prod(median)), math.prod(patch_size)
    while in_patch / voxels < LOWRES_SHARE:
        lagging = low_spacing.max() / low_spacing > 2
        low_spacing[lagging if lagging.any() else slice(None)] *= LOWRES_STEP
        shape = spacing_mm / low_spacing * median
        voxels = float(np.prod(shape))
        low = configure(low_spacing, [round(s) for s in shape], voxels * num_cases)
        in_patch = math.prod(low.patch_size)
    return low if low is not None and np.prod(median) / voxels >= LOWRES_GAIN else None


def target_spacing(spacings_mm: PerCase, shapes: PerCase) -> FloatArray:
    """The median spacing; an axis that is coarse and short takes a low percentile, not finer than the others'."""
    target: FloatArray = np.percentile(np.array(spacings_mm, dtype=np.float64), 50, axis=0)
    size = np.percentile(np.array(shapes), 50, axis=0)
    coarse = int(np.argmax(target))
    others = [axis for axis in range(len(target)) if axis != coarse]
    if target[coarse] > ANISOTROPY * target[others].max() and size[coarse] * ANISOTROPY < size[others].min():
        low = float(np.percentile(np.array(spacings_mm)[:, coarse], COARSE_PERCENTILE))
        finest = float(target[others].max())
        target[coarse] = finest + 1e-5 if low < finest else low
    return target


def configuration(
    spacing_mm: FloatArray,
    median_shape: ArrayLike,
    num_voxels: float,
    *,
    num_channels: int,
    num_classes: int,
    preset: Preset,
) -> NetworkPlan:
    """The largest patch whose network is within the preset's cost, and the batch that fits with it.

    Args:
        spacing_mm: that the network sees, coarsest axis first.
        median_shape: of the cases at this spacing.
        num_voxels: of the whole data set at this spacing: a batch holds no more than `Preset.dataset_share` of it.
        num_channels: channels of an image.
        num_classes: with the background.
        preset: what it may cost.
    """
    dims = len(spacing_mm)
    median = np.asarray(median_shape, dtype=np.float64)
    edges = 1 / np.asarray(spacing_mm)
    edges = edges * (INITIAL_EDGE[dims] ** dims / np.prod(edges)) ** (1 / dims)
    net = topology(spacing_mm, [min(round(float(e)), m) for e, m in zip(edges, median, strict=True)])
    budget, batch = preset.elements[dims], REFERENCE_BATCH[dims]

    def cost(net: Topology) -> int:
        return feature_elements(net, num_classes=num_classes, preset=preset, num_channels=num_channels)

    # A plain network must fit with a batch of two, whatever batch its budget was measured with.
    spare = 1.0 if preset.residual else MIN_BATCH / batch
    while cost(net) * spare > budget:
        patch = list(net.patch_size)
        axis = max(range(dims), key=lambda a: (patch[a] / median[a], a))
        # Shrinking may take a pooling away: the step is that of the smaller patch, so that no valid size is skipped.
        smaller = [p - net.divisor[a] * (a == axis) for a, p in enumerate(patch)]
        patch[axis] -= topology(spacing_mm, smaller).divisor[axis]
        net = topology(spacing_mm, patch)
    of_data = round(num_voxels * preset.dataset_share / math.prod(net.patch_size))
    stages = len(net.strides)
    return NetworkPlan(
        spacing_mm=tuple(float(s) for s in spacing_mm),
        median_shape=tuple(float(m) for m in median),
        patch_size=net.patch_size,
        batch_size=max(min(round(budget / cost(net) * batch), of_data), MIN_BATCH),
        strides=net.strides,
        kernels=net.kernels,
        widths=_widths(stages, dims),
        blocks=preset.encoder[:stages],
        decoder_blocks=(preset.decoder,) * (stages - 1),
        residual=preset.residual,
    )


def topology(
    spacing_mm: Sequence[float] | FloatArray, patch_size: Sequence[float], num_stages: int | None = None
) -> Topology:
    """Which axes are halved at each stage, the kernels, and the patch padded to what that divides.

    Args:
        spacing_mm: of the network's grid.
        patch_size: wanted; may be fractional (a median shape).
        num_stages: a depth that is asked for is reached with smaller edges than nnU-Net would choose.
    """
    dims = len(spacing_mm)
    spacing, size = [float(s) for s in spacing_mm], [float(p) for p in patch_size]
    kernel, halvings = [1] * dims, [0] * dims
    strides: list[Axes] = [(1,) * dims]
    kernels: list[Axes] = []
    while num_stages is None or len(strides) < num_stages:
        poolable = [a for a in range(dims) if size[a] >= (2 * MIN_EDGE if num_stages is None else 2)]
        finest = min((spacing[a] for a in poolable), default=math.inf)
        poolable = [a for a in poolable if spacing[a] / finest < 2]
        if not poolable or (num_stages is None and len(poolable) == 1 and size[poolable[0]] < 3 * MIN_EDGE):
            break
        kernel = [3 if k == 3 or s / min(spacing) < 2 else 1 for k, s in zip(kernel, spacing, strict=True)]
        for axis in poolable:
            halvings[axis] += 1
            spacing[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
        strides.append(tuple(2 if axis in poolable else 1 for axis in range(dims)))
        kernels.append(tuple(kernel))
    kernels.append((3,) * dims)
    divisor = tuple(2**n for n in halvings)
    padded = tuple(math.ceil(p / d) * d for p, d in zip(patch_size, divisor, strict=True))
    return Topology(tuple(strides), tuple(kernels), padded, divisor)


def feature_elements(net: Topology, *, num_channels: int, num_classes: int, preset: Preset) -> int:
    """Elements of all feature maps that convolutions put out, for one patch: nnU-Net's measure of memory."""
    dims, stages = len(net.patch_size), len(net.strides)
    widths = _widths(stages, dims)
    sizes: list[int] = []
    edge = list(net.patch_size)
    for stride in net.strides:
        edge = [e // s for e, s in zip(edge, stride, strict=True)]
        sizes.append(math.prod(edge))
    total = widths[0] * sizes[0] if preset.residual else 0  # the stem
    channels = widths[0] if preset.residual else num_channels
    for stage in range(stages):
        element = widths[stage] * sizes[stage]
        if preset.residual:
            projected = channels != widths[stage] or max(net.strides[stage]) > 1
            total += (2 * preset.encoder[stage] + projected) * element
        else:
            total += preset.encoder[stage] * element
        channels = widths[stage]
    for stage in range(stages - 1):  # the transposed convolution and the stage's own
        total += (1 + preset.decoder) * widths[stage] * sizes[stage]
    return total + num_classes * sizes[0]


def _widths(stages: int, dims: int) -> Axes:
    return tuple(min(BASE_WIDTH * 2**stage, MAX_WIDTH[dims]) for stage in range(stages))
