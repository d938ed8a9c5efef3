"""What a prediction of one scan gives, and what may be asked for besides the labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medseg.volume import Volume


@dataclass(frozen=True)
class Wanted:
    """What is wanted besides the label map.

    Args:
        probabilities: of each class or region.
        uncertainty: how unsure the models are of each voxel, and how much they disagree.
        scratch: folder for a nameless file that holds the probabilities in place of memory; None is memory.
    """

    probabilities: bool = False
    uncertainty: bool = False
    scratch: Path | None = None


@dataclass(frozen=True, eq=False)
class Prediction:
    """The answer to one scan; everything lies on exactly the scan's grid.

    Args:
        indices: class indices, uint8 (*S), post-processed.
        labels: the same in the values of the training labels, smallest integer type.
        probabilities: float16 (K, *S): of all classes, the background first; with regions of each region. Those of
            the mean logits (of several plans: the mean of theirs), before post-processing. Outside the part of the
            scan that the model sees it is background for certain. None where they were not wanted.
        uncertainty: float16 (*S), 0 … 1: the entropy of the mean of the probabilities that tiles, mirrored passes and
            folds give, as a share of the largest that it can be; with regions the mean over them, each being there or
            not. Where these disagree, and where all are unsure, it is high. None where it was not wanted.
        disagreement: float16 (*S), in the same measure: the part of the uncertainty that is not in each of them alone
            (`medseg.inference.uncertainty`), 0 where there is only one. None where uncertainty was not wanted.
    """

    indices: Volume
    labels: Volume
    probabilities: Volume | None = None
    uncertainty: Volume | None = None
    disagreement: Volume | None = None
