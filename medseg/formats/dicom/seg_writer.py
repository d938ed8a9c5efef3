"""Label maps written as DICOM SEG, of type BINARY, through highdicom.

A SEG belongs to its patient and study: it carries the name and the identifiers of its source, and refers to the series
and images of the source. Voxels go to the source's planes by their place in the patient; where the label lies on
another grid (that of a series that was resampled), its own planes are written, in the same frame of reference.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel.orientations as nio
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.formats.dicom.codes import concept_of, side_of
from medseg.formats.dicom.frames import read_frames
from medseg.formats.dicom.geometry import LPS_TO_RAS
from medseg.formats.dicom.planes import Plane, locate, planes_of
from medseg.formats.dicom.structures import Algorithm, Concept, Structure
from medseg.volume import Grid, Volume

MAX_TEXT = 64
"""Characters of a LO element (PS3.5 6.2): names of segments and of the algorithm are cut there."""
MIN_FRAME_PIXELS = 8
"""Fewest pixels of a frame: highdicom 0.28 begins a new byte for each frame of fewer, and other readers lose them."""
SERIES_NUMBER = 1000
"""SeriesNumber of written files: beyond those that scanners give, so that viewers list it last."""
EMPTY_TAGS = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)
"""What every image must have but may leave empty (type 2); written empty where the source lacks it."""
NEEDED_TAGS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Rows", "Columns")


def write_seg(
    path: Path, label: Volume, structures: Sequence[Structure], source: Sequence[Path], *, algorithm: Algorithm
) -> None:
    """Write a label map as a SEG file, whole or not at all.

    Frames without a voxel are left out; a label without any voxel keeps one frame per plane and structure.

    Args:
        path: final name.
        label: (i, j, k) class indices on the grid of the source, its axes in any order and direction, or on a grid of
            its own in the same space; (row, column) for a picture.
        structures: numbers 1 … n in this order; the label holds their values (`Structure.parts`).
        source: the image files of the series: one per slice, or one multi-frame file.
        algorithm: who drew it.
    Raises:
        MedsegError: E_LABEL for values or numbers that no structure has; E_REFERENCE if the source is not one series
            in one frame of reference; E_NO_GEOMETRY, E_MALFORMED, E_UNSUPPORTED for a source that a SEG cannot refer
            to; E_TRUNCATED; E_OUTPUT.
    Source:
        DICOM PS3.3 A.51 and C.8.20; the file itself is made by highdicom (Bridge et al., J Digit Imaging 2022).
    """
    values = _checked(label, structures, path.name)
    headers = _read_headers(source)
    arguments = _in_space(values, label.grid, headers, source)
    _check_frame(arguments["pixel_array"].shape[1:3], source[0].name)
    if any(structure.parts != (structure.number,) for structure in structures):
        arguments["pixel_array"] = _one_by_one(arguments["pixel_array"], structures)
    try:
        dataset = _dataset(headers, structures, algorithm, arguments, omit_empty_frames=bool(values.any()))
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise MedsegError(
            Code.UNSUPPORTED,
            "a SEG cannot refer to these images",
            where=source[0].name,
            got=type(error).__name__,
            remedy="write NIfTI instead, and report this kind of image",
        ) from error
    if label.grid.is_picture:
        dataset.PatientOrientation = headers[0].get("PatientOrientation") or ""  # type 2 without a position
    with whole_file(path, ".dcm") as temporary:
        dataset.save_as(temporary, enforce_file_format=True)


def _dataset(
    headers: Sequence[Dataset],
    structures: Sequence[Structure],
    algorithm: Algorithm,
    arguments: dict[str, Any],
    *,
    omit_empty_frames: bool,
) -> Dataset:
    """The file, in memory."""
    from highdicom.seg import Segmentation

    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it tells the UIDs of its sources
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # highdicom quotes the patient's name where its form is unusual
        return Segmentation(  # type: ignore[no-any-return]
            source_images=headers,
            segmentation_type="BINARY",
            segment_descriptions=[_description(structure, algorithm) for structure in structures],
            series_instance_uid=generate_uid(prefix=None),
            sop_instance_uid=generate_uid(prefix=None),
            series_number=SERIES_NUMBER,
            instance_number=1,
            manufacturer="medseg",
            manufacturer_model_name=_text(algorithm.name),
            software_versions=_text(algorithm.version),
            device_serial_number="none",
            series_description=_text(f"Segmentation by {algorithm.name}"),
            content_label="SEGMENTATION",
            omit_empty_frames=omit_empty_frames,
            specific_character_set="ISO_IR 192",  # UTF-8: names of structures are any text
            **arguments,
        )


def _checked(label: Volume, structures: Sequence[Structure], where: str) -> NDArray[Any]:
    """The label's values in the smallest unsigned type.

    Raises:
        MedsegError: E_LABEL.
    """
    numbers = [structure.number for structure in structures]
    if not numbers or numbers != list(range(1, len(numbers) + 1)):
        raise MedsegError(
            Code.LABEL,
            "the structures are not numbered 1, 2, …",
            where=where,
            expected="1 … n",
            got=numbers,
            remedy="number them without gaps",
        )
    values: NDArray[Any] = label.array
    largest = max(value for structure in structures for value in structure.parts)
    if not label.is_label or values.dtype.kind not in "biu" or values.min() < 0 or values.max() > largest:
        raise MedsegError(
            Code.LABEL,
            "the label map holds values without a structure",
            where=where,
            expected=f"whole numbers from 0 to {largest}",
            got=f"{values.min()} to {values.max()}, {values.dtype}",
            remedy="name a structure for each value of the label",
        )
    return values.astype(np.uint8 if largest <= 255 else np.uint16)


def _one_by_one(values: Any, structures: Sequence[Structure]) -> Any:
    """Structures that may overlap, each as a mask of its own along a last axis."""
    array = values if isinstance(values, np.ndarray) else values.array
    masks = np.stack([np.isin(array, structure.parts) for structure in structures], axis=-1).astype(np.uint8)
    if isinstance(values, np.ndarray):
        return masks
    from highdicom import ChannelDescriptor
    from highdicom import Volume as HighdicomVolume

    return HighdicomVolume(
        masks,
        values.affine,
        coordinate_system="PATIENT",
        frame_of_reference_uid=values.frame_of_reference_uid,
        channels={ChannelDescriptor("SegmentNumber"): [structure.number for structure in structures]},
    )


def _read_headers(source: Sequence[Path]) -> list[Dataset]:
    """The whole headers of the source, without pixels: what a SEG takes over from them is highdicom's choice.

    Raises:
        MedsegError: E_REFERENCE, E_TRUNCATED.
    """
    if not source:
        raise MedsegError(
            Code.REFERENCE,
            "no image to refer to",
            where="the source",
            expected="the files of a series",
            got="none",
            remedy="give the files of the series",
        )
    headers: list[Dataset] = []
    for path in source:
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True)  # whoever chose it could read it
            missing = [tag for tag in NEEDED_TAGS if not header.get(tag)]
        except Exception as error:  # pydicom raises a dozen types on damaged files
            raise MedsegError(
                Code.TRUNCATED,
                "the DICOM header is cut or damaged",
                where=path.name,
                got=type(error).__name__,
                remedy="export the series again",
            ) from error
        if missing:
            raise MedsegError(
                Code.REFERENCE,
                "an image that cannot be referred to",
                where=path.name,
                expected=", ".join(missing),
                remedy="export it again",
            )
        for tag in EMPTY_TAGS:
            if tag not in header:
                setattr(header, tag, "")
        headers.append(header)
    for tag in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Rows", "Columns"):
        found = {str(header.get(tag)) for header in headers}
        if len(found) > 1:
            raise MedsegError(
                Code.REFERENCE,
                "the source images do not belong together",
                where=source[0].name,
                expected=f"one {tag}",
                got=f"{len(found)} of them",
                remedy="give the files of one series",
            )
    return headers


def _in_space(values: NDArray[Any], grid: Grid, headers: list[Dataset], source: Sequence[Path]) -> dict[str, Any]:
    """What highdicom needs to know of the pixels: the array, and where it lies unless it is the source's planes.

    Raises:
        MedsegError: E_NO_GEOMETRY, E_REFERENCE, E_MALFORMED, E_GRID.
    """
    where, shape = source[0].name, (int(headers[0].Rows), int(headers[0].Columns))
    if grid.is_picture:
        if values.shape != shape or len(headers) > 1:
            raise MedsegError(
                Code.GRID,
                "the label is not of this picture",
                where=where,
                expected=shape,
                got=grid.shape,
                remedy="give the picture that the label was drawn on",
            )
        for header in headers:
            header.pop("FrameOfReferenceUID", None)  # nothing can be placed in it without a position
        return {"pixel_array": values[None]}
    if not headers[0].get("FrameOfReferenceUID"):
        raise MedsegError(
            Code.NO_GEOMETRY,
            "the images name no frame of reference, so a SEG of them would lie nowhere",
            where=where,
            expected="FrameOfReferenceUID",
            remedy="write NIfTI instead",
        )
    planes = _source_planes(source, shape)
    _share_orientation(headers)
    on_planes = _on_planes(values, grid, planes, where)
    if on_planes is not None:
        return {"pixel_array": on_planes}
    return {"pixel_array": _as_volume(values, grid, planes[0], str(headers[0].FrameOfReferenceUID))}


def _check_frame(shape: tuple[int, int], where: str) -> None:
    if shape[0] * shape[1] < MIN_FRAME_PIXELS:
        raise MedsegError(
            Code.UNSUPPORTED,
            "the frames are too small for a SEG",
            where=where,
            expected=f"at least {MIN_FRAME_PIXELS} pixels",
            got=f"{shape[1]} × {shape[0]}",
            remedy="write NIfTI instead",
        )


def _source_planes(source: Sequence[Path], shape: tuple[int, int]) -> list[Plane]:
    """The planes of the source, in the order of its files or frames.

    Raises:
        MedsegError: E_NO_GEOMETRY, E_MALFORMED, E_REFERENCE for several multi-frame files.
    """
    planes: list[Plane] = []
    for path in source:
        placed = planes_of(read_frames(path, without_preamble=True), shape)
        if placed is None:
            raise MedsegError(
                Code.NO_GEOMETRY,
                "an image does not say where it lies",
                where=path.name,
                expected="ImagePositionPatient and ImageOrientationPatient",
                remedy="write NIfTI instead",
            )
        planes += placed
    if len(source) > 1 and len(planes) != len(source):
        raise MedsegError(
            Code.REFERENCE,
            "several multi-frame files",
            where=source[0].name,
            expected="one",
            got=len(source),
            remedy="give the file that the label was made of",
        )
    return planes


def _share_orientation(headers: Sequence[Dataset]) -> None:
    """State once what highdicom wants stated once: orientation and pixel size of all planes, in memory only.

    Whether the planes do agree is found by `_on_planes`, from what they said before.
    """
    first = headers[0]
    if "PerFrameFunctionalGroupsSequence" not in first:
        for header in headers:
            header.ImageOrientationPatient = first.ImageOrientationPatient
        return
    if not first.get("SharedFunctionalGroupsSequence"):
        first.SharedFunctionalGroupsSequence = [Dataset()]
    shared, frame = first.SharedFunctionalGroupsSequence[0], first.PerFrameFunctionalGroupsSequence[0]
    for keyword in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        if keyword not in shared and keyword in frame:
            setattr(shared, keyword, frame.get(keyword))


def _on_planes(values: NDArray[Any], grid: Grid, planes: Sequence[Plane], where: str) -> NDArray[Any] | None:
    """(planes, rows, columns): the label's voxels on the planes of its source; None if it lies on other planes."""
    try:
        spots = [locate(plane, grid, where=where) for plane in planes]
    except MedsegError:
        return None
    different = {(spot.axes, spot.low) for spot in spots}
    pixels = sum(rows * columns for rows, columns in (spot.shape for spot in spots))
    if len(different) < len(spots) or pixels != values.size:
        return None
    return np.stack([spot.view(values) for spot in spots])


def _as_volume(values: NDArray[Any], grid: Grid, plane: Plane, frame_of_reference: str) -> Any:
    """The label on planes of its own, turned so that they lie as the source's do where that needs no interpolation."""
    from highdicom import Volume as HighdicomVolume

    frame = np.eye(4)
    frame[:3, :2] = plane.affine[:, :2] / np.array(plane.spacing_mm)[::-1]
    frame[:3, 2] = np.cross(frame[:3, 0], frame[:3, 1])
    turns = nio.io_orientation(np.linalg.inv(frame) @ grid.affine)
    affine = LPS_TO_RAS @ grid.affine @ nio.inv_ornt_aff(turns, grid.shape)
    array = nio.apply_orientation(values, turns)
    return HighdicomVolume(
        np.ascontiguousarray(array.transpose(2, 1, 0)),
        affine[:, [2, 1, 0, 3]],
        coordinate_system="PATIENT",
        frame_of_reference_uid=frame_of_reference,
    )


def _description(structure: Structure, algorithm: Algorithm) -> Dataset:
    """One item of the SegmentSequence."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    known_type, known_category = concept_of(structure.name)
    concept = structure.concept or known_type
    description = SegmentDescription(
        segment_number=structure.number,
        segment_label=_text(structure.name) or f"structure {structure.number}",
        segmented_property_category=_code(structure.category or known_category),
        segmented_property_type=_code(concept),
        algorithm_type="AUTOMATIC" if algorithm.automatic else "MANUAL",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=_text(algorithm.name),
            family=codes.cid7162.ArtificialIntelligence,
            version=_text(algorithm.version),
        )
        if algorithm.automatic
        else None,
        display_color=None if structure.color is None else CIELabColor.from_rgb(*structure.color),
    )
    side = side_of(structure.name)
    if side is not None and side.meaning.casefold() not in concept.meaning.casefold():
        modifier = _code(side)
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return description  # type: ignore[no-any-return]


def _code(concept: Concept) -> Dataset:
    from highdicom.sr import CodedConcept

    return CodedConcept(concept.value, concept.scheme, _text(concept.meaning))  # type: ignore[no-any-return]


def _text(text: str) -> str:
    """A text that DICOM's LO holds: no backslash or control character, at most 64 characters."""
    printable = "".join(c if c.isprintable() and c != "\\" else " " for c in text)
    return printable.strip()[:MAX_TEXT].strip()
