"""Where along a scan a prediction goes wrong: errors per slice, and the slices worth looking at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from medseg.labels import IGNORE_INDEX, Labels
from medseg.reports.overlay import FALSE_NEGATIVE, FALSE_POSITIVE, OTHER_CLASS
from medseg.reports.planes import slice_axis
from medseg.volume import MODEL_ORIENTATION, Volume

APART_MM = 10.0
"""Slices closer than this mostly show one and the same error."""
_DIRECTIONS = ("inferior to superior", "anterior to posterior", "right to left")
"""Along the axes of `MODEL_ORIENTATION`."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SliceErrors:
    """Wrong voxels of each slice, in the plane in which the case was scanned (`planes.slice_axis`).

    Args:
        num_extra: voxels of a class where the reference has background, shape (num_slices,). Voxels that the
            reference ignores are in none of these.
        num_missed: voxels of background where the reference has a class.
        num_other: voxels of another class than the reference's.
        dice: overlap of all classes together; NaN where both are empty.
        spacing_mm: distance of two slices; 1 for pictures.
        direction: which way the slices are counted; "" for pictures.
    """

    num_extra: Counts
    num_missed: Counts
    num_other: Counts
    dice: NDArray[np.float64]
    spacing_mm: float
    direction: str

    @classmethod
    def of(cls, reference: Volume, predicted: Volume, labels: Labels) -> SliceErrors:
        """Count them.

        Args:
            reference: label map with the values of files.
            predicted: label map on the reference's grid; its axes may be flipped.
            labels: what the values mean.
        Raises:
            MedsegError: E_GRID if the two do not lie on one grid, E_LABEL for unknown values.
        """
        if predicted.grid.difference(reference.grid) is not None:
            predicted = predicted.oriented_as(reference.grid)
        is_picture = reference.grid.is_picture
        axis = 0 if is_picture else slice_axis(reference.grid)

        def as_slices(mask: Volume) -> NDArray[np.uint8]:
            array = labels.to_index(mask.array[None] if is_picture else mask.reoriented().array)
            return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)

        truth, guess = as_slices(reference), as_slices(predicted)
        ignored = truth == IGNORE_INDEX
        truth[ignored] = guess[ignored] = 0
        both = (truth > 0) & (guess > 0)
        agreeing = (both & (truth == guess)).sum(axis=1)
        foreground = (truth > 0).sum(axis=1) + (guess > 0).sum(axis=1)
        dice = np.where(foreground > 0, 2 * agreeing / np.maximum(foreground, 1), np.nan)
        spacing = 1.0 if is_picture else reference.grid.reoriented(MODEL_ORIENTATION).spacing_mm[axis]
        return cls(
            ((guess > 0) & (truth == 0)).sum(axis=1),
            ((guess == 0) & (truth > 0)).sum(axis=1),
            (both & (truth != guess)).sum(axis=1),
            dice,
            spacing,
            "" if is_picture else _DIRECTIONS[axis],
        )

    @property
    def num_wrong(self) -> Counts:
        """All wrong voxels, shape (num_slices,)."""
        return self.num_extra + self.num_missed + self.num_other

    def worst(self, num: int = 3) -> list[int]:
        """Indices of at most `num` slices with the most wrong voxels, `APART_MM` from each other, the worst first."""
        chosen: list[int] = []
        for index in np.argsort(-self.num_wrong, kind="stable").tolist():
            if len(chosen) == num or not self.num_wrong[index]:
                break
            if all(abs(index - other) * self.spacing_mm >= APART_MM for other in chosen):
                chosen.append(index)
        return chosen

    def figure(self) -> Figure:
        """Wrong voxels over the slices, stacked by kind in the colours of the error maps; the worst are numbered."""
        figure = Figure(figsize=(8, 2.6), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        numbers, below = np.arange(1, len(self.dice) + 1), np.zeros(len(self.dice))
        kinds = (
            ("missed", self.num_missed, FALSE_NEGATIVE),
            ("too much", self.num_extra, FALSE_POSITIVE),
            ("other class", self.num_other, OTHER_CLASS),
        )
        for name, counts, colour in kinds:
            ax.bar(numbers, counts, width=0.9, bottom=below, color=colour, label=name, edgecolor="#555555", lw=0.5)
            below += counts
        for index in self.worst():
            ax.annotate(str(index + 1), (index + 1, below[index]), ha="center", va="bottom", fontsize=8)
        ax.margins(x=0.01)
        ax.set_ylim(0, 1.15 * max(1, below.max()))  # room for the numbers above the bars
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel(f"slice ({self.direction})" if self.direction else "picture")
        ax.set_ylabel("wrong voxels")
        ax.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        ax.spines[["top", "right"]].set_visible(False)
        return figure
