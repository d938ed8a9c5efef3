"""What all networks that are looked at have in common: segmenters, which answer at each place, and classifiers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from medseg.errors import Code, MedsegError
from medseg.models import SegmentationModel
from medseg.models.classifiers import ClassificationModel

Network = SegmentationModel | ClassificationModel
Axes = tuple[int, ...]


def answer_size(model: Network, size: Sequence[int]) -> Axes:
    """Voxels of the result along each axis; () of a classifier, which has one answer for the image.

    Args:
        model: the network.
        size: of the image.
    Raises:
        MedsegError: E_MODEL if the size does not fit; names the nearest that do.
    """
    size = tuple(size)
    if len(size) != model.spatial_dims or min(size) < 1:
        raise MedsegError(
            Code.MODEL,
            "the size has another number of axes than the model",
            expected=f"{model.spatial_dims} positive numbers",
            got=size,
        )
    if isinstance(model, SegmentationModel):
        return model.output_size(size)
    if any(n < least for n, least in zip(size, model.smallest_size, strict=True)):
        nearest = tuple(max(n, least) for n, least in zip(size, model.smallest_size, strict=True))
        raise MedsegError(
            Code.MODEL,
            "the image is too small: nothing is left of it at the lowest resolution",
            expected=f"at least {model.smallest_size}",
            got=size,
            remedy=f"the nearest that fits: {nearest}",
        )
    return ()


def fitting_size(model: Network, size: Sequence[int]) -> Axes:
    """A size that fits: the nearest from `size` on."""
    if isinstance(model, SegmentationModel):
        return model.next_size(tuple(size))
    return tuple(max(n, least) for n, least in zip(size, model.smallest_size, strict=True))


def steps_of(model: Network) -> Axes:
    """Voxels of the image from one place of the coarsest map to the next."""
    return model.divisor if isinstance(model, SegmentationModel) else model.smallest_size


def scores_of(model: Network, images: Tensor) -> Tensor:
    """Scores of a network in eval mode, (N, K, *spatial); of a classifier (N, K, 1): at one place, which is all.

    Args:
        model: the network.
        images: shape (N, C, *spatial).
    """
    scores = model(images)
    one: Tensor = scores if isinstance(scores, Tensor) else scores[0]
    return one[..., None] if one.dim() == 2 else one
