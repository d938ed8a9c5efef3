"""Prepared cases → batches of patches.

Each batch is a pure function of (seed, step): nothing has to be saved to resume, and batches may be made ahead in a
thread without changing what they hold.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medseg.data.preprocess import PreparedCase

BatchItem = tuple[int, torch.Tensor, torch.Tensor]
"""(step, image (N, C, *L) float32, label (N, *L) uint8)."""


@dataclass(frozen=True, eq=False)
class PatchSampler:
    """Draws patches from prepared cases.

    Args:
        cases: with labels.
        patch_size: voxels of a patch, model axes.
        batch_size: patches in a batch.
        foreground_share: share of a batch (its last samples) centred on a random voxel of a random foreground class.
        seed: of everything that is drawn.
        mirror_padding: fill what lies outside the case by reflection (pictures) instead of zeros (volumes, where 0 is
            the mean intensity).
        margin: voxels along each axis that the patch is larger than what the network labels of it, at either end
            (padding "valid"): patches may reach over the border by so much, or the border would never be learnt.
        cut_size: how large the patches of a (step, batch size) are cut, about the same middle: an even number of voxels
            more than `patch_size`, which augmentation turns into view; None: `patch_size`.
    """

    cases: Sequence[PreparedCase]
    patch_size: tuple[int, ...]
    batch_size: int
    foreground_share: float
    seed: int
    mirror_padding: bool = False
    margin: tuple[int, ...] | None = None
    cut_size: Callable[[int, int], tuple[int, ...]] | None = None

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of a step: image (N, C, *L) float32 and label (N, *L) uint8, with L the `cut_size` of the step."""
        images, labels = [], []
        size = self.patch_size if self.cut_size is None else self.cut_size(step, self.batch_size)
        around = [(n - p) // 2 for n, p in zip(size, self.patch_size, strict=True)]
        num_foreground = math.ceil(self.batch_size * self.foreground_share)
        for index in range(self.batch_size):
            rng = np.random.default_rng([self.seed, step, index])
            case = self.cases[int(rng.integers(len(self.cases)))]
            centred = index >= self.batch_size - num_foreground
            start = [s - a for s, a in zip(self._start(case, centred, rng), around, strict=True)]
            images.append(cut(case.image, start, size, mirror=self.mirror_padding))
            labels.append(cut(case.label[None], start, size, mirror=self.mirror_padding)[0])
        return torch.stack(images), torch.stack(labels)

    def prefetch(self, first_step: int, ahead: int = 3) -> Generator[BatchItem, None, None]:
        """Batches from `first_step` on, made ahead by one thread. An error there is raised here, whole."""
        ready: queue.Queue[BatchItem | BaseException] = queue.Queue(maxsize=ahead)
        stop = threading.Event()

        def put(item: BatchItem | BaseException) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                except queue.Full:
                    continue
                return

        def work() -> None:
            step = first_step
            try:
                while not stop.is_set():
                    put((step, *self.batch(step)))
                    step += 1
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="patch-sampler", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _start(self, case: PreparedCase, centred: bool, rng: np.random.Generator) -> tuple[int, ...]:
        """First voxel of the patch; negative where the patch is larger than the case (it is centred then)."""
        shape = case.image.shape[1:]
        present = [c for c in range(1, len(case.locations)) if len(case.locations[c])]
        centre = None
        if centred and present:
            voxels = case.locations[present[int(rng.integers(len(present)))]]
            centre = voxels[rng.integers(len(voxels))]
        start = []
        margins = self.margin or (0,) * len(shape)
        for axis, (size, patch, margin) in enumerate(zip(shape, self.patch_size, margins, strict=True)):
            first, last = -margin, size - patch + margin
            if last <= first:
                start.append(-((patch - size) // 2))
            elif centre is not None:
                start.append(int(np.clip(centre[axis] - patch // 2, first, last)))
            else:
                start.append(int(rng.integers(first, last + 1)))
        return tuple(start)


def cut(array: torch.Tensor, start: Sequence[int], size: Sequence[int], *, mirror: bool = False) -> torch.Tensor:
    """A box of an array, filled up where it reaches over the border.

    Args:
        array: shape (C, *S).
        start: first voxel along each spatial axis, may be negative.
        size: voxels of the box along each spatial axis.
        mirror: fill by reflection; otherwise with zeros.
    Returns:
        shape (C, *size); a view where nothing had to be filled.
    """
    shape = array.shape[1:]
    inside = all(s >= 0 and s + n <= m for s, n, m in zip(start, size, shape, strict=True))
    if inside:
        return array[(slice(None), *(slice(s, s + n) for s, n in zip(start, size, strict=True)))]
    if mirror:
        for axis, (s, n, m) in enumerate(zip(start, size, shape, strict=True)):
            array = array.index_select(axis + 1, torch.from_numpy(_reflected(s, n, m)).to(array.device))
        return array
    box = array.new_zeros((array.shape[0], *size))
    source, target = [slice(None)], [slice(None)]
    for s, n, m in zip(start, size, shape, strict=True):
        low, high = max(s, 0), max(min(s + n, m), max(s, 0))
        source.append(slice(low, high))
        target.append(slice(low - s, high - s))
    box[tuple(target)] = array[tuple(source)]
    return box


def _reflected(start: int, size: int, length: int) -> np.ndarray:
    """Indices start … start+size-1 folded into 0 … length-1 without repeating the border voxel."""
    period = max(2 * (length - 1), 1)
    index = np.abs(np.arange(start, start + size)) % period
    return np.where(index >= length, period - index, index)
