"""From logits on a model's grid to labels on the scan's own, some planes at a time.

Logits are resampled linearly, class by class with a running argmax: never all classes at the scan's size. The logits
themselves may come some planes at a time too (`sliding_window_planes`).

K classes (or regions), S the model's grid. Where uncertainty is wanted, logits have 2 K + 1 channels
(`medseg.inference.uncertainty`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.data.preprocess import covered_box
from medseg.inference.prediction import Wanted
from medseg.inference.uncertainty import entropy, largest_entropy
from medseg.labels import Labels
from medseg.resampling import each_slab, resampled_slab, running_argmax, slabs_of, source_planes
from medseg.volume import Grid, Volume

NOTHING_MORE = Wanted()


class Decoding:
    """Class indices on a scan's grid, and if wanted probabilities and uncertainty, filled slab by slab.

    Args:
        labels: the classes.
        covered: what is filled: voxels of the scan, its axes perhaps permuted and flipped. The rest is background.
        scan: the scan's grid.
        wanted: what is made besides the class indices.
    """

    def __init__(self, labels: Labels, covered: Grid, scan: Grid, wanted: Wanted = NOTHING_MORE) -> None:
        self.labels = labels
        self.covered = covered
        self.scan = scan
        self.indices = Volume(np.zeros(scan.shape, np.uint8), scan)
        self.probabilities: Volume | None = None
        self.uncertainty: Volume | None = None
        self.disagreement: Volume | None = None
        if wanted.probabilities:
            array = _zeros((labels.num_outputs, *scan.shape), wanted)
            if covered.shape != scan.shape and not labels.regions:
                array[0] = 1
            self.probabilities = Volume(array, scan)
        if wanted.uncertainty:
            self.uncertainty = Volume(np.zeros(scan.shape, np.float16), scan)
            self.disagreement = Volume(np.zeros(scan.shape, np.float16), scan)
        self._indices = self._view(self.indices)
        self._probabilities = None if self.probabilities is None else self._view(self.probabilities)
        self._uncertainty = None if self.uncertainty is None else self._view(self.uncertainty)
        self._disagreement = None if self.disagreement is None else self._view(self.disagreement)

    def fill(
        self,
        where: slice,
        scores: Callable[[int], Tensor],
        *,
        probabilities: bool = False,
        doubt: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Fill a slab.

        Args:
            where: planes of the first axis of `covered`.
            scores: class or region → its logits at these planes, float32 (n, *covered.shape[1:]); asked for more than
                once where more than labels is wanted.
            probabilities: the scores are probabilities.
            doubt: gives entropy and disagreement at these planes in nats; asked where uncertainty is wanted.
        """
        num_outputs = self.labels.num_outputs
        if self._uncertainty is not None and self._disagreement is not None and doubt is not None:
            largest = largest_entropy(num_outputs, regions=bool(self.labels.regions))
            for array, values in zip((self._uncertainty, self._disagreement), doubt(), strict=True):
                array[where] = (values / largest).clamp_(0, 1).half().cpu().numpy()
        if self.labels.regions:
            stacked = torch.stack([scores(index) for index in range(num_outputs)])
            decoded = self.labels.decode(stacked, threshold=0.5 if probabilities else 0.0)
            self._indices[where] = decoded.cpu().numpy()
            if self._probabilities is not None:
                self._keep(where, (stacked if probabilities else stacked.sigmoid_()).__getitem__)
            return
        self._indices[where] = running_argmax(scores, num_outputs).cpu().numpy()
        if self._probabilities is None:
            return
        if probabilities:
            self._keep(where, scores)
        else:
            log_sum = scores(0)
            for index in range(1, num_outputs):
                log_sum = torch.logaddexp(log_sum, scores(index))
            self._keep(where, lambda index: (scores(index) - log_sum).exp_())

    def fill_resampled(self, planes: Iterable[tuple[int, Tensor]], num_in: int) -> None:
        """Fill everything from logits on a model's grid.

        Args:
            planes: first plane and logits (K, n, *S[1:]) of the next n, as `sliding_window_planes` yields them.
            num_in: planes in all, S[0].
        """
        shape = self.covered.shape
        waiting = slabs_of(shape[0])
        held = _Held()
        for first, logits in planes:
            held.add(first, logits)
            ready = [where for where in waiting if source_planes(num_in, shape[0], 1, where).stop <= held.stop]
            waiting = waiting[len(ready) :]
            each_slab(lambda where, held=held: self._fill_from(held, num_in, where), ready, logits.device)  # type: ignore[misc]
            held.keep_from(source_planes(num_in, shape[0], 1, waiting[0]).start if waiting else held.stop)

    def _fill_from(self, held: _Held, num_in: int, where: slice) -> None:
        shape = self.covered.shape
        source = source_planes(num_in, shape[0], 1, where)
        orders = (1,) * len(shape)
        num_outputs, regions = self.labels.num_outputs, bool(self.labels.regions)

        def scores(index: int) -> Tensor:
            return resampled_slab(held.planes(index, source), num_in, shape, orders, where)

        def doubt() -> tuple[Tensor, Tensor]:
            together = entropy(lambda index: scores(num_outputs + index), num_outputs, regions=regions)
            return together, scores(2 * num_outputs)

        self.fill(where, scores, doubt=doubt)

    def _keep(self, where: slice, probability: Callable[[int], Tensor]) -> None:
        """Put away the probabilities of a slab."""
        for index in range(self.labels.num_outputs):
            if self._probabilities is not None:
                self._probabilities[index, where] = probability(index).half().cpu().numpy()

    def _view(self, volume: Volume) -> NDArray[np.generic]:
        """The covered voxels of an array on the scan's grid, with the axes of `covered`; writing there writes it."""
        turned = volume if self.scan.is_picture else volume.reoriented(self.covered.orientation)
        lead = (slice(None),) * (turned.array.ndim - self.scan.ndim)
        return turned.array[(*lead, *covered_box(self.covered, turned.grid))]


class _Held:
    """Planes of logits that are finished and still needed."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, Tensor]] = []
        self.stop = 0

    def add(self, first: int, logits: Tensor) -> None:
        self.parts.append((first, logits))
        self.stop = first + logits.shape[1]

    def planes(self, index: int, source: slice) -> Tensor:
        """Planes of one class."""
        found = [
            logits[index, max(source.start - first, 0) : source.stop - first]
            for first, logits in self.parts
            if first < source.stop and source.start < first + logits.shape[1]
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def keep_from(self, plane: int) -> None:
        """Forget the planes before one, and make the others safe from being overwritten."""
        rest = [logits[:, max(plane - first, 0) :] for first, logits in self.parts if plane < first + logits.shape[1]]
        self.parts = [(plane, torch.cat(rest, 1))] if rest else []


def _zeros(shape: tuple[int, ...], wanted: Wanted) -> NDArray[np.generic]:
    """Zeros of float16 in memory, or in a file without a name that vanishes with the array."""
    if wanted.scratch is None:
        return np.zeros(shape, np.float16)
    with tempfile.TemporaryFile(dir=wanted.scratch) as file:
        return np.memmap(file, dtype=np.float16, mode="w+", shape=shape)
