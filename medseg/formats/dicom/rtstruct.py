"""Reading RT structure sets (RTSTRUCT): regions of interest as planar contours in millimetres.

What voxels the contours enclose is the business of `medseg.formats.dicom.contours`.

Source: DICOM PS3.3 A.19 (RT Structure Set), C.8.8.5 to C.8.8.8.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import RTStructureSetStorage

from medseg.errors import Code, MedsegError
from medseg.formats.dicom.contours import voxels
from medseg.formats.dicom.parsing import parse
from medseg.formats.dicom.structures import Annotation, Concept, Structure
from medseg.volume import Grid

logger = logging.getLogger(__name__)

FILLED_TYPES = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
"""ContourGeometricTypes that enclose voxels."""
_NEEDED_TAGS = ("StructureSetROISequence", "ROIContourSequence", "RTROIObservationsSequence")
"""Of type 1 in the modules that every structure set has; the last one stands at the end of the file."""
_ANNOTATION_TAGS = (
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "SpecificCharacterSet",
    "ReferencedFrameOfReferenceSequence",
    *_NEEDED_TAGS,
)
_CONTOUR_DATA_TAG = 0x30060050

FloatArray = NDArray[np.float64]


def is_mine(path: Path) -> bool:
    """True for a DICOM file that says it is an RT structure set; False for every other file, damaged ones too."""
    try:
        return str(read_file_meta_info(path).get("MediaStorageSOPClassUID")) == RTStructureSetStorage
    except Exception:  # pydicom raises a dozen types on damaged files
        return False


def read_annotation(path: Path) -> Annotation:
    """The regions of a structure set and the images that it refers to; the contours' points are not looked at.

    References that the file does not make are empty in the result.

    Raises:
        MedsegError: E_NOT_DICOM, E_TRUNCATED, E_MALFORMED, E_LIMIT; E_REFERENCE for regions in several frames of
            reference.
    """
    dataset = _read(path, _ANNOTATION_TAGS)
    _check_whole(dataset, path)
    with _understood(path):
        frame = _frame_of_reference(dataset, path)
        series, images = _references(dataset, frame)
        structures = _structures(dataset, path)
        uid, series_uid = str(dataset.get("SOPInstanceUID") or ""), str(dataset.get("SeriesInstanceUID") or "")
    return Annotation(path, "RTSTRUCT", structures, series, images, frame, uid, series_uid)


def masks(
    annotation: Annotation, grid: Grid, numbers: Sequence[int] | None = None
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """The voxels of regions, one region at a time; see `medseg.formats.dicom.annotations.masks`.

    Args:
        annotation: from `read_annotation`.
        grid: of the image that the regions were drawn on, its axes in any order.
        numbers: which structures; None is all.
    Returns:
        (Structure.number, bool mask of shape grid.shape), in the order of `annotation.structures`. A region without
        contours is empty; what lies beyond the edge of the image is cut off.
    Raises:
        MedsegError: E_GRID if contours do not lie in slices of the grid, E_LABEL for a number that is not there,
            E_MALFORMED, E_TRUNCATED, E_LIMIT.
    """
    path = annotation.path
    if grid.ndim != 3 or grid.is_picture:
        raise MedsegError(
            Code.GRID,
            "contours lie in space, the image does not",
            where=path.name,
            expected="a volume in mm",
            got=f"a picture (frame {grid.frame})",
            remedy="give the series that the contours were drawn on",
        )
    wanted = [s for s in annotation.structures if numbers is None or s.number in numbers]
    missing = sorted(set(numbers or ()) - {s.number for s in wanted})
    if missing:
        raise MedsegError(
            Code.LABEL,
            "the structure set has no region with this number",
            where=path.name,
            expected=", ".join(str(s.number) for s in annotation.structures),
            got=missing,
            remedy="choose among those that are there",
        )
    drawn = _contours_of(annotation, {s.number: s.name for s in wanted})
    for structure in wanted:
        where, name = (f"{file}, {structure.name}" for file in (path.name, annotation.pseudonym))
        yield structure.number, voxels(drawn.pop(structure.number, []), grid, where, name)


def _read(path: Path, keywords: Iterable[str]) -> Dataset:
    """Some elements of a file; what their sequences hold is parsed when it is looked at. Raises as `header.parse`."""
    return parse(path, [tag_for_keyword(keyword) or 0 for keyword in keywords])[0]


def _check_whole(dataset: Dataset, path: Path) -> None:
    """Refuse a file without the sequences of every structure set: in one that is cut, regions would seem empty."""
    missing = [keyword for keyword in _NEEDED_TAGS if keyword not in dataset]
    if missing:
        raise MedsegError(
            Code.TRUNCATED,
            "the structure set is not whole",
            where=path.name,
            expected=", ".join(_NEEDED_TAGS),
            got="no " + ", no ".join(missing),
            remedy="export it again",
        )


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Turn what goes wrong within sequences into E_MALFORMED."""
    try:
        yield
    except MedsegError:
        raise
    except RecursionError as error:
        raise _malformed(path, "sequences are nested without end", "more levels than can be followed") from error
    except Exception as error:  # pydicom raises a dozen types on damaged values
        raise _malformed(path, "values that cannot be understood", type(error).__name__) from error


def _contours_of(annotation: Annotation, names: Mapping[int, str]) -> dict[int, list[FloatArray]]:
    """The closed contours of the regions with these numbers."""
    path = annotation.path
    drawn: dict[int, list[FloatArray]] = defaultdict(list)
    dataset = _read(path, ("ROIContourSequence",))
    with _understood(path):
        for item in dataset.get("ROIContourSequence") or ():
            number = _number(item, "ReferencedROINumber", path)
            if number in names:
                drawn[number] += _closed_contours(item, names[number], annotation)
    return drawn


def _frame_of_reference(dataset: Dataset, path: Path) -> str | None:
    """The frame that the regions name; else the one that the file names."""
    rois = dataset.get("StructureSetROISequence") or ()
    named = sorted({str(roi.ReferencedFrameOfReferenceUID) for roi in rois if roi.get("ReferencedFrameOfReferenceUID")})
    if not named:
        items = dataset.get("ReferencedFrameOfReferenceSequence") or ()
        named = sorted({str(item.FrameOfReferenceUID) for item in items if item.get("FrameOfReferenceUID")})
    if len(named) > 1:
        raise MedsegError(
            Code.REFERENCE,
            "the regions lie in several frames of reference",
            where=path.name,
            expected="one FrameOfReferenceUID",
            got=", ".join(named),
            remedy="export one structure set for each image series",
        )
    if named:
        return named[0]
    return str(dataset.FrameOfReferenceUID) if dataset.get("FrameOfReferenceUID") else None


def _references(dataset: Dataset, frame: str | None) -> tuple[tuple[str, ...], frozenset[str]]:
    """Series and images that the file refers to; those of the regions' frame of reference, where it lists that one."""
    items = list(dataset.get("ReferencedFrameOfReferenceSequence") or ())
    items = [item for item in items if str(item.get("FrameOfReferenceUID")) == frame] or items
    series: dict[str, None] = {}
    images: set[str] = set()
    for item in items:
        for study in item.get("RTReferencedStudySequence") or ():
            for referenced in study.get("RTReferencedSeriesSequence") or ():
                if referenced.get("SeriesInstanceUID"):
                    series[str(referenced.SeriesInstanceUID)] = None
                images |= _image_uids(referenced)
    for roi in dataset.get("ROIContourSequence") or ():
        for contour in roi.get("ContourSequence") or ():
            images |= _image_uids(contour)
    return tuple(series), frozenset(images)


def _image_uids(item: Dataset) -> set[str]:
    images = item.get("ContourImageSequence") or ()
    return {str(image.ReferencedSOPInstanceUID) for image in images if image.get("ReferencedSOPInstanceUID")}


def _structures(dataset: Dataset, path: Path) -> tuple[Structure, ...]:
    concepts: dict[int, Concept] = {}
    for observation in dataset.get("RTROIObservationsSequence") or ():
        concept = _concept(observation)
        if concept is not None:
            concepts[_number(observation, "ReferencedROINumber", path)] = concept
    colors: dict[int, tuple[int, int, int]] = {}
    for item in dataset.get("ROIContourSequence") or ():
        color = [int(c) for c in item.get("ROIDisplayColor") or ()]
        if len(color) == 3 and min(color) >= 0 and max(color) <= 255:
            colors[_number(item, "ReferencedROINumber", path)] = (color[0], color[1], color[2])
    structures: dict[int, Structure] = {}
    for roi in dataset.get("StructureSetROISequence") or ():
        number = _number(roi, "ROINumber", path)
        if number in structures:
            raise _malformed(path, "two regions have one number", f"ROINumber {number}")
        name = str(roi.get("ROIName") or "").strip()
        structures[number] = Structure(number, name, concepts.get(number), None, colors.get(number))
    return tuple(structures[number] for number in sorted(structures))


def _concept(observation: Dataset) -> Concept | None:
    """What an observation says that a region is."""
    for code in observation.get("RTROIIdentificationCodeSequence") or ():
        value = code.get("CodeValue") or code.get("LongCodeValue") or code.get("URNCodeValue")
        if value:
            return Concept(
                str(value), str(code.get("CodingSchemeDesignator") or ""), str(code.get("CodeMeaning") or "")
            )
    return None


def _number(item: Dataset, tag: str, path: Path) -> int:
    try:
        return int(item[tag].value)
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(path, "a region without a number", tag) from error


def _closed_contours(item: Dataset, name: str, annotation: Annotation) -> list[FloatArray]:
    """The closed contours of one region, (n, 3) each, LPS mm; others are counted in the log."""
    contours: list[FloatArray] = []
    others: dict[str, int] = defaultdict(int)
    for contour in item.get("ContourSequence") or ():
        kind = str(contour.get("ContourGeometricType") or "").strip()
        if kind in FILLED_TYPES:
            contours.append(_points(contour, f"{annotation.path.name}, {name}"))
        else:
            others[kind or "unnamed"] += 1
    for kind, count in others.items():
        logger.warning(
            "%s, %s: left out %d contours of type %s: they hold no voxels", annotation.pseudonym, name, count, kind
        )
    return contours


def _points(contour: Dataset, where: str) -> FloatArray:
    """ContourData as (n, 3). Its bytes are parsed here: pydicom makes an object of every number, 20 times slower."""
    try:
        element: Any = contour.get_item(_CONTOUR_DATA_TAG)
        value = getattr(element, "value", None)
        texts = value.strip(b" \0").split(b"\\") if isinstance(value, bytes) else list(value or ())
        points = np.array([float(text) for text in texts], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise _bad_points(where, "something that is not a number") from error
    if len(points) % 3 or len(points) < 9:
        raise _bad_points(where, f"{len(points)} numbers")
    if not np.isfinite(points).all():
        raise _bad_points(where, "a number that is not finite")
    return points.reshape(-1, 3)


def _bad_points(where: str, got: str) -> MedsegError:
    return MedsegError(
        Code.MALFORMED,
        "a contour that is no polygon in space",
        where=where,
        expected="three points or more, three finite numbers each",
        got=got,
        remedy="repair the region where it was drawn, and export it again",
    )


def _malformed(path: Path, message: str, got: str) -> MedsegError:
    return MedsegError(Code.MALFORMED, message, where=path.name, got=got, remedy="export the structure set again")
