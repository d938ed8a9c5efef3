"""Sliding-window inference: overlapping tiles, Gaussian weights, optional mirroring.

Shapes: C channels, K classes, S the image, P the patch (the network's input), Q its output (Q = P with padding
"same", smaller with "valid").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from medseg.data.augment import Mirroring
from medseg.data.sampling import cut
from medseg.errors import Code, MedsegError
from medseg.models import SegmentationModel

GAUSSIAN_SIGMA = 1 / 8
"""Standard deviation of the tile weights as a share of the tile (nnU-Net's value)."""


@dataclass(frozen=True)
class WindowConfig:
    """How an image is tiled."""

    step: float = 0.5
    """Distance of tiles as a share of the tile; 1 is no overlap."""
    mirroring: Mirroring = field(default_factory=Mirroring)
    """Average over all combinations of mirroring along its axes: 2^n passes. Classes that change places in mirrored
    training patches change back."""
    batch_size: int = 4
    """Tiles in one forward pass."""
    precision: str = "fp32"
    """"bf16", "fp16" or "fp32"."""

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise MedsegError(
                Code.CONFIG, "the step is a share of the tile", where="step", expected="0 < step <= 1", got=self.step
            )


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The mixed-precision context for "bf16" or "fp16"; none for "fp32"."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def memory_format(spatial_dims: int) -> torch.memory_format:
    """Channels-last for 2D or 3D: what convolutions are fastest with, on CPUs and GPUs."""
    return torch.channels_last if spatial_dims == 2 else torch.channels_last_3d


@torch.inference_mode()
def sliding_window_logits(
    model: SegmentationModel, image: torch.Tensor, patch_size: Sequence[int], num_classes: int, config: WindowConfig
) -> torch.Tensor:
    """Logits of a whole image.

    Args:
        model: in eval mode, on the device to use.
        image: float32, shape (C, *S), any size: smaller than the patch is padded.
        patch_size: P.
        num_classes: K.
        config: tiling.
    Returns:
        float32, shape (K, *S), on the model's device: the weighted mean over tiles and mirrored passes.
    """
    device = next(model.parameters()).device
    output_size = model.output_size(tuple(patch_size))
    margin = [(p - q) // 2 for p, q in zip(patch_size, output_size, strict=True)]
    shape = image.shape[1:]
    # What the tiles cover: at least one tile; an image smaller than a tile lies in the middle of it.
    covered = [max(s, q) for s, q in zip(shape, output_size, strict=True)]
    before = [(c - s) // 2 for c, s in zip(covered, shape, strict=True)]
    valid = any(margin)
    padded = cut(
        image.to(device),
        [-(b + m) for b, m in zip(before, margin, strict=True)],
        [c + p - q for c, p, q in zip(covered, patch_size, output_size, strict=True)],
        mirror=valid,
    )
    weight = gaussian_weight(tuple(output_size)).to(device)
    total = torch.zeros((num_classes, *covered), device=device)
    weights = torch.zeros(covered, device=device)
    layout = memory_format(len(shape))
    for starts in _batches(tile_starts(covered, output_size, config.step), config.batch_size):
        tiles = torch.stack([cut(padded, start, patch_size) for start in starts])
        logits = _mirrored(model, tiles.to(memory_format=layout), config, device)
        for start, tile in zip(starts, logits, strict=True):
            box = tuple(slice(s, s + q) for s, q in zip(start, output_size, strict=True))
            total[(slice(None), *box)] += tile * weight
            weights[box] += weight
    total /= weights
    return total[(slice(None), *(slice(b, b + s) for b, s in zip(before, shape, strict=True)))]


def _mirrored(
    model: SegmentationModel, tiles: torch.Tensor, config: WindowConfig, device: torch.device
) -> torch.Tensor:
    """Mean logits (float32) over the mirrored passes of a batch of tiles (N, C, *P)."""
    mirroring = config.mirroring
    combinations = [c for n in range(len(mirroring.axes) + 1) for c in itertools.combinations(mirroring.axes, n)]
    with autocast(device, config.precision):
        total: torch.Tensor = model(tiles).float()
        for flips in combinations[1:]:
            axes = [axis + 2 for axis in flips]
            logits = model(tiles.flip(axes)).flip(axes)
            if mirroring.swaps(flips):  # what looks like a left kidney in a mirrored tile is the right one
                logits = logits[:, list(mirroring.classes)]
            total += logits.float()
    return total / len(combinations)


def tile_starts(shape: Sequence[int], tile: Sequence[int], step: float) -> list[tuple[int, ...]]:
    """First voxels of the tiles that cover `shape`: evenly spread, at most `step` · tile apart, flush at both ends."""
    per_axis = []
    for size, length in zip(shape, tile, strict=True):
        room = size - length
        count = math.ceil(room / max(length * step, 1)) + 1
        per_axis.append(sorted({round(room * i / max(count - 1, 1)) for i in range(count)}))
    return list(itertools.product(*per_axis))


def gaussian_weight(tile: tuple[int, ...]) -> torch.Tensor:
    """Weights of a tile's voxels, 1 in the middle, float32 of shape `tile`; nowhere 0."""
    weight = np.ones((), dtype=np.float64)
    for length in tile:
        centred = (np.arange(length) - (length - 1) / 2) / max(length * GAUSSIAN_SIGMA, 1e-6)
        weight = weight[..., None] * np.exp(-0.5 * centred**2)
    return torch.from_numpy(np.maximum(weight, 1e-4).astype(np.float32))


def _batches(items: list[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
