"""Separable resampling between grids that cover the same box: images, logits and label maps.

Resampling along voxel axes is separable: one small matrix per axis, applied in turn. A cubic B-spline with its
prefilter is also just a matrix, so the general routine's values come out at a fraction of its cost. Its rows fade
fast: a few neighbouring output voxels read a few dozen input voxels, so the matrix is cut into small dense blocks
along its diagonal, and the volume is worked through some planes at a time. Beside the input and the result only
such a slab is held, on whatever device the input lies.

The box is kept, not the voxel centres: output voxel i of n_out covers the share i/n_out … (i+1)/n_out of the axis
(half-pixel convention, as `Grid.resampled`). Beyond the outermost centres the edge value is continued without end.
These are the values of `scipy.ndimage.zoom(mode="nearest", grid_mode=True)`, which scikit-image's `resize` and
therefore nnU-Net call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from medseg.axis_matrices import BLOCK, axis_blocks
from medseg.errors import Code, MedsegError
from medseg.labels import IGNORE_INDEX

MIXED_CHUNK = 1 << 16
"""Voxels between classes that are decided at a time."""
MIXED = 255
"""Stands for "several classes meet here" in a uint8 map. A class of that number is decided as if it were mixed."""


@torch.no_grad()
def resample(
    array: torch.Tensor, shape: tuple[int, ...], *, order: int | tuple[int, ...] = 1, clip: bool = False
) -> torch.Tensor:
    """Resample the last axes of an array to `shape`. No gradients flow.

    Args:
        array: any real type, shape (..., *old_shape). What is not float32 is converted some planes at a time.
        shape: new size of the last len(shape) axes, at most 3.
        order: one of `ORDERS`, or one for each axis.
        clip: hold each channel (each index of the leading axes) within the range of its own values, which a cubic
            spline leaves beside sharp edges.
    Returns:
        float32, shape (..., *shape). The array itself where no axis changes.
    """
    ndim = len(shape)
    old = tuple(array.shape[array.ndim - ndim :])
    if old == tuple(shape):
        return array
    orders = (order,) * ndim if isinstance(order, int) else order
    channels = array.reshape(-1, *old)
    result = torch.empty((len(channels), *shape), dtype=torch.float32, device=array.device)
    for channel, out in zip(channels, result, strict=True):
        limits = channel.aminmax() if clip else None

        def fill(where: slice, channel: torch.Tensor = channel, out: torch.Tensor = out, limits: Any = limits) -> None:
            slab = resampled_planes(channel, shape, orders, where)
            out[where] = slab if limits is None else slab.clamp_(*limits)

        each_slab(fill, slabs_of(shape[0]), array.device)
    return result.reshape(*array.shape[: array.ndim - ndim], *shape)


def running_argmax(scores: Callable[[int], torch.Tensor], num_classes: int) -> torch.Tensor:
    """Argmax over classes of which one at a time is asked for: uint8, ties to the lower class."""
    best = scores(0).clone()
    winner = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for index in range(1, num_classes):
        candidate = scores(index)
        winner.masked_fill_(candidate > best, index)
        torch.maximum(best, candidate, out=best)
    return winner


def slabs_of(num_out: int) -> list[slice]:
    """The slabs of a first axis of `num_out` planes, `BLOCK` planes each. All go by the same ones, because the rounding
    of a matrix product can depend on its size."""
    return [slice(begin, min(begin + BLOCK, num_out)) for begin in range(0, num_out, BLOCK)]


def source_planes(num_in: int, num_out: int, order: int, where: slice) -> slice:
    """Planes of a first axis of `num_in` that a slab of `slabs_of(num_out)` is made of."""
    if num_in == num_out:
        return where
    block = axis_blocks(num_in, num_out, order, torch.device("cpu"))[where.start // BLOCK]
    return slice(block.source.start, block.source.stop)


def each_slab(fill: Callable[[slice], None], slabs: Sequence[slice], device: torch.device) -> None:
    """Call `fill` for each of some slabs of `slabs_of`.

    On a CPU each thread takes slabs of its own, and torch's threads within one operation are switched off meanwhile: to
    split every small product among them costs a meeting each, which takes a time slice where something else has the
    core (measured: up to 100 times slower on a busy machine).
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1 or device.type != "cpu":
        for where in slabs:
            fill(where)
        return

    @torch.no_grad()  # which is a thread's own
    def work(where: slice) -> None:
        fill(where)

    torch.set_num_threads(1)  # for the process: a call beside this one sees it and stays in its own thread
    try:
        # Again in each thread: MKL's setting is a thread's own
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for part in [pool.submit(work, where) for where in slabs]:
                part.result()
    finally:
        torch.set_num_threads(num_threads)


def resampled_planes(
    array: torch.Tensor, shape: tuple[int, ...], orders: tuple[int, ...], where: slice
) -> torch.Tensor:
    """Planes `where`, a slab of `slabs_of`, of `array` (*old_shape) at `shape`: float32 (planes, *shape[1:])."""
    planes = array[source_planes(array.shape[0], shape[0], orders[0], where)]
    return resampled_slab(planes, array.shape[0], shape, orders, where)


def resampled_slab(
    planes: torch.Tensor, num_in: int, shape: tuple[int, ...], orders: tuple[int, ...], where: slice
) -> torch.Tensor:
    """`resampled_planes` of an array of `num_in` planes, given only those that `source_planes` names."""
    ndim = len(shape)
    if num_in == shape[0]:
        slab = planes.float().contiguous()
    else:
        block = axis_blocks(num_in, shape[0], orders[0], planes.device)[where.start // BLOCK]
        flat = planes.float().reshape(block.weights.shape[1], -1)
        slab = (block.weights @ flat).reshape(-1, *planes.shape[1:])
    # Shrinking axes first keeps what the next ones have to work on small.
    for axis in sorted(range(1, ndim), key=lambda a: shape[a] / planes.shape[a]):
        if slab.shape[axis] != shape[axis]:
            slab = _along(slab, axis, shape[axis], orders[axis])
    return slab


def _along(slab: torch.Tensor, axis: int, num_out: int, order: int) -> torch.Tensor:
    """Resample one axis other than the first of a contiguous slab."""
    num_in = slab.shape[axis]
    lines = math.prod(slab.shape[:axis])
    size = [*slab.shape]
    size[axis] = num_out
    out = torch.empty(size, dtype=torch.float32, device=slab.device)
    if axis == slab.ndim - 1:
        source, target = slab.view(lines, num_in), out.view(lines, num_out)
        for block in axis_blocks(num_in, num_out, order, slab.device):
            torch.mm(source[:, block.source], block.weights.T, out=target[:, block.out])
        return out
    source, target = slab.view(lines, num_in, -1), out.view(lines, num_out, -1)
    for block in axis_blocks(num_in, num_out, order, slab.device):
        target[:, block.out] = block.weights @ source[:, block.source]
    return out


def resample_labels(labels: torch.Tensor, shape: tuple[int, ...], num_classes: int) -> torch.Tensor:
    """Resample a map of class indices: the class with the largest linearly interpolated share. No new values arise.

    Where all neighbours are of one class, that is the answer. Elsewhere shares are compared as whole numbers (the
    weights of an axis are multiples of 1 / (2 n_out)), so that ties are ties, whatever the rounding of a machine.

    Args:
        labels: uint8, shape (*old_shape), at most 3 axes.
        shape: the new shape.
        num_classes: indices are 0 … num_classes - 1, or `IGNORE_INDEX`, which counts as one class more: what is
            ignored becomes no class, and no class is ignored. Ties go to the lower index.
    Returns:
        uint8, shape (*shape).
    Raises:
        MedsegError: E_LABEL if there is an index beyond num_classes - 1.
    """
    highest = int(labels.max())
    if highest == IGNORE_INDEX:
        highest = int(labels.masked_fill(labels == IGNORE_INDEX, 0).max())
    if highest >= num_classes:
        raise MedsegError(
            Code.LABEL,
            "class index that nothing declares",
            expected=f"0 … {num_classes - 1}",
            got=str(highest),
            remedy="map label ids to class indices first",
        )
    old = tuple(labels.shape)
    if old == tuple(shape):
        return labels
    labels = labels.contiguous()
    axes = [_corners(n, m, labels.device) for n, m in zip(old, shape, strict=True)]
    result = torch.empty(shape, dtype=torch.uint8, device=labels.device)

    def fill(where: slice) -> None:
        low = axes[0].low[where]
        begin, end = int(low[0]), int(low[-1]) + 1
        # One more plane than there are cells, unless the axis stays as it is
        cells = _cells(labels[begin : end + axes[0].reach], axes)
        slab = cells.index_select(0, low - begin)
        for axis in range(1, len(shape)):
            if old[axis] != shape[axis]:
                slab = slab.index_select(axis, axes[axis].low)
        result[where] = slab
        _decide_mixed(result[where], labels, axes, where.start)

    each_slab(fill, slabs_of(shape[0]), labels.device)
    return result


@dataclass(frozen=True)
class _Corners:
    """Along one axis, for each output voxel: the input voxel below it, and the shares of that and the next one.

    Args:
        low: int64 (num_out,).
        weights: whole numbers of the same sum, (num_out,) each; one where the axis stays as it is.
        total: that sum.
    """

    low: torch.Tensor
    weights: tuple[torch.Tensor, ...]
    total: int

    @property
    def reach(self) -> int:
        return len(self.weights) - 1


def _corners(num_in: int, num_out: int, device: torch.device) -> _Corners:
    index = torch.arange(num_out, device=device)
    if num_in in (1, num_out):
        return _Corners(index if num_in == num_out else torch.zeros_like(index), (torch.ones_like(index),), 1)
    # The position is a fraction of this denominator: ((2 i + 1) num_in - num_out) / (2 num_out)
    common = math.gcd(2 * num_in, num_in - num_out, 2 * num_out)
    total = 2 * num_out // common
    position = (((2 * index + 1) * num_in - num_out) // common).clamp(0, (num_in - 1) * total)
    low = (position // total).clamp(max=num_in - 2)
    high_weight = position - low * total
    return _Corners(low, (total - high_weight, high_weight), total)


def _cells(labels: torch.Tensor, axes: list[_Corners]) -> torch.Tensor:
    """The class of each cell between neighbouring voxels, `MIXED` where they differ: one fewer along changed axes."""
    low = high = labels
    for axis, corners in enumerate(axes):
        if corners.reach:
            num = low.shape[axis] - 1
            low = torch.minimum(low.narrow(axis, 0, num), low.narrow(axis, 1, num))
            high = torch.maximum(high.narrow(axis, 0, num), high.narrow(axis, 1, num))
    return (low != high).to(torch.uint8).mul_(MIXED).bitwise_or_(low)


def _decide_mixed(out: torch.Tensor, labels: torch.Tensor, axes: list[_Corners], first: int) -> None:
    """Replace `MIXED` in `out`, planes from `first` on of the result, by the class with the largest share."""
    flat = out.view(-1)
    mixed = (flat == MIXED).nonzero().squeeze(1)
    total = math.prod(corners.total for corners in axes)
    dtype = torch.int32 if total < 2**31 else torch.int64
    for chunk in torch.split(mixed, MIXED_CHUNK):
        base = torch.zeros_like(chunk)
        rest, stride = chunk, 1
        corner_offsets, corner_weights = [0], [torch.ones((), dtype=dtype, device=out.device)]
        for axis in reversed(range(out.ndim)):
            size = out.shape[axis]
            index, rest = rest % size, rest // size
            if axis == 0:
                index = index + first
            base += axes[axis].low[index] * stride
            weights = [w[index].to(dtype) for w in axes[axis].weights]
            corner_offsets = [o + step * stride for step in range(len(weights)) for o in corner_offsets]
            corner_weights = [w * v for w in weights for v in corner_weights]
            stride *= labels.shape[axis]
        source = labels.view(-1)
        classes = [source.index_select(0, base + offset) for offset in corner_offsets]
        flat[chunk] = _largest_share(torch.stack(classes), torch.stack(corner_weights), total)


def _largest_share(classes: torch.Tensor, weights: torch.Tensor, total: int) -> torch.Tensor:
    """The class of the largest sum of weights, ties to the lower: (corners, n) classes and weights → (n,)."""
    low, high = classes.amin(0), classes.amax(0)
    low_share = (weights * (classes == low)).sum(0, dtype=weights.dtype)
    high_share = (weights * (classes == high)).sum(0, dtype=weights.dtype)
    winner = torch.where(high_share > low_share, high, low)
    # More than two classes: seldom
    several = (low_share + high_share < total).nonzero().squeeze(1)
    if len(several):
        classes, weights = classes[:, several], weights[:, several]
        best, best_share = classes[0], torch.zeros_like(weights[0])
        for candidate in classes:
            share = (weights * (classes == candidate)).sum(0, dtype=weights.dtype)
            better = (share > best_share) | ((share == best_share) & (candidate < best))
            best, best_share = torch.where(better, candidate, best), torch.maximum(share, best_share)
        winner[several] = best
    return winner
