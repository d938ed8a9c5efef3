"""Prepared cases → batches of patches.

Each batch is a pure function of (seed, step): nothing has to be saved to resume, and batches may be made ahead in a
thread without changing what they hold.

One thread makes them. On a CPU cutting took 0.8 % of a step's processor time, and augmentation, which is part of the
step, 1.1 % (the plan of the demo's phantom, one core): a second thread would win nothing there, and take its core from
the convolutions.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from medseg.data.prepared import PreparedCase

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
        annotated_only: centre the rest of a batch on voxels of any class, background included: where voxels are
            ignored, patches from anywhere might hold nothing to learn from (as nnU-Net).
        even_classes: draw the class of a patch centred on foreground first, and then a case that has it: classes that
            few cases have are seen as often as others; else the case first (as nnU-Net).
        share: (rank, number) of this process where several make a batch together: of its samples it makes every
            `number`-th from `rank` on, the same as one process would.
    """

    cases: Sequence[PreparedCase]
    patch_size: tuple[int, ...]
    batch_size: int
    foreground_share: float
    seed: int
    mirror_padding: bool = False
    margin: tuple[int, ...] | None = None
    cut_size: Callable[[int, int], tuple[int, ...]] | None = None
    annotated_only: bool = False
    even_classes: bool = False
    share: tuple[int, int] = (0, 1)

    @property
    def indices(self) -> range:
        """Which samples of a batch this sampler makes."""
        first, every = self.share
        return range(first, self.batch_size, every)

    @cached_property
    def _cases_of_class(self) -> list[tuple[int, list[PreparedCase]]]:
        """Foreground classes that occur, with the cases that have them."""
        num_classes = max(len(case.locations) for case in self.cases)
        having = [(c, [case for case in self.cases if len(case.locations[c])]) for c in range(1, num_classes)]
        return [(number, cases) for number, cases in having if cases]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of a step: image (N, C, *L) float32 and label (N, *L) uint8, with L the `cut_size` of the step.

        Of several processes each gets the samples of its share.
        """
        images, labels = [], []
        size = self.patch_size if self.cut_size is None else self.cut_size(step, self.batch_size)
        around = [(n - p) // 2 for n, p in zip(size, self.patch_size, strict=True)]
        num_foreground = math.ceil(self.batch_size * self.foreground_share)
        for index in self.indices:
            rng = np.random.default_rng([self.seed, step, index])
            case = self.cases[int(rng.integers(len(self.cases)))]
            centred, wanted = index >= self.batch_size - num_foreground, None
            if centred and self.even_classes and self._cases_of_class:
                wanted, having = self._cases_of_class[int(rng.integers(len(self._cases_of_class)))]
                case = having[int(rng.integers(len(having)))]
            start = [s - a for s, a in zip(self._start(case, centred, rng, wanted), around, strict=True)]
            image, label = case.cut(start, size, mirror=self.mirror_padding)
            images.append(image)
            labels.append(label)
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

    def _start(
        self, case: PreparedCase, centred: bool, rng: np.random.Generator, wanted: int | None = None
    ) -> tuple[int, ...]:
        """First voxel of the patch; negative where the patch is larger than the case (it is centred then)."""
        shape = case.shape
        present = [c for c in range(1, len(case.locations)) if len(case.locations[c])] if wanted is None else [wanted]
        centre = None
        if centred and present:
            voxels = case.locations[present[int(rng.integers(len(present)))]]
            centre = voxels[int(rng.integers(len(voxels)))]
        elif self.annotated_only and any(map(len, case.locations)):
            ends = np.cumsum([len(voxels) for voxels in case.locations])
            number = int(rng.integers(ends[-1]))
            index = int(np.searchsorted(ends, number, side="right"))
            centre = case.locations[index][number - int(ends[index]) + len(case.locations[index])]
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
