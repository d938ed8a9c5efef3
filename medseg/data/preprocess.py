"""Scan → what the network sees. Training and prediction run this same code."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from medseg.data.cases import Case, load_image, load_label
from medseg.data.plan import Plan
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading
from medseg.labels import Labels
from medseg.resampling import resample, resample_labels
from medseg.volume import Grid, Volume

LOCATIONS_PER_CLASS = 10_000
"""Voxels of each class that are remembered for foreground sampling, drawn at random (as nnU-Net does)."""
MEMORY_SHARE = 0.6
"""Largest share of the machine's memory that prepared cases may take."""


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A labelled case as the network sees it.

    Args:
        case_id: the case.
        image: float32, shape (C, *S), normalised, on `grid`.
        label: uint8 class indices, shape (*S).
        grid: the grid that the network sees.
        locations: for each class index voxel positions of it, int32 (n, dims); empty arrays for absent classes.
    """

    case_id: str
    image: torch.Tensor
    label: torch.Tensor
    grid: Grid
    locations: tuple[np.ndarray, ...]


def prepare_image(volume: Volume, plan: Plan) -> tuple[torch.Tensor, Grid]:
    """Orient, resample and normalise an image.

    Args:
        volume: array (C, *S) as it was read.
        plan: what the network sees.
    Returns:
        float32 (C, *S') and the grid that it lies on (same axes as the plan, same box as the scan).
    Raises:
        MedsegError: E_MODEL if channels or dimensions do not fit the plan.
    """
    if volume.grid.ndim != plan.spatial_dims or volume.array.shape[0] != plan.num_channels:
        raise MedsegError(
            Code.MODEL,
            "the image does not fit the model",
            expected=f"{plan.num_channels} channel(s), {plan.spatial_dims}D",
            got=f"{volume.array.shape[0]} channel(s), {volume.grid.ndim}D",
            remedy="give the same channels, in the same order, as the training cases had",
        )
    oriented = volume if volume.grid.is_picture else volume.reoriented(plan.orientation)
    grid = planned_grid(oriented.grid, plan)
    image = torch.from_numpy(np.ascontiguousarray(oriented.array, dtype=np.float32))
    image = _normalise(image, plan)
    return resample(image, grid.shape, order=_image_order(oriented.grid, plan)), grid


def prepare_label(label: Volume, plan: Plan, num_classes: int) -> torch.Tensor:
    """Orient and resample class indices to what the network sees: uint8 (*S')."""
    oriented = label if label.grid.is_picture else label.reoriented(plan.orientation)
    indices = torch.from_numpy(np.ascontiguousarray(oriented.array, dtype=np.uint8))
    return resample_labels(indices, planned_grid(oriented.grid, plan).shape, num_classes)


def planned_grid(grid: Grid, plan: Plan) -> Grid:
    """The plan's grid over the same box: as many voxels as come closest to the plan's spacing."""
    if grid.is_picture:
        return grid
    ratio = np.array(grid.spacing_mm) / np.array(plan.spacing_mm)
    shape = tuple(max(1, round(float(n * r))) for n, r in zip(grid.shape, ratio, strict=True))
    return grid if shape == grid.shape else grid.resampled(shape)


def prepare_cases(
    cases: Sequence[Case],
    plan: Plan,
    labels: Labels,
    *,
    seed: int,
    num_threads: int,
    reading: Reading = STRICT,
    progress: Callable[[int, int], None] | None = None,
) -> list[PreparedCase]:
    """Read and prepare labelled cases into memory, in threads.

    Args:
        cases: with labels.
        plan: what the network sees.
        labels: the classes.
        seed: which voxels are remembered for foreground sampling.
        num_threads: cases read at a time.
        reading: what is asked of the readers beyond their strict defaults.
        progress: called with (done, total).
    Raises:
        MedsegError: what reading refuses; E_LIMIT if the cases do not fit into memory.
    """
    budget = MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    prepared: list[PreparedCase] = []
    used = 0
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        futures = [pool.submit(_prepare, case, plan, labels, seed, reading) for case in cases]
        try:
            for done, future in enumerate(futures, start=1):
                case = future.result()
                used += case.image.nbytes
                if used > budget:
                    raise MedsegError(
                        Code.LIMIT,
                        "the prepared cases do not fit into memory",
                        where="data.root",
                        expected=f"at most {budget / 2**30:.0f} GiB ({MEMORY_SHARE:.0%} of this machine)",
                        got=f"{used / 2**30:.0f} GiB after {done} of {len(futures)} cases",
                        remedy="choose a larger data.plan.spacing_mm, or fewer cases",
                    )
                prepared.append(case)
                if progress is not None:
                    progress(done, len(futures))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return prepared


def _prepare(case: Case, plan: Plan, labels: Labels, seed: int, reading: Reading) -> PreparedCase:
    volume = load_image(case, num_channels=plan.num_channels, reading=reading)
    label_volume = load_label(case, labels, volume.grid, reading)
    image, grid = prepare_image(volume, plan)
    label = prepare_label(label_volume, plan, labels.num_classes)
    rng = np.random.default_rng([seed, *case.case_id.encode()])
    return PreparedCase(case.case_id, image, label, grid, _locations(label.numpy(), labels.num_classes, rng))


def _locations(label: np.ndarray, num_classes: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    flat = label.ravel()
    found = []
    for index in range(num_classes):
        where = np.flatnonzero(flat == index)
        if len(where) > LOCATIONS_PER_CLASS:
            where = rng.choice(where, LOCATIONS_PER_CLASS, replace=False)
        found.append(np.stack(np.unravel_index(where, label.shape), axis=1).astype(np.int32))
    return tuple(found)


def _image_order(grid: Grid, plan: Plan) -> tuple[int, ...]:
    """Cubic along each axis, nearest along a coarse one: a spline between far slices rings (nnU-Net's rule)."""
    finest = min(*grid.spacing_mm, *plan.spacing_mm)
    return tuple(0 if max(s, t) > 3 * finest else 3 for s, t in zip(grid.spacing_mm, plan.spacing_mm, strict=True))


def _normalise(image: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Intensities of (C, *S) to about zero mean and unit deviation. A constant image becomes zero."""
    out = torch.empty_like(image)
    for channel, (low, high, mean, std) in enumerate(plan.intensity):
        if plan.normalisation == "ct":
            out[channel] = (image[channel].clamp(low, high) - mean) / std
        else:
            deviation, average = torch.std_mean(image[channel], correction=0)
            out[channel] = (image[channel] - average) / deviation.clamp(min=1e-8)
    return out
