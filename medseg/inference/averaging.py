"""The mean of the answers of models with different plans, on the scan's own grid.

Some planes of one class are worked on at a time: beside the logits on the models' grids only such a slab is held.

K classes (or regions), S a model's grid. Where uncertainty is wanted, logits have 2 K + 1 channels
(`medseg.inference.uncertainty`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg.axis_matrices import BLOCK
from medseg.data.preprocess import covered_box
from medseg.inference.decoding import NOTHING_MORE, Decoding
from medseg.inference.memory import STITCHED_ON_HOST
from medseg.inference.prediction import Wanted
from medseg.inference.predictor import decode
from medseg.inference.uncertainty import entropy
from medseg.labels import Labels
from medseg.resampling import each_slab, resampled_planes, slabs_of
from medseg.volume import Grid, Volume

log = logging.getLogger(__name__)

AXIS = {letter: axis for axis, letters in enumerate(("RL", "AP", "SI")) for letter in letters}
"""The axis of the patient that a letter of an orientation means."""


@torch.no_grad()
def decode_mean(logits: Sequence[tuple[Tensor, Grid]], weights: Sequence[float], labels: Labels, scan: Grid) -> Volume:
    """Class indices of the mean of several models' probabilities, on the scan's grid.

    Args:
        logits: for each model (K, *S), and the voxels of the scan that they cover, as `Predictor.logits_of` gives
            them. Where they are on several devices, they are worked on in the computer's memory.
        weights: the models' shares in the mean.
        labels: the classes.
        scan: the scan's grid.
    Returns:
        uint8 class indices; of equal means the lower class. Of one model exactly its own answer.
    """
    if len(logits) == 1:
        return decode(*logits[0], labels, scan)
    return mean_decoding(logits, weights, labels, scan).indices


@torch.no_grad()
def mean_decoding(
    logits: Sequence[tuple[Tensor, Grid]],
    weights: Sequence[float],
    labels: Labels,
    scan: Grid,
    wanted: Wanted = NOTHING_MORE,
) -> Decoding:
    """`decode_mean` of several models, with what else is wanted.

    The logits are resampled linearly to the scan's voxels; there they become probabilities (softmax over the classes,
    sigmoid of regions), and the mean decides. Outside the part that a model covers its answer is background.
    """
    is_host = [found.device.type == "cpu" for found, _ in logits]
    if all(is_host) or not any(is_host):
        try:
            return _mean(logits, weights, labels, scan, wanted)
        except torch.OutOfMemoryError:
            if all(is_host):
                raise
            log.warning(STITCHED_ON_HOST)
    # Some of the models, or what is made of them here, found no room on the device.
    return _mean([(found.cpu(), covered) for found, covered in logits], weights, labels, scan, wanted)


def _mean(
    logits: Sequence[tuple[Tensor, Grid]], weights: Sequence[float], labels: Labels, scan: Grid, wanted: Wanted
) -> Decoding:
    """`mean_decoding` where all logits are."""
    # Worked on with the axes of the first model; most have the same, up to their order.
    grid = scan if scan.is_picture else scan.reoriented(logits[0][1].orientation)
    parts = [_Part.of(*model, weight, grid) for model, weight in zip(logits, weights, strict=True)]
    decoding = Decoding(labels, grid, scan, wanted)

    def fill(where: slice) -> None:
        size = (where.stop - where.start, *grid.shape[1:])
        scales = [None if labels.regions else part.log_sum(labels.num_outputs, where) for part in parts]

        def probability(index: int) -> Tensor:
            mean = torch.zeros(size, device=logits[0][0].device)
            for part, scale in zip(parts, scales, strict=True):
                if labels.regions:
                    part.add_region(mean, index, where)
                else:
                    part.add_class(mean, index, scale, where)
            return mean

        def doubt() -> tuple[Tensor, Tensor]:
            return _doubt(parts, labels, where, size)

        decoding.fill(where, probability, probabilities=True, doubt=doubt)

    each_slab(fill, slabs_of(grid.shape[0]), logits[0][0].device)
    return decoding


def _doubt(parts: Sequence[_Part], labels: Labels, where: slice, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Entropy of the mean of all passes of all models at a slab, and their disagreement, in nats.

    A model's passes disagree among themselves, and models with each other: what is missing of the entropy of the mean
    in the mean of theirs.
    """
    num_outputs, regions = labels.num_outputs, bool(labels.regions)
    alone = torch.zeros(size, device=parts[0].logits.device)
    for part in parts:
        target = part.target(where)
        if target is not None:
            alone[target] += part.weight * part.mean_entropy(num_outputs, where, regions=regions)

    def probability(index: int) -> Tensor:
        mean = torch.zeros(size, device=parts[0].logits.device)
        for part in parts:
            outside = part.weight if index == 0 and not regions else 0.0  # background, for certain
            share = torch.full_like(mean, outside)
            target = part.target(where)
            if target is not None:
                share[target] = part.weight * part.planes(num_outputs + index, where)
            mean += share
        return mean

    together = entropy(probability, num_outputs, regions=regions)
    return together, together - alone


@dataclass(frozen=True, eq=False)
class _Part:
    """Logits of a model (K, *S) with the axes of a common grid, where they lie in it, and their share in the mean."""

    logits: Tensor
    box: tuple[slice, ...]
    weight: float

    @classmethod
    def of(cls, logits: Tensor, covered: Grid, weight: float, grid: Grid) -> _Part:
        if not grid.is_picture:
            ours, theirs = covered.orientation, grid.orientation
            order = [next(i for i, mine in enumerate(ours) if AXIS[mine] == AXIS[letter]) for letter in theirs]
            logits = logits.permute(0, *(1 + axis for axis in order))
            flipped = [1 + i for i, letter in enumerate(theirs) if letter not in ours]
            logits = logits.flip(flipped) if flipped else logits  # a copy
            covered = covered.reoriented(theirs)
        return cls(logits, covered_box(covered, grid), weight)

    def target(self, where: slice) -> tuple[slice, ...] | None:
        """What of a slab these logits cover, counted from its first plane; None if nothing."""
        low = max(where.start, self.box[0].start)
        high = min(where.stop, self.box[0].stop)
        return (slice(low - where.start, high - where.start), *self.box[1:]) if low < high else None

    def planes(self, index: int, where: slice) -> Tensor:
        """Logits of a class at the voxels of `target`, float32: made by the slabs of this part's own box."""
        begin = self.box[0].start
        low, high = max(where.start, begin) - begin, min(where.stop, self.box[0].stop) - begin
        shape = tuple(side.stop - side.start for side in self.box)
        slabs = [
            resampled_planes(self.logits[index], shape, (1,) * len(shape), slab)
            for slab in slabs_of(shape[0])
            if slab.start < high and low < slab.stop
        ]
        first = low // BLOCK * BLOCK
        return (slabs[0] if len(slabs) == 1 else torch.cat(slabs))[low - first : high - first]

    def log_sum(self, num_outputs: int, where: slice) -> Tensor | None:
        """log Σ exp over the classes at the voxels of `target`: what makes their softmax sum to 1."""
        if self.target(where) is None:
            return None
        total = self.planes(0, where)
        for index in range(1, num_outputs):
            total = torch.logaddexp(total, self.planes(index, where))
        return total

    def mean_entropy(self, num_outputs: int, where: slice, *, regions: bool) -> Tensor:
        """Mean entropy of the model's passes at the voxels of `target`, in nats."""
        together = entropy(lambda index: self.planes(num_outputs + index, where), num_outputs, regions=regions)
        return together - self.planes(2 * num_outputs, where)

    def add_class(self, mean: Tensor, index: int, log_sum: Tensor | None, where: slice) -> None:
        """Add the share of a class's probability to a slab."""
        target = self.target(where)
        inside = None if target is None or log_sum is None else (self.planes(index, where) - log_sum).exp_()
        if inside is not None and target is not None:
            mean[target] += self.weight * inside
        if index == 0:  # outside: background, for certain
            outside = torch.full_like(mean, self.weight)
            if target is not None:
                outside[target] = 0
            mean += outside

    def add_region(self, mean: Tensor, index: int, where: slice) -> None:
        """Add the share of a region's probability to a slab."""
        target = self.target(where)
        if target is not None:
            mean[target] += self.weight * self.planes(index, where).sigmoid_()
