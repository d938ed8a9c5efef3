"""Sliding-window inference: overlapping tiles, Gaussian weights, optional mirroring.

The window slides along the first axis. What it has left behind is finished and can be used and forgotten, so that the
logits of a whole image need not exist.

Shapes: C channels, K classes, S the image, P the patch (the network's input), Q its output (Q = P with padding
"same", smaller with "valid").
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from medseg.data.augment import Mirroring
from medseg.data.prepared import cut
from medseg.errors import Code, MedsegError
from medseg.models import SegmentationModel
from medseg.models.compiling import Forward

log = logging.getLogger(__name__)

GAUSSIAN_SIGMA = 1 / 8
"""Standard deviation of the tile weights as a share of the tile (nnU-Net's value)."""

BATCH_SIZE, BATCH_SIZE_ON_CPU = 4, 1
"""Tiles in one forward pass. Whether more at a time are faster on a CPU is to be measured: `scripts/bench_prediction.py
--only batch`; one takes the least memory."""
HALF_SCALE = 16.0
"""The weights of tiles are larger by this where sums are of half precision, whose smallest numbers are coarse."""


@dataclass(frozen=True)
class WindowConfig:
    """How an image is tiled."""

    step: float = 0.5
    """Distance of tiles as a share of the tile; 1 is no overlap."""
    mirroring: Mirroring = field(default_factory=Mirroring)
    """Average over all combinations of mirroring along its axes: 2^n passes. Classes that change places in mirrored
    training patches change back."""
    batch_size: int | None = None
    """Tiles, and mirrored passes over them, in one forward pass; None takes what is fastest on the device."""
    precision: str = "fp32"
    """"bf16", "fp16" or "fp32"."""
    skip: bool = True
    """Tiles of one and the same value are computed once (`first_alike`): exact."""

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


def sliding_window_logits(
    model: SegmentationModel,
    image: torch.Tensor,
    patch_size: Sequence[int],
    num_classes: int,
    config: WindowConfig,
    dtype: torch.dtype = torch.float32,
    *,
    forward: Forward | None = None,
    sums_on: torch.device | None = None,
) -> torch.Tensor:
    """Logits of a whole image: `sliding_window_planes` put together.

    Returns:
        Shape (K, *S), of the type, where the sums are.
    """
    shape = tuple(image.shape[1:])
    whole = torch.empty(0)
    found = sliding_window_planes(
        model, image, patch_size, num_classes, config, dtype, forward=forward, sums_on=sums_on
    )
    for first, planes in found:
        if tuple(planes.shape[1:]) == shape:
            return planes  # all at once: nothing else comes
        if not first:
            whole = planes.new_empty((num_classes, *shape))
        whole[:, first : first + planes.shape[1]] = planes
    return whole


@torch.inference_mode()
def sliding_window_planes(
    model: SegmentationModel,
    image: torch.Tensor,
    patch_size: Sequence[int],
    num_classes: int,
    config: WindowConfig,
    dtype: torch.dtype = torch.float32,
    *,
    forward: Forward | None = None,
    sums_on: torch.device | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Logits of an image, some planes of its first axis at a time, as soon as no tile is left that reaches them.

    Held are the sums of the planes that the tiles at work reach, one tile deep, never the whole image.

    Args:
        model: in eval mode, on the device to use.
        image: float32, shape (C, *S), any size: smaller than the patch is padded.
        patch_size: P.
        num_classes: K, channels of what the network gives.
        config: tiling.
        dtype: in which the sums are kept: float32, or float16 for half the memory.
        forward: what calls the model, perhaps compiled; None calls it.
        sums_on: where tiles are put together; None is the model's device.
    Yields:
        The first plane and the logits of the next n, shape (K, n, *S[1:]), where the sums are: the weighted mean over
        tiles and mirrored passes. They are overwritten when the next are asked for.
    """
    device = sums_on or next(model.parameters()).device
    forward = forward or Forward(model, compiled=False, must=False)
    output_size = model.output_size(tuple(patch_size))
    margin = [(p - q) // 2 for p, q in zip(patch_size, output_size, strict=True)]
    shape = image.shape[1:]
    # What the tiles cover: at least one tile; an image smaller than a tile lies in the middle of it.
    covered = [max(s, q) for s, q in zip(shape, output_size, strict=True)]
    before = [(c - s) // 2 for c, s in zip(covered, shape, strict=True)]
    padded = cut(
        image,
        [-(b + m) for b, m in zip(before, margin, strict=True)],
        [c + p - q for c, p, q in zip(covered, patch_size, output_size, strict=True)],
        mirror=any(margin),
    )
    starts = tile_starts(covered, output_size, config.step)
    alike = first_alike(padded, starts, patch_size) if config.skip else list(range(len(starts)))
    passes = mirrored_passes(config.mirroring)
    unlike = [starts[index] for index in range(len(starts)) if alike[index] == index]
    padded = padded.to(next(model.parameters()).device)
    answers = _tile_logits(forward, padded, unlike, patch_size, passes, config)
    uses = Counter(alike)
    kept: dict[int, torch.Tensor] = {}

    weight = gaussian_weight(tuple(output_size)).to(device)
    if dtype == torch.float16:
        weight *= HALF_SCALE
    depth = output_size[0]
    total = torch.zeros((num_classes, depth, *covered[1:]), device=device, dtype=dtype)
    weights = torch.zeros((depth, *covered[1:]), device=device)
    inside = tuple(slice(b, b + s) for b, s in zip(before[1:], shape[1:], strict=True))
    done = 0
    for (start, *corner), representative in zip([*starts, (covered[0],)], [*alike, -1], strict=True):
        if start > done:  # no tile that comes reaches the planes before it
            for places, planes in _ring(done, start, depth):
                low, high = (max(0, min(plane - before[0], shape[0])) for plane in (planes.start, planes.stop))
                finished = total[:, places].div_(weights[places] * len(passes))
                if low < high:
                    yield (
                        low,
                        finished[(slice(None), slice(low + before[0] - planes.start, None), *inside)][:, : high - low],
                    )
                total[:, places] = 0
                weights[places] = 0
            done = start
        if representative < 0:
            break
        tile = kept.get(representative)
        if tile is None:
            tile = next(answers).to(device)
        uses[representative] -= 1
        if uses[representative]:
            kept[representative] = tile
        else:
            kept.pop(representative, None)
        box = tuple(slice(s, s + q) for s, q in zip(corner, output_size[1:], strict=True))
        for places, planes in _ring(start, start + depth, depth):
            part = slice(planes.start - start, planes.stop - start)
            if dtype == torch.float32:
                total[(slice(None), places, *box)].addcmul_(tile[:, part], weight[part])
            else:
                total[(slice(None), places, *box)] += tile[:, part] * weight[part]
            weights[(places, *box)] += weight[part]


def _ring(start: int, stop: int, depth: int) -> Iterator[tuple[slice, slice]]:
    """Planes start … stop - 1, at most `depth`, and their places in a ring of `depth` planes: one piece or two."""
    while start < stop:
        place = start % depth
        length = min(stop - start, depth - place)
        yield slice(place, place + length), slice(start, start + length)
        start += length


def first_alike(padded: torch.Tensor, starts: Sequence[Sequence[int]], patch_size: Sequence[int]) -> list[int]:
    """For each tile the first tile that is exactly the same, as far as both are of one value; mostly itself.

    In scans most of such tiles are air that the intensity window makes one value, and the zeros around a brain. What
    the network says of them is the same wherever they lie. So they are computed once, and nothing changes: that they
    are background is not assumed.

    Args:
        padded: what tiles are cut from, (C, *S).
        starts: first voxels of the tiles.
        patch_size: P.
    Returns:
        One index into `starts` for each tile.
    """
    seen: dict[tuple[float, ...], int] = {}
    coarse = (slice(None), *(slice(None, None, max(p // 8, 1)) for p in patch_size))
    alike = []
    for index, start in enumerate(starts):
        tile = cut(padded, start, patch_size)
        value = tile[(slice(None), *([slice(0, 1)] * len(patch_size)))]
        constant = bool((tile[coarse] == value).all()) and bool((tile == value).all())
        alike.append(seen.setdefault(tuple(value.flatten().tolist()), index) if constant else index)
    return alike


def tiles_together(config: WindowConfig, device: torch.device) -> int:
    """Tiles, and mirrored passes over them, in one forward pass on a device."""
    return config.batch_size or (BATCH_SIZE_ON_CPU if device.type == "cpu" else BATCH_SIZE)


def mirrored_passes(mirroring: Mirroring) -> list[tuple[int, ...]]:
    """Axes that each pass over a tile mirrors; none in the first."""
    return [axes for n in range(len(mirroring.axes) + 1) for axes in itertools.combinations(mirroring.axes, n)]


def _tile_logits(
    forward: Forward,
    padded: torch.Tensor,
    starts: Sequence[Sequence[int]],
    patch_size: Sequence[int],
    passes: Sequence[tuple[int, ...]],
    config: WindowConfig,
) -> Iterator[torch.Tensor]:
    """The sum of the logits of a tile over its mirrored passes, float32 (K, *Q), one tile after the other.

    Passes and tiles fill the same batches, all of one size. On a GPU the last is filled up: a new size would cost more
    than the tiles that are thrown away; most where the network is compiled. Where the memory does not suffice for a
    batch, all that follow are half as large; the error comes where one tile is too much.
    """
    layout = memory_format(len(patch_size))
    size = min(tiles_together(config, padded.device), forward.largest_batch or sys.maxsize)
    items = [(start, axes) for start in starts for axes in passes]
    total = torch.empty(0)
    begin = 0
    while begin < len(items):
        batch = items[begin : begin + size]
        tiles = [cut(padded, start, patch_size) for start, _ in batch]
        tiles = [
            tile.flip([a + 1 for a in axes]) if axes else tile for tile, (_, axes) in zip(tiles, batch, strict=True)
        ]
        if padded.device.type != "cpu" and (begin or forward.compiled):
            tiles += [tiles[-1]] * (size - len(tiles))
        stacked = torch.stack(tiles) if len(tiles) > 1 else tiles[0][None]
        try:
            with autocast(padded.device, config.precision):
                logits = forward(stacked.to(memory_format=layout))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = forward.largest_batch = len(stacked) // 2 or 1
            log.warning("the memory does not suffice for a batch of %d tiles: from here on %d", len(stacked), size)
            continue
        begin += len(batch)
        for number, (_, axes) in enumerate(batch):
            found = logits[number]
            if axes:
                found = found.flip([a + 1 for a in axes])
                if config.mirroring.swaps(axes):  # what looks like a left kidney in a mirrored tile is the right one
                    found = found[_changed(config.mirroring.outputs or config.mirroring.classes, len(found))]
            if not axes:
                total = found.to(torch.float32, copy=len(passes) > 1)
            else:
                total += found
            if axes == passes[-1]:
                yield total


def _changed(order: Sequence[int], num_channels: int) -> list[int]:
    """Where each channel comes from when outputs change places: logits, and if there are more their probabilities and
    what belongs to no output."""
    num = len(order)
    return [*order, *(num + index for index in order), *range(2 * num, num_channels)][:num_channels]


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
