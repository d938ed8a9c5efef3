"""Segmentations: DICOM SEG and Label Map SEG files (PS3.3 A.51, C.8.20). Headers first; pixels only for masks.

A frame says by its functional groups which structure it is of and where it lies; frames may be shuffled, left out where
they are empty, and overlap. What a voxel needs to belong to a structure:

- BINARY: its bit is set.
- FRACTIONAL (PROBABILITY and OCCUPANCY alike): at least half of MaximumFractionalValue.
- LABELMAP: its value is the structure's number. The colours of a palette are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from medseg.errors import Code, MedsegError
from medseg.formats.content import is_dicom
from medseg.formats.dicom.codes import lab_to_rgb
from medseg.formats.dicom.frames import read_frames
from medseg.formats.dicom.geometry import LPS_TO_RAS
from medseg.formats.dicom.parsing import cut_short
from medseg.formats.dicom.planes import CENTRE_TOLERANCE, Spot, locate, malformed
from medseg.formats.dicom.seg_frames import Frame, Stored, absurd, decoder_of, no_place, parse, read_stored
from medseg.formats.dicom.sop_classes import SEGMENTATIONS
from medseg.formats.dicom.structures import Annotation, Concept, Structure
from medseg.formats.limits import MAX_VOXELS
from medseg.volume import Grid

BACKGROUND = ("125040", "DCM")
"""The type of a label map's segment that stands for everything else; it is no structure."""
MAX_STEP_DIVISOR = 4
"""The distance of planes is looked for among the smallest step and its whole parts down to this one: frames 3 and 4
planes apart, and none closer, are told, but jitter is not taken for a very fine grid."""
PART_TOLERANCE = 0.01
"""Largest deviation from whole multiples of a part of the smallest step: more would find a part for any steps."""
HEADER_TAGS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "SegmentationType",
    "SegmentationFractionalType",
    "SegmentSequence",
    "PixelPaddingValue",
    "ReferencedSeriesSequence",
    "StudiesContainingOtherReferencedInstancesSequence",
    "SourceImageSequence",
)


def is_mine(path: Path) -> bool:
    """True for a DICOM file that is a segmentation.

    Raises:
        MedsegError: E_TRUNCATED if the file is DICOM and too damaged to tell.
    """
    if not is_dicom(path):
        return False
    header = parse(path, ("SOPClassUID",))
    try:
        return str(header.get("SOPClassUID")) in SEGMENTATIONS
    except Exception as error:  # values are converted only now; pydicom raises a dozen types on damaged ones
        raise cut_short(path, "the DICOM header is damaged", "a SOPClassUID", type(error).__name__) from error


def read_annotation(path: Path) -> Annotation:
    """The structures of a segmentation and the images that they were drawn on; frames are parsed only where the header
    names no images.

    Raises:
        MedsegError: E_UNSUPPORTED for another kind of file, E_TRUNCATED, E_MALFORMED.
    """
    header = parse(path, HEADER_TAGS)
    if str(header.get("SOPClassUID")) not in SEGMENTATIONS:
        raise MedsegError(
            Code.UNSUPPORTED,
            "not a DICOM segmentation",
            where=path.name,
            expected="a Segmentation Storage object",
            got="another object",
            remedy="check the path",
        )
    try:
        series, images = _references(header)
        if not images:
            images = {uid for sources in read_frames(path).sources for uid in sources}
        padding = header.get("PixelPaddingValue")
        structures = [_structure(segment) for segment in header.get("SegmentSequence") or ()]
        if header.get("SegmentationType") == "LABELMAP":
            structures = [s for s in structures if s.number != padding and (s.concept or ())[:2] != BACKGROUND]
        if len({s.number for s in structures}) != len(structures):
            raise malformed("two segments have one number", path.name, got=sorted(s.number for s in structures))
        kinds = [header.get("SegmentationType"), header.get("SegmentationFractionalType")]
        return Annotation(
            path=path,
            kind="SEG",
            structures=tuple(sorted(structures, key=lambda s: s.number)),
            series=tuple(series),
            images=frozenset(images),
            frame_of_reference=str(header.get("FrameOfReferenceUID") or "") or None,
            uid=str(header.SOPInstanceUID),
            series_uid=str(header.SeriesInstanceUID),
            detail=" ".join(str(kind) for kind in kinds if kind),
        )
    except MedsegError:
        raise
    except RecursionError:
        raise malformed("sequences are nested without end", path.name) from None
    except Exception as error:  # pydicom parses sequences on access and raises a dozen types
        raise malformed("the segments are not described", path.name, got=type(error).__name__) from error


def masks(
    annotation: Annotation, grid: Grid, numbers: Sequence[int] | None = None
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """The voxels of structures on the grid of the image that they were drawn on, one structure at a time.

    Args:
        annotation: what `read_annotation` gave.
        grid: of the image; its axes may run in any order and direction. A picture's grid (rows, columns) fits only
            frames without a place in the patient.
        numbers: which structures; None is all. A structure without a frame is empty.
    Returns:
        (Structure.number, bool mask of shape grid.shape).
    Raises:
        MedsegError: E_GRID if frames do not lie on the grid; E_NO_GEOMETRY; E_DUPLICATE if two frames of a structure
            lie at one place; E_UNSUPPORTED for slides; E_TRUNCATED, E_MALFORMED, E_CODEC, E_LIMIT.
    """
    where = annotation.path.name
    wanted = [s.number for s in annotation.structures if numbers is None or s.number in numbers]
    stored = read_stored(annotation.path)
    labelmap = stored.kind == "LABELMAP"
    used = [f for f in stored.frames if f.structure is None or f.structure in wanted]
    spots = {f.index: _spot(f, stored, grid) for f in used}
    for number in [None] if labelmap else wanted:
        places = [spots[f.index] for f in used if f.structure == number]
        if len(set(places)) != len(places):
            raise MedsegError(
                Code.DUPLICATE,
                "two frames of one structure lie at one place",
                where=where,
                got=f"{len(places)} frames at {len(set(places))} places",
                remedy="split the file by time or by whatever else tells its frames apart",
            )
    decode = decoder_of(stored)
    first = spots[used[0].index] if used else None
    if labelmap:
        free = next(value for value in range(len(wanted) + 1) if value not in wanted)
        values = _canvas(grid, first, np.min_scalar_type(max(free, 2**stored.bits - 1)))
        values.fill(free)
        for frame in used:
            _pixels(values, spots[frame.index])[...] = decode(frame.index)
        for number in wanted:
            yield number, values == number
        return
    for number in wanted:
        mask = _canvas(grid, first, np.dtype(np.bool_))
        for frame in used:
            if frame.structure == number:
                _pixels(mask, spots[frame.index])[...] |= decode(frame.index)
        yield number, mask


def own_grid(annotation: Annotation) -> Grid:
    """The regular grid that the frames themselves span, for a segmentation without its images.

    Its axes run along the rows, down the columns and along the normal, as those of a series. Frames may be left out:
    the distance of planes is SpacingBetweenSlices where the positions agree with it, else the largest step of which
    all steps are multiples.

    Raises:
        MedsegError: E_SPACING if there is no such step; E_NO_GEOMETRY for frames without a place, or one plane without
            a thickness; E_MIXED for frames of several directions or places in-plane; E_UNSUPPORTED, E_LIMIT and as
            `read_annotation`.
    """
    where = annotation.path.name
    stored = read_stored(annotation.path)
    planes = [frame.plane for frame in stored.frames if frame.plane is not None]
    if not planes:
        raise no_place(where)
    first = planes[0]
    normal = np.cross(*first.orientation)
    offsets = np.array([plane.position for plane in planes]) - first.position
    heights = offsets @ normal
    in_plane = np.abs(offsets @ first.orientation.T) / np.array(first.spacing_mm)[::-1]
    if in_plane.max() > CENTRE_TOLERANCE or any(
        not np.allclose(p.orientation, first.orientation, atol=1e-4) or not np.allclose(p.spacing_mm, first.spacing_mm)
        for p in planes
    ):
        raise MedsegError(
            Code.MIXED,
            "the frames are no stack of equal planes",
            where=where,
            got=f"shifts in-plane up to {in_plane.max():.4g} pixels",
            remedy="give the images that the structures were drawn on",
        )
    step, count = _step(heights - heights.min(), stored)
    rows, columns = first.shape
    if rows * columns * count > MAX_VOXELS:
        raise absurd(where, f"{columns} × {rows} × {count} voxels")
    affine = np.eye(4)
    affine[:3, :2] = first.affine[:, :2]
    affine[:3, 2] = LPS_TO_RAS[:3, :3] @ (normal * step)
    affine[:3, 3] = LPS_TO_RAS[:3, :3] @ planes[int(heights.argmin())].position
    return Grid((columns, rows, count), affine)


def _step(heights: NDArray[np.float64], stored: Stored) -> tuple[float, int]:
    """(distance of planes in mm, number of planes) of heights along the normal, the lowest 0."""
    where = stored.path.name
    declared, thickness = (abs(v) if np.isfinite(v) else 0.0 for v in (stored.step_mm, stored.thickness_mm))
    ordered = np.sort(heights)
    steps = np.diff(ordered)
    steps = steps[steps > 1e-3]  # frames of other structures at the same height
    if not len(steps):
        if not (declared or thickness) > 0:
            raise no_place(where)
        return declared or thickness, 1
    smallest = float(steps.min())
    candidates = [(declared, CENTRE_TOLERANCE)] if declared > 0 else []
    candidates.append((smallest, CENTRE_TOLERANCE))
    candidates += [(smallest / divisor, PART_TOLERANCE) for divisor in range(2, MAX_STEP_DIVISOR + 1)]
    for candidate, tolerance in candidates:
        count = round(float(ordered[-1]) / candidate)
        fitted = float(ordered[-1]) / max(count, 1)
        if count and np.abs(heights / fitted - np.rint(heights / fitted)).max() <= tolerance:
            return fitted, count + 1
    raise MedsegError(
        Code.SPACING,
        "the distance between frames varies",
        where=where,
        expected="multiples of one distance",
        got=f"{smallest:.4g} to {steps.max():.4g} mm",
        remedy="give the images that the structures were drawn on",
    )


def _spot(frame: Frame, stored: Stored, grid: Grid) -> Spot | None:
    """The voxels that a frame is, by its place in the patient; None for all pixels of a picture, by its size alone."""
    where, shape = stored.path.name, stored.shape
    if frame.plane is not None and not grid.is_picture:
        return locate(frame.plane, grid, where=where)
    if frame.plane is None and not grid.is_picture:
        raise no_place(where)
    if frame.plane is not None or grid.shape != shape:
        raise MedsegError(
            Code.GRID,
            "the structures do not lie on the picture",
            where=where,
            expected=f"{grid.shape} pixels without a place in a patient",
            got=f"{shape} pixels" + (" in a patient" if frame.plane is not None else ""),
            remedy="use the image that the structures were drawn on",
        )
    return None


def _canvas(grid: Grid, spot: Spot | None, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros of the grid's shape, in memory frame by frame: elsewhere each pixel of a frame would cost a cache line."""
    if spot is None:
        return np.zeros(grid.shape, dtype=dtype)
    order = (spot.axes[2], *spot.axes[:2])
    return np.zeros([grid.shape[axis] for axis in order], dtype=dtype).transpose(np.argsort(order))


def _pixels(array: NDArray[Any], spot: Spot | None) -> NDArray[Any]:
    """The part (rows, columns) of an array that a frame is."""
    return array if spot is None else spot.view(array)


def _structure(segment: Dataset) -> Structure:
    lab = segment.get("RecommendedDisplayCIELabValue")
    return Structure(
        number=int(segment.SegmentNumber),
        name=str(segment.get("SegmentLabel") or "").strip(),
        concept=_concept(segment, "SegmentedPropertyTypeCodeSequence"),
        category=_concept(segment, "SegmentedPropertyCategoryCodeSequence"),
        color=lab_to_rgb(lab) if lab is not None and len(lab) == 3 else None,
    )


def _concept(segment: Dataset, keyword: str) -> Concept | None:
    items = segment.get(keyword)
    if not items:
        return None
    code = items[0]
    value = code.get("CodeValue") or code.get("LongCodeValue") or code.get("URNCodeValue") or ""
    return Concept(str(value), str(code.get("CodingSchemeDesignator") or ""), str(code.get("CodeMeaning") or ""))


def _references(header: Dataset) -> tuple[list[str], set[str]]:
    """(SeriesInstanceUIDs in the order of the file, SOPInstanceUIDs) of the images in a header."""
    holders = [header, *(header.get("StudiesContainingOtherReferencedInstancesSequence") or ())]
    items = [item for holder in holders for item in holder.get("ReferencedSeriesSequence") or ()]
    series = list(dict.fromkeys(str(item.SeriesInstanceUID) for item in items))
    images = {
        str(image.ReferencedSOPInstanceUID) for item in items for image in item.get("ReferencedInstanceSequence") or ()
    }
    images |= {str(image.ReferencedSOPInstanceUID) for image in header.get("SourceImageSequence") or ()}
    return series, images
