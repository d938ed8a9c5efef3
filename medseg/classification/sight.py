"""What a classifier sees of an image, and why: size, channels, intensities. Training and prediction run this code.

Pictures (and npz arrays, which have no place in a patient) are scaled until they fit into the size, with their aspect
kept, and padded; volumes are resampled to a spacing in mm, and cut or padded about their middle. What is padded is as
dark as the image's darkest voxel.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.volume import MODEL_ORIENTATION, Volume

Normalisation = Literal["z-score", "rescale", "dataset", "imagenet"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of RGB from 0 to 1: what torchvision's weights were trained with."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Grey of red, green and blue (ITU-R BT.601)."""
MAX_SIDE = {2: 224, 3: 96}
"""Longest side of the size that is planned, by spatial dimensions: larger images are seen smaller. 224 is what most
networks for pictures were made for."""
SIZE_STEP = 4
"""Planned sizes are multiples of it."""
VOXELS_PER_CASE = 512
"""Drawn from each image for the intensities of a data set."""
EIGHT_BITS = 255.0
MAX_VOXELS = 2**30
"""Of a resampled volume: 4 GiB a channel."""


@dataclass(frozen=True, eq=False)
class ImageFacts:
    """What one reading of an image tells.

    Args:
        shape: voxels along its axes, in the model's orientation.
        spacing_mm: along the same axes; 1 for pictures.
        num_channels: as in the file.
        is_grey: its channels are all equal.
        is_picture: it has no place in a patient.
        modality: where the file tells.
        digest: SHA-256 of its voxels.
        sample: some of its voxels, shape (C, n).
        notes: what the reader noted.
    """

    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    num_channels: int
    is_grey: bool
    is_picture: bool
    modality: str | None
    digest: str
    sample: NDArray[np.float32]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sight:
    """What the network sees.

    Args:
        size: voxels along each axis of its input.
        num_channels: 1 (grey), 3 (colour, or grey repeated), or those of the volumes.
        normalisation: z-score: each image by its own mean and deviation. rescale: each from its own range to 0–1.
            dataset: cut at the percentiles of the training images and by their mean and deviation. imagenet: to 0–1
            and by ImageNet's mean and deviation.
        spacing_mm: of volumes; None for pictures.
        intensity: for `dataset`: low, high, mean and deviation of each channel.
        reasons: why, by the names of these fields.
    """

    size: tuple[int, ...]
    num_channels: int
    normalisation: Normalisation
    spacing_mm: tuple[float, ...] | None = None
    intensity: tuple[tuple[float, float, float, float], ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes_fit = len(self.size) in (2, 3) and all(0 < n <= 2**14 for n in self.size)
        spacing = self.spacing_mm
        if spacing is not None:
            sizes_fit = sizes_fit and len(spacing) == len(self.size) and all(s > 0 for s in spacing)
        if not sizes_fit or self.num_channels < 1:
            raise MedsegError(
                Code.CONFIG,
                "this is no size of images",
                where="data.size",
                expected="2 or 3 positive whole numbers",
                got=f"{self.size}, spacing {spacing}, {self.num_channels} channels",
            )
        if self.normalisation == "dataset" and len(self.intensity) != self.num_channels:
            raise MedsegError(
                Code.CONFIG, "intensities are stated for each channel", expected=self.num_channels, got=self.intensity
            )

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        return len(self.size)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    def prepare(self, volume: Volume, *, where: str) -> NDArray[np.float32]:
        """An image as the network sees it.

        Args:
            volume: as it was read.
            where: the case, for messages.
        Returns:
            Shape (C, *size).
        Raises:
            MedsegError: E_MODEL for other dimensions, E_CHANNELS for channels that cannot become the network's.
        """
        oriented = volume if volume.grid.is_picture else volume.reoriented(MODEL_ORIENTATION)
        grid = oriented.grid
        if grid.ndim != self.spatial_dims or (grid.is_picture and self.spacing_mm is not None):
            kind = "pictures" if self.spacing_mm is None else "volumes with a position"
            raise MedsegError(
                Code.MODEL,
                "the image is not of the kind that the model was trained on",
                where=where,
                expected=f"{self.spatial_dims}D {kind}",
                got=f"{grid.ndim}D {'picture' if grid.is_picture else 'volume'} of shape {grid.shape}",
                remedy="give images of the kind of the training images",
            )
        array = self._channels(np.asarray(oriented.array, dtype=np.float32), where)
        if self.spacing_mm is None:
            scale = min(new / old for new, old in zip(self.size, grid.shape, strict=True))
            shape = tuple(min(n, max(1, round(o * scale))) for n, o in zip(self.size, grid.shape, strict=True))
        else:
            ratios = (s / t for s, t in zip(grid.spacing_mm, self.spacing_mm, strict=True))
            shape = tuple(max(1, round(o * r)) for o, r in zip(grid.shape, ratios, strict=True))
            if math.prod(shape) > MAX_VOXELS:
                raise MedsegError(
                    Code.LIMIT,
                    "the volume would be resampled to more voxels than any memory holds",
                    where=where,
                    expected=f"at most {MAX_VOXELS}",
                    got=" × ".join(map(str, shape)),
                    remedy="state a larger data.spacing_mm; of a model of others: do not use it",
                )
        whole = self._normalised(array)
        return _fitted(resized(whole, shape), self.size)

    def _channels(self, array: NDArray[np.float32], where: str) -> NDArray[np.float32]:
        found = len(array)
        if found == self.num_channels:
            return array
        if found == 3 and self.num_channels == 1:
            return _grey(array)
        if found == 1 and self.num_channels == 3:
            return np.repeat(array, 3, axis=0)
        raise MedsegError(
            Code.CHANNELS,
            "the image has other channels than the model takes",
            where=where,
            expected=self.num_channels,
            got=found,
            remedy="give the same channels, in the same order, as the training images had",
        )

    def _normalised(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        axes = tuple(range(1, array.ndim))
        if self.normalisation == "z-score":
            mean, std = array.mean(axes, keepdims=True, dtype=np.float64), array.std(axes, keepdims=True)
            scored: NDArray[np.float32] = ((array - mean) / np.maximum(std, 1e-6)).astype(np.float32)
            return scored
        if self.normalisation == "dataset":
            low, high, centre, deviation = (_beside(column, array) for column in zip(*self.intensity, strict=True))
            return ((np.clip(array, low, high) - centre) / np.maximum(deviation, 1e-6)).astype(np.float32)
        shares = _as_shares(array, is_picture=self.spacing_mm is None)
        if self.normalisation == "rescale":
            return shares
        mean3, std3 = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
        if self.num_channels != 3:
            mean3, std3 = mean3.mean(keepdims=True), std3.mean(keepdims=True)
        return ((shares - _beside(mean3, array)) / _beside(std3, array)).astype(np.float32)


def resized(array: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Channels (C, *old) on another number of voxels, linear; smoothed before they become fewer (scikit-image)."""
    if array.shape[1:] == shape:
        return array
    from skimage.transform import resize

    smaller = any(new < old for new, old in zip(shape, array.shape[1:], strict=True))
    channels = [resize(c, shape, order=1, mode="edge", anti_aliasing=smaller, preserve_range=True) for c in array]
    return np.stack(channels).astype(np.float32)


def plan_sight(
    facts: Sequence[ImageFacts],
    *,
    size: tuple[int, ...] | None,
    spacing_mm: tuple[float, ...] | None,
    channels: Literal["auto", "grey", "colour"],
    normalisation: Literal["auto"] | Normalisation,
    smallest: Mapping[int, tuple[int, ...]],
    expects_imagenet: bool,
) -> Sight:
    """What the network will see of such images.

    Args:
        facts: of the training images, all of one kind (`refuse_mixed`).
        size: the user's; None: from the images.
        spacing_mm: the same, of volumes.
        channels: what colour pictures become.
        normalisation: the user's choice.
        smallest: by spatial dimensions, the fewest voxels along each axis that the network takes.
        expects_imagenet: its weights were trained on ImageNet.
    Raises:
        MedsegError: E_CONFIG.
    """
    first, dims, reasons = facts[0], len(facts[0].shape), dict[str, str]()
    for key, value in (("data.size", size), ("data.spacing_mm", spacing_mm)):
        if value is not None and (len(value) != dims or min(value) <= 0):
            raise MedsegError(
                Code.CONFIG, f"the images are {dims}D", where=key, expected=f"{dims} positive numbers", got=value
            )
    if spacing_mm is not None and first.is_picture:
        raise MedsegError(
            Code.CONFIG, "pictures have no spacing", where="data.spacing_mm", remedy="set data.size instead"
        )
    shapes = np.array([one.shape for one in facts], dtype=np.float64)
    if not first.is_picture:
        spacings = np.array([one.spacing_mm for one in facts])
        median = np.median(spacings, axis=0)
        extent = np.median(shapes * spacings, axis=0)
        chosen = np.array(spacing_mm) if spacing_mm is not None else median
        reasons["spacing_mm"] = "data.spacing_mm" if spacing_mm is not None else "the median of the training images"
        wanted = extent / chosen
        if spacing_mm is None and size is not None:
            chosen = np.maximum(chosen, extent / np.array(size))
            reasons["spacing_mm"] += ", coarser where the median image would not fit into data.size"
        elif spacing_mm is None and wanted.max() > MAX_SIDE[dims]:
            # Axes are made coarser only as far as they must: slices are often thick already.
            chosen = np.maximum(chosen, extent / MAX_SIDE[dims])
            reasons["spacing_mm"] += f", coarser so that no side has more than {MAX_SIDE[dims]} voxels"
        spacing_mm = tuple(round(float(s), 4) for s in chosen)
        wanted = extent / chosen
        why = "the median extent of the training images at this spacing"
    else:
        median = np.median(shapes, axis=0)
        wanted = median * min(1.0, MAX_SIDE[dims] / median.max())
        why = "the median of the training images"
        if median.max() > MAX_SIDE[dims]:
            why += f" ({' × '.join(f'{n:g}' for n in median)}), its longest side brought to {MAX_SIDE[dims]}"
    if size is None:
        least = smallest.get(dims, (1,) * dims)
        size = tuple(max(s, SIZE_STEP * max(1, round(w / SIZE_STEP))) for w, s in zip(wanted, least, strict=True))
        reasons["size"] = f"{why}; multiples of {SIZE_STEP}, and no less than the network takes"
    else:
        reasons["size"] = "data.size"
    num_channels, reasons["num_channels"] = _channels_of(facts, channels)
    if normalisation == "auto":
        ct = all(one.modality == "CT" for one in facts)
        normalisation = "imagenet" if expects_imagenet else "dataset" if ct else "z-score"
        reasons["normalisation"] = {
            "imagenet": "as the weights of the network were trained",
            "dataset": "CT: intensities mean the same in all images",
            "z-score": "intensities of other images than CT have no unit",
        }[normalisation]
    else:
        reasons["normalisation"] = "data.normalisation"
    intensity = _intensity(facts, num_channels) if normalisation == "dataset" else ()
    return Sight(size, num_channels, normalisation, spacing_mm, intensity, reasons)


def refuse_mixed(facts: Mapping[str, ImageFacts]) -> None:
    """Refuse images of which some are pictures and others volumes, or with other numbers of channels.

    Raises:
        MedsegError: E_CHANNELS.
    """

    def kind(one: ImageFacts) -> str:
        colour = "" if one.num_channels in (1, 3) and one.is_picture else f" of {one.num_channels} channels"
        return f"{len(one.shape)}D {'pictures' if one.is_picture else 'volumes'}{colour}"

    counts = Counter(kind(one) for one in facts.values())
    if len(counts) > 1:
        rare = counts.most_common()[-1][0]
        example = next(case for case, one in facts.items() if kind(one) == rare)
        raise MedsegError(
            Code.CHANNELS,
            "the images are not of one kind",
            where=f"such as {example}: {rare}",
            got=", ".join(f"{n} {what}" for what, n in counts.most_common()),
            remedy="train on one kind, or convert the others",
        )


def _channels_of(facts: Sequence[ImageFacts], channels: str) -> tuple[int, str]:
    most = max(one.num_channels for one in facts)
    if not facts[0].is_picture or most not in (1, 3):
        return most, "the channels of the images"
    if channels != "auto":
        return (3 if channels == "colour" else 1), "data.channels"
    if all(one.is_grey for one in facts):
        return 1, "all images are grey" + (", though stored in colour" if most == 3 else "")
    return 3, "some images have colour; grey ones are repeated"


def _intensity(facts: Sequence[ImageFacts], num_channels: int) -> tuple[tuple[float, float, float, float], ...]:
    """Percentiles 0.5 and 99.5, mean and deviation of what lies between, over voxels of the training images."""
    found = []
    samples = [_grey(one.sample) if num_channels == 1 and len(one.sample) == 3 else one.sample for one in facts]
    for channel in range(num_channels):
        values = np.concatenate([sample[min(channel, len(sample) - 1)] for sample in samples])
        low, high = np.percentile(values, [0.5, 99.5])
        inside = np.clip(values, low, high)
        found.append((float(low), float(high), float(inside.mean()), float(inside.std())))
    return tuple(found)


def _grey(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Red, green and blue (3, …) as grey (1, …)."""
    grey: NDArray[np.float32] = np.tensordot(np.array(LUMINANCE, np.float32), array, axes=1)[None]
    return grey


def _fitted(array: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    """Cut or pad (C, *S) about its middle."""
    cuts, pads = [slice(None)], [(0, 0)]
    for old, new in zip(array.shape[1:], size, strict=True):
        start, before = max(0, (old - new) // 2), max(0, (new - old) // 2)
        cuts.append(slice(start, start + min(old, new)))
        pads.append((before, max(0, new - old - before)))
    inside = array[tuple(cuts)]
    if not any(map(any, pads)):
        return np.ascontiguousarray(inside)
    return np.stack(
        [np.pad(c, pads[1:], constant_values=float(whole.min())) for c, whole in zip(inside, array, strict=True)]
    )


def _as_shares(array: NDArray[np.float32], *, is_picture: bool) -> NDArray[np.float32]:
    """From 0 to 1: pictures of 8 bits by their type's range, others from their least to their largest value."""
    low, high = float(array.min()), float(array.max())
    if is_picture and low >= 0 and 1 < high <= EIGHT_BITS and bool((array == np.rint(array)).all()):
        return array / np.float32(EIGHT_BITS)
    return (array - np.float32(low)) / np.float32(high - low if high > low and math.isfinite(high - low) else 1.0)


def _beside(values: Any, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """One value per channel, in the shape that broadcasts over (C, *S)."""
    return np.asarray(values, dtype=np.float32).reshape(-1, *(1,) * (array.ndim - 1))
