"""What a scan will need of memory, planned before any tile goes through the network."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from medseg.axis_matrices import BLOCK
from medseg.data.memory import available_bytes
from medseg.errors import Code, MedsegError
from medseg.inference.prediction import Wanted
from medseg.inference.uncertainty import num_sums
from medseg.volume import Grid

log = logging.getLogger(__name__)

GIB = 2**30
FLOAT = 4
FILLING_COPIES = 4
"""Arrays of the size of a slab of one class that resampling and its running argmax hold."""
BESIDE_NETWORK = ("image", "logits of tiles")
"""What lies where the network is, wherever tiles are put together."""
STITCHED_ON_HOST = "the device's memory does not suffice: tiles are put together in main memory, which is slower"
TILE_COPIES = 3
"""Arrays of float32 of the size of a batch's logits: the network's own, mirrored back, and their sum."""


@dataclass(frozen=True)
class Footprint:
    """Sizes that decide how much memory the models of one plan take.

    Args:
        image: voxels along each axis of the image that the network sees (*S).
        patch: of a tile (*P).
        output: of what the network says of a tile (*Q).
        num_channels: of the image.
        num_outputs: K.
        batch_size: tiles in one forward pass.
    """

    image: tuple[int, ...]
    patch: tuple[int, ...]
    output: tuple[int, ...]
    num_channels: int
    num_outputs: int
    batch_size: int

    @property
    def plane(self) -> int:
        """Voxels of a plane that tiles cover."""
        return math.prod(max(s, q) for s, q in zip(self.image[1:], self.output[1:], strict=True))


@dataclass(frozen=True)
class MemoryPlan:
    """What is held at the same time, and how precisely.

    Args:
        dtype: in which logits are summed up: float16 only where float32 does not fit.
        on_device: what it is → bytes, where the network is.
        on_host: the same in main memory; empty where the network is there too.
        sums_on: where logits are summed up and resampled: main memory only where the device's does not suffice.
    """

    dtype: torch.dtype
    on_device: Mapping[str, int]
    on_host: Mapping[str, int]
    sums_on: torch.device


def plan_memory(
    scan: Grid,
    models: Sequence[Footprint],
    device: torch.device,
    *,
    wanted: Wanted,
    available: tuple[float, float] | None = None,
) -> MemoryPlan:
    """Choose the precision of the sums of logits and where they are, or refuse a scan that cannot be done.

    The models of one plan are worked on some planes at a time (`sliding_window_planes`): only those of several plans
    need whole logits. What the network itself takes for a batch of tiles is not known beforehand and comes on top.

    Args:
        scan: the scan's grid.
        models: one for each plan.
        device: of the networks.
        wanted: what is made besides the label map.
        available: bytes on the device and in main memory; None looks.
    Raises:
        MedsegError: E_LIMIT with the sizes.
    """
    on_device, on_host = available or (_free_on(device), available_bytes())
    together = device.type == "cpu"
    plans = [
        _planned(scan, models, device, wanted, dtype, sums_on)
        for sums_on in ([device] if together else [device, torch.device("cpu")])
        for dtype in (torch.float32, torch.float16)
    ]
    for plan in plans:
        if sum(plan.on_device.values()) <= on_device and sum(plan.on_host.values()) <= on_host:
            if plan.dtype == torch.float16:
                log.warning("logits are kept at half precision: at full precision they would not fit into memory")
            if plan.sums_on != device:
                log.warning(STITCHED_ON_HOST)
            return plan
    plan = plans[1]  # half precision on the device itself
    place = "main memory" if together or sum(plan.on_host.values()) > on_host else str(device)
    needed, free = (plan.on_device, on_device) if together or place == str(device) else (plan.on_host, on_host)
    sizes = sorted(needed.items(), key=lambda item: -item[1])
    raise MedsegError(
        Code.LIMIT,
        "the scan needs more memory than there is",
        where=f"{'×'.join(map(str, scan.shape))} voxels, {models[0].num_outputs} classes, {place}",
        expected=f"at most {free / GIB:.2f} GiB, which are free now",
        got=f"{sum(needed.values()) / GIB:.2f} GiB: "
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes if size > GIB / 100),
        remedy="close other programs, cut the scan to the part that matters"
        + (", predict without --probabilities" if wanted.probabilities else "")
        + (", without --uncertainty, which doubles the sums" if wanted.uncertainty else "")
        + (", or predict with one run instead of an ensemble" if len(models) > 1 else "")
        + ("" if together else ", or use --device cpu"),
    )


def _planned(
    scan: Grid,
    models: Sequence[Footprint],
    device: torch.device,
    wanted: Wanted,
    dtype: torch.dtype,
    sums_on: torch.device,
) -> MemoryPlan:
    """What is held where."""
    summed = [replace(m, num_outputs=num_sums(m.num_outputs)) for m in models] if wanted.uncertainty else models
    near, far = _on_device(scan, summed, dtype), _on_host(scan, models, device, wanted)
    if device.type == "cpu":
        return MemoryPlan(dtype, near | far, {}, sums_on)
    if sums_on != device:
        far |= {name: size for name, size in near.items() if name not in BESIDE_NETWORK}
        near = {name: size for name, size in near.items() if name in BESIDE_NETWORK}
    return MemoryPlan(dtype, near, far, sums_on)


def _on_device(scan: Grid, models: Sequence[Footprint], dtype: torch.dtype) -> dict[str, int]:
    """What lies where the networks are; models take turns, but whole logits of all plans stay."""
    found = {
        "sums of logits": max(m.num_outputs * min(m.output[0], _deep(m)) * m.plane for m in models) * dtype.itemsize,
        "logits of tiles": TILE_COPIES
        * FLOAT
        * max(m.batch_size * m.num_outputs * math.prod(m.output) for m in models),
        "image": 2 * FLOAT * max(m.num_channels * math.prod(_padded(m)) for m in models),
        "slabs": FILLING_COPIES * FLOAT * torch.get_num_threads() * BLOCK * math.prod(scan.shape[1:]),
    }
    if len(models) > 1:
        found["logits"] = sum(m.num_outputs * math.prod(m.image) for m in models) * dtype.itemsize
    else:  # planes that wait for the next ones
        waiting = min(_deep(models[0]), BLOCK * models[0].image[0] // scan.shape[0] + 3)
        found["planes that wait"] = models[0].num_outputs * waiting * models[0].plane * dtype.itemsize
    return found


def _on_host(scan: Grid, models: Sequence[Footprint], device: torch.device, wanted: Wanted) -> dict[str, int]:
    """What lies in main memory wherever the networks are."""
    voxels = math.prod(scan.shape)
    found = {"scan as float32": FLOAT * models[0].num_channels * voxels, "labels": 3 * voxels}
    if device.type != "cpu":
        found["prepared image"] = 2 * FLOAT * max(m.num_channels * math.prod(_padded(m)) for m in models)
    if wanted.probabilities and wanted.scratch is None:
        found["probabilities"] = 2 * models[0].num_outputs * voxels
    if wanted.uncertainty:
        found["uncertainty"] = 2 * 2 * voxels  # and disagreement, as float16
    return found


def _deep(model: Footprint) -> int:
    return max(model.image[0], model.output[0])


def _padded(model: Footprint) -> tuple[int, ...]:
    """Voxels of the image with what is added so that tiles fit."""
    return tuple(max(s, q) + p - q for s, p, q in zip(model.image, model.patch, model.output, strict=True))


def _free_on(device: torch.device) -> float:
    if device.type != "cuda":
        return available_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
