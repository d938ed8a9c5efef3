"""The functional groups of multi-frame files: what each frame is and where it lies.

Enhanced and legacy converted enhanced images, segmentations and label maps say per frame, or once for all frames
(PS3.3 C.7.6.16), what the header of a classic file says per file. `read_frames` reads them all; nothing here reads
pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.header import Slice
from medseg.formats.dicom.parsing import parse, quiet

TRAITS = {
    "StackID": "FrameContentSequence",
    "TemporalPositionIndex": "FrameContentSequence",
    "TemporalPositionTimeOffset": "TemporalPositionSequence",
    "EffectiveEchoTime": "MREchoSequence",
    "DiffusionBValue": "MRDiffusionSequence",
    "DiffusionDirectionality": "MRDiffusionSequence",
    "InversionTimes": "MRModifierSequence",
    "NominalCardiacTriggerDelayTime": "CardiacSynchronizationSequence",
    "CardiacPhasePosition": "CardiacSynchronizationSequence",
    "ComplexImageComponent": "MRImageFrameTypeSequence",
    "MetaboliteMapDescription": "MRMetaboliteMapSequence",
    "FrameAcquisitionNumber": "FrameContentSequence",
}
"""What may make several volumes of the frames of one file, and the functional group that says it, the most telling
first. The direction of diffusion is added as DiffusionGradientOrientation."""
PLACES = ("ImagePositionPatient", "InStackPositionNumber", "ImageOrientationPatient", "SliceLocation")
"""Dimensions that count slices, and so do not make several volumes."""
FRAME_TAGS = (
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "DimensionIndexSequence",
    "DimensionOrganizationType",
    "RescaleSlope",
    "RescaleIntercept",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
)
MAX_FRAMES = 2**17
"""Most frames that a file may have: each takes a kilobyte. A long functional MR has half of it."""

_TAGS = tuple(tag_for_keyword(keyword) or 0 for keyword in FRAME_TAGS)


@dataclass(frozen=True)
class Frames:
    """What each frame of a file is, in the order of the file."""

    path: Path
    count: int
    positions: NDArray[np.float64] | None
    """(n, 3) centre of the first pixel, mm in LPS; None unless every frame has one."""
    orientations: NDArray[np.float64] | None
    """(n, 2, 3) direction along a row, then down a column, in LPS; None unless every frame has one."""
    pixel_spacings: NDArray[np.float64] | None
    """(n, 2) mm between rows, then between columns; None unless every frame has positive ones."""
    thicknesses: NDArray[np.float64]
    """(n,) SliceThickness in mm, NaN where the file does not say."""
    steps: NDArray[np.float64]
    """(n,) SpacingBetweenSlices in mm, NaN where the file does not say."""
    slopes: NDArray[np.float64]
    """(n,) RescaleSlope, 1 where the file does not say, NaN where it is no number."""
    intercepts: NDArray[np.float64]
    """(n,) RescaleIntercept, 0 where the file does not say, NaN where it is no number."""
    segments: NDArray[np.int64] | None
    """(n,) ReferencedSegmentNumber; None unless every frame has one (label maps have none)."""
    dimensions: tuple[str, ...]
    """Keywords of the dimension indices ("TemporalPositionIndex", "ImagePositionPatient"), "" for private ones."""
    dimension_values: NDArray[np.int64] | None
    """(n, number of dimensions) DimensionIndexValues; None unless every frame has them."""
    organisation: str
    """DimensionOrganizationType ("3D", "TILED_FULL"), "" where the file does not say."""
    traits: tuple[Mapping[str, str], ...]
    """For each frame those of `TRAITS` that it has, as text."""
    sources: tuple[tuple[str, ...], ...]
    """For each frame the SOPInstanceUIDs of the images that it was derived from."""

    @property
    def stack_ids(self) -> tuple[str, ...]:
        """StackID of each frame, "" where the file does not say."""
        return tuple(t.get("StackID", "") for t in self.traits)

    @property
    def temporal(self) -> tuple[str, ...]:
        """TemporalPositionIndex of each frame, "" where the file does not say."""
        return tuple(t.get("TemporalPositionIndex", "") for t in self.traits)


def read_frames(path: Path, *, without_preamble: bool = False) -> Frames:
    """The functional groups of a file.

    Args:
        path: a multi-frame image or segmentation; one without functional groups gives what its header says, for all
            frames.
        without_preamble: read it though it does not have "DICM" at byte 128.
    Raises:
        MedsegError: E_MALFORMED for nonsense in the functional groups, E_LIMIT for an absurd number of frames, and as
            `header.read_header`.
    """
    dataset, _, _ = parse(path, _TAGS, without_preamble=without_preamble)
    try:
        with quiet():
            return _frames(path, dataset)
    except MedsegError:
        raise
    except RecursionError:
        raise _malformed(path, "sequences are nested without end") from None
    except Exception as error:  # pydicom parses sequences on access and raises a dozen types
        raise _malformed(path, "the functional groups cannot be parsed", got=type(error).__name__) from error


def expanded(item: Slice) -> list[Slice]:
    """One `Slice` per frame of a multi-frame image; any other image as it is.

    Raises:
        MedsegError: as `read_frames`.
    """
    if not item.is_multi_frame:
        return [item]
    frames = read_frames(item.path, without_preamble=True)  # `header.read_header` has seen to it
    planes = []
    for n in range(frames.count):
        spacing = None if frames.pixel_spacings is None else frames.pixel_spacings[n]
        planes.append(
            replace(
                item,
                position=None if frames.positions is None else frames.positions[n],
                orientation=None if frames.orientations is None else frames.orientations[n],
                pixel_spacing_mm=None if spacing is None else (float(spacing[0]), float(spacing[1])),
                thickness_mm=_known(frames.thicknesses[n]),
                step_mm=_known(frames.steps[n]),
                split={**item.split, **frames.traits[n], **_own_dimensions(frames, n)},
                encoding=replace(item.encoding, slope=float(frames.slopes[n]), intercept=float(frames.intercepts[n])),
                frame=n,
            )
        )
    return planes


def _own_dimensions(frames: Frames, n: int) -> dict[str, str]:
    """What the dimensions beyond place and `TRAITS` say of a frame."""
    if frames.dimension_values is None or frames.dimension_values.shape[1] != len(frames.dimensions):
        return {}
    return {
        f"{keyword or 'private'} index": str(value)
        for keyword, value in zip(frames.dimensions, frames.dimension_values[n], strict=True)
        if keyword not in PLACES and keyword not in TRAITS
    }


def _known(value: np.float64) -> float | None:
    return float(value) if np.isfinite(value) else None


def _frames(path: Path, dataset: Dataset) -> Frames:
    count = int(dataset.get("NumberOfFrames") or 1)
    if not 1 <= count <= MAX_FRAMES:
        raise MedsegError(
            Code.LIMIT,
            "the header declares an absurd number of frames",
            where=path.name,
            expected=f"1 to {MAX_FRAMES}",
            got=count,
            remedy="the header is damaged or forged: get the file again from its source",
        )
    if count > 1 and "ImagePositionPatient" in dataset:
        del dataset.ImagePositionPatient  # of all frames at once it says nothing
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(own) not in (0, count):
        raise _malformed(
            path, "the functional groups do not fit the number of frames", expected=f"{count} items", got=f"{len(own)}"
        )
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or []), Dataset())
    if own:
        return _gathered(path, [_Groups(shared, item, dataset) for item in own], dataset)
    one = _gathered(path, [_Groups(shared, Dataset(), dataset)], dataset)
    return _repeated(one, count)


def _gathered(path: Path, groups: list[_Groups], dataset: Dataset) -> Frames:
    values = [g.dimension_values() for g in groups]
    segments = [g.integer("SegmentIdentificationSequence", "ReferencedSegmentNumber") for g in groups]
    pointers = dataset.get("DimensionIndexSequence") or []
    spacings = _stacked([g.numbers("PixelMeasuresSequence", "PixelSpacing", 2) for g in groups])
    orientations = _stacked([g.numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6) for g in groups])
    return Frames(
        path,
        len(groups),
        positions=_stacked([g.numbers("PlanePositionSequence", "ImagePositionPatient", 3) for g in groups]),
        orientations=None if orientations is None else orientations.reshape(len(groups), 2, 3),
        pixel_spacings=None if spacings is None or (spacings <= 0).any() else spacings,
        thicknesses=_column([g.number("PixelMeasuresSequence", "SliceThickness", None) for g in groups]),
        steps=_column([g.number("PixelMeasuresSequence", "SpacingBetweenSlices", None) for g in groups]),
        slopes=_column([g.number("PixelValueTransformationSequence", "RescaleSlope", 1.0) for g in groups]),
        intercepts=_column([g.number("PixelValueTransformationSequence", "RescaleIntercept", 0.0) for g in groups]),
        segments=None if any(s is None for s in segments) else np.array(segments, dtype=np.int64),
        dimensions=tuple(keyword_for_tag(p.DimensionIndexPointer) for p in pointers if "DimensionIndexPointer" in p),
        dimension_values=(
            np.array(values, dtype=np.int64) if values[0] and len({len(v) for v in values}) == 1 else None
        ),
        organisation=str(dataset.get("DimensionOrganizationType") or ""),
        traits=tuple(dict(g.traits()) for g in groups),
        sources=tuple(tuple(g.sources()) for g in groups),
    )


def _repeated(one: Frames, count: int) -> Frames:
    """What all frames share, for each of them."""
    arrays: dict[str, Any] = {
        field.name: np.repeat(value, count, axis=0)
        for field in fields(one)
        if isinstance(value := getattr(one, field.name), np.ndarray)
    }
    return replace(one, count=count, traits=one.traits * count, sources=one.sources * count, **arrays)


class _Groups:
    """The functional groups of one frame: its own, else those that all share, else the header of the file."""

    def __init__(self, shared: Dataset, own: Dataset, header: Dataset) -> None:
        self._places = (own, shared)
        self._header = header

    def _group(self, name: str) -> Dataset | None:
        for place in self._places:
            items = place.get(name)
            if items:
                item: Dataset = items[0]
                return item
        return None

    def value(self, group: str, keyword: str) -> Any:
        """None where the frame does not say."""
        found = self._group(group)
        value = None if found is None else found.get(keyword)
        if value is None and keyword in FRAME_TAGS:
            value = self._header.get(keyword)
        return None if value in ("", None) else value

    def numbers(self, group: str, keyword: str, count: int) -> NDArray[np.float64] | None:
        value = self.value(group, keyword)
        if not isinstance(value, list | MultiValue) or len(value) != count:
            return None
        numbers = np.array([float(v) for v in value])
        return numbers if np.isfinite(numbers).all() else None

    def number(self, group: str, keyword: str, default: float | None) -> float:
        """NaN for what is no number."""
        value = self.value(group, keyword)
        if value is None:
            return float("nan") if default is None else default
        try:
            return float(value)
        except (TypeError, ValueError):
            return float("nan")

    def integer(self, group: str, keyword: str) -> int | None:
        value = self.value(group, keyword)
        return None if value is None else int(value)

    def dimension_values(self) -> list[int]:
        value = self.value("FrameContentSequence", "DimensionIndexValues")
        if value is None:
            return []
        return [int(v) for v in value] if isinstance(value, list | MultiValue) else [int(value)]

    def traits(self) -> Iterator[tuple[str, str]]:
        for keyword, group in TRAITS.items():
            value = self.value(group, keyword)
            if value is not None:
                yield keyword, str(value)
        diffusion = self._group("MRDiffusionSequence")
        direction = diffusion.get("DiffusionGradientDirectionSequence") if diffusion is not None else None
        if direction:
            yield "DiffusionGradientOrientation", str(direction[0].get("DiffusionGradientOrientation"))

    def sources(self) -> Iterator[str]:
        for place in self._places:
            for derivation in place.get("DerivationImageSequence") or []:
                for source in derivation.get("SourceImageSequence") or []:
                    if "ReferencedSOPInstanceUID" in source:
                        yield str(source.ReferencedSOPInstanceUID)


def _stacked(rows: list[NDArray[np.float64] | None]) -> NDArray[np.float64] | None:
    known = [row for row in rows if row is not None]
    return np.array(known) if len(known) == len(rows) else None


def _column(values: list[float]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)


def _malformed(path: Path, message: str, *, expected: str | None = None, got: str | None = None) -> MedsegError:
    return MedsegError(
        Code.MALFORMED,
        message,
        where=path.name,
        expected=expected,
        got=got,
        remedy="the file is damaged: export it again",
    )
