"""Writing RT structure sets (RTSTRUCT): label maps as contours on the slices of their series.

rt-utils 1.2.7 was judged for this and left: it brings OpenCV, runs contours through the centres of the outer pixels
(regions shrink by half a pixel on each side), cuts two pixels wide for a keyhole, exchanges the two numbers of
PixelSpacing, computes in 32 bits, and does not know multi-frame sources. pydicom and contourpy do what is needed.

The contours are those of `medseg.formats.dicom.polygons.trace`, so that reading the file gives the label map back.
Holes are keyholes of type CLOSED_PLANAR; CLOSEDPLANAR_XOR is too new for most readers. Written with implicit VR, since
ContourData may exceed the 64 KiB that explicit VR allows (PS3.3 C.8.8.6).

Source: DICOM PS3.3 A.19 (RT Structure Set), C.8.8.3, C.8.8.5, C.8.8.6, C.8.8.8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.charset import default_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from medseg import __version__
from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.formats.dicom.frames import read_frames
from medseg.formats.dicom.parsing import parse
from medseg.formats.dicom.planes import Plane, Spot, locate, planes_of
from medseg.formats.dicom.polygons import trace
from medseg.formats.dicom.structures import Algorithm, Concept, Structure
from medseg.volume import Volume

ANATOMICAL_STRUCTURES = ("91723000", "123037004")
"""SNOMED CT codes of the category (of today and of before) whose structures are of the RTROIInterpretedType ORGAN."""
STUDY_MANAGEMENT = "1.2.840.10008.3.1.2.3.1"
"""Detached Study Management, retired: what a reference to a study has always called itself in structure sets."""
COORDINATE_DECIMALS = 6
"""Of ContourData in mm: a nanometre, and any body fits into the 16 characters of a decimal string."""
MAX_NAME = 64
"""Characters of a long string (LO)."""
MAX_CODE = 16
"""Characters of a CodeValue (SH); longer ones are LongCodeValues."""
_CARRIED_TAGS: dict[str, str | None] = {
    "PatientName": "",
    "PatientID": "",
    "IssuerOfPatientID": None,
    "PatientBirthDate": "",
    "PatientSex": "",
    "StudyInstanceUID": "",
    "StudyDate": "",
    "StudyTime": "",
    "StudyID": "",
    "AccessionNumber": "",
    "ReferringPhysicianName": "",
    "PositionReferenceIndicator": "",
}
"""Copied from the source, and what is written where the source has none (None: nothing)."""
_SOURCE_TAGS = (
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Rows",
    "Columns",
)
_NEEDED_TAGS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Rows", "Columns")
_DECIMALS = re.compile(r"\.?0+(?=\\|$)")
"""Zeros behind the last digit that says something."""
_CONTOUR_DATA_TAG = Tag(0x3006, 0x0050)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class _Slice:
    """One plane of the source: which image it is, where, and which voxels of the label map."""

    sop_class: str
    instance: str
    frame: int | None
    """Number of the frame of a multi-frame image, from 1."""
    plane: Plane
    spot: Spot

    def reference(self) -> Dataset:
        """An item of a ContourImageSequence."""
        item = _item(ReferencedSOPClassUID=self.sop_class, ReferencedSOPInstanceUID=self.instance)
        if self.frame is not None:
            item.ReferencedFrameNumber = self.frame
        return item

    def points_mm(self, polygon: FloatArray) -> FloatArray:
        """(row, column) vertices → LPS mm, (n, 3). Source: PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1."""
        steps = self.plane.orientation[::-1] * np.array(self.plane.spacing_mm)[:, None]
        return np.asarray(self.plane.position + polygon @ steps, dtype=np.float64)


def write_rtstruct(
    path: Path, label: Volume, structures: Sequence[Structure], source: Sequence[Path], *, algorithm: Algorithm
) -> None:
    """Write a label map as an RT structure set, whole or not at all.

    The file carries the patient's and the study's identifiers of the source: without them no viewer puts it there.

    Args:
        path: final name.
        label: (i, j, k), whole numbers: 0, or a value of a structure (`Structure.parts`); on the grid of the source,
            axes in any order.
        structures: regions in the order of the file; those without a voxel get no contours.
        source: the image files of one series, one per slice or one that is multi-frame.
        algorithm: who drew it.
    Raises:
        MedsegError: E_OUTPUT if the label map does not lie on the planes of the source, or for names that do not fit;
            E_LABEL for voxels of no structure; E_REFERENCE for a source that is not one series; E_NO_GEOMETRY for one
            without place or frame of reference; E_NOT_DICOM, E_TRUNCATED, E_MALFORMED for damaged files.
    """
    path = Path(path)
    _check_label(path, label, structures)
    headers = [_header(file) for file in source]
    if not headers:
        raise MedsegError(
            Code.REFERENCE,
            "no source files to refer to",
            where=path.name,
            expected="an image series",
            got="no file",
            remedy="give the series that the label belongs to",
        )
    _check_one_series(path, headers, source)
    slices = _slices(path, label, headers, source)
    with pydicom.config.disable_value_validation():  # its warnings would show values, and they may be the patient's
        dataset = _structure_set(headers, structures, label, slices, algorithm)
        with whole_file(path, ".dcm") as temporary:
            dataset.save_as(temporary, enforce_file_format=True)


def _structure_set(
    headers: list[Dataset], structures: Sequence[Structure], label: Volume, slices: list[_Slice], algorithm: Algorithm
) -> Dataset:
    dataset = _general_modules(headers[0], algorithm)
    frame = str(headers[0].FrameOfReferenceUID)
    dataset.ReferencedFrameOfReferenceSequence = [_referenced_frame(headers, frame)]
    dataset.StructureSetROISequence = [_roi(structure, frame, algorithm) for structure in structures]
    dataset.ROIContourSequence = [_roi_contour(structure, label, slices) for structure in structures]
    dataset.RTROIObservationsSequence = [_observation(structure) for structure in structures]
    return dataset


def _check_label(path: Path, label: Volume, structures: Sequence[Structure]) -> None:
    numbers = [structure.number for structure in structures]
    if not label.is_label or label.grid.ndim != 3 or label.grid.is_picture:
        raise _refused(path, "only a label map in space can be written as contours", got=label.array.shape)
    if not structures or len(set(numbers)) < len(numbers) or min(numbers) < 1:
        raise _refused(path, "structures need numbers of their own, from 1", got=numbers)
    known = {0, *(value for structure in structures for value in structure.parts)}
    unknown = sorted(set(np.unique(label.array).tolist()) - known)
    if unknown:
        raise MedsegError(
            Code.LABEL,
            "voxels of no structure",
            where=path.name,
            expected=sorted(known),
            got=unknown,
            remedy="name a structure for each value of the label",
        )
    for structure in structures:
        if len(structure.name) > MAX_NAME or "\\" in structure.name or not structure.name.isprintable():
            raise _refused(
                path,
                "a name cannot be written as ROIName",
                expected=f"at most {MAX_NAME} characters, no backslash",
                got=repr(structure.name),
                remedy="give the class a shorter name",
            )


def _header(file: Path) -> Dataset:
    """What is needed of a source file."""
    tags = [tag_for_keyword(keyword) or 0 for keyword in (*_SOURCE_TAGS, *_CARRIED_TAGS)]
    header, *_ = parse(file, tags, without_preamble=True)  # whoever chose it could read it
    missing = [tag for tag in _NEEDED_TAGS if not header.get(tag)]
    if missing:
        raise MedsegError(
            Code.REFERENCE, "a source file lacks tags", where=file.name, expected=missing, remedy="export it again"
        )
    return header


def _check_one_series(path: Path, headers: list[Dataset], source: Sequence[Path]) -> None:
    for tag in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        values = {str(header.get(tag) or "") for header in headers}
        if len(values) > 1:
            raise MedsegError(
                Code.REFERENCE,
                "the source files are not of one series",
                where=path.name,
                expected=f"one {tag}",
                got=f"{len(values)} in {len(source)} files",
                remedy="give the files of one series",
            )
    if not headers[0].get("FrameOfReferenceUID"):
        raise MedsegError(
            Code.NO_GEOMETRY,
            "the series names no frame of reference that contours could lie in",
            where=path.name,
            expected="FrameOfReferenceUID",
            remedy="write nifti instead",
        )


def _slices(path: Path, label: Volume, headers: list[Dataset], source: Sequence[Path]) -> list[_Slice]:
    """The planes of the source, each with its voxels of the label map.

    Raises:
        MedsegError: E_OUTPUT unless planes and slices of the label map are the same, one to one.
    """
    remedy = "write dicom-seg or nifti: only a label map on the series' own slices can become contours on them"
    slices: list[_Slice] = []
    for header, file in zip(headers, source, strict=True):
        planes = _planes(header, file)
        for number, plane in enumerate(planes, start=1):
            try:
                spot = locate(plane, label.grid, where=file.name)
            except MedsegError as error:
                raise _refused(
                    path,
                    "the label map does not lie on the slices of the series",
                    expected=error.expected,
                    got=f"{file.name}: {error.got}",
                    remedy=remedy,
                ) from error
            frame = number if len(planes) > 1 else None
            slices.append(_Slice(str(header.SOPClassUID), str(header.SOPInstanceUID), frame, plane, spot))
    spots = [piece.spot for piece in slices]
    covered = sum(rows * columns for rows, columns in (spot.shape for spot in spots))
    apart = len({spot.axes for spot in spots}) == 1 and len({spot.low for spot in spots}) == len(spots)
    if not apart or covered != label.array.size:
        raise _refused(
            path,
            "the label map and the series have not the same slices",
            expected=f"{len(slices)} slices of {slices[0].plane.shape[1]} × {slices[0].plane.shape[0]}, each once",
            got=f"a label map of {' × '.join(str(n) for n in label.grid.shape)}",
            remedy=remedy,
        )
    return slices


def _planes(header: Dataset, file: Path) -> list[Plane]:
    """The planes of a file, frame by frame."""
    planes = planes_of(read_frames(file, without_preamble=True), (int(header.Rows), int(header.Columns)))
    if planes is None:
        raise MedsegError(
            Code.NO_GEOMETRY,
            "a source file does not say where it lies",
            where=file.name,
            expected="ImagePositionPatient and ImageOrientationPatient",
            remedy="write nifti: contours need a place in space",
        )
    return planes


def _general_modules(source: Dataset, algorithm: Algorithm) -> Dataset:
    """All but the structures: patient, study, series, equipment, structure set, approval."""
    now = datetime.now()
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for tag, default in _CARRIED_TAGS.items():
        value = source.get(tag)
        if value is not None or default is not None:
            setattr(dataset, tag, default if value is None else str(value))
    values = {
        "SOPClassUID": RTStructureSetStorage,
        "SOPInstanceUID": generate_uid(),
        "InstanceCreationDate": f"{now:%Y%m%d}",
        "InstanceCreationTime": f"{now:%H%M%S}",
        "SeriesInstanceUID": generate_uid(),
        "Modality": "RTSTRUCT",
        "SeriesNumber": 1,
        "SeriesDate": f"{now:%Y%m%d}",
        "SeriesTime": f"{now:%H%M%S}",
        "SeriesDescription": _shortened(f"Structures by {algorithm.name}"),
        "OperatorsName": "",
        "Manufacturer": "medseg",
        "ManufacturerModelName": "medseg",
        "SoftwareVersions": __version__,
        "FrameOfReferenceUID": source.FrameOfReferenceUID,
        "InstanceNumber": 1,
        "StructureSetLabel": "medseg",
        "StructureSetName": _shortened(algorithm.name),
        "StructureSetDate": f"{now:%Y%m%d}",
        "StructureSetTime": f"{now:%H%M%S}",
        "ApprovalStatus": "UNAPPROVED",
    }
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def _referenced_frame(headers: list[Dataset], frame: str) -> Dataset:
    """Which images the contours were drawn on: all of the series."""
    images = [_item(ReferencedSOPClassUID=h.SOPClassUID, ReferencedSOPInstanceUID=h.SOPInstanceUID) for h in headers]
    series = _item(SeriesInstanceUID=headers[0].SeriesInstanceUID, ContourImageSequence=images)
    study = _item(
        ReferencedSOPClassUID=STUDY_MANAGEMENT,
        ReferencedSOPInstanceUID=headers[0].StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    return _item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[study])


def _roi(structure: Structure, frame: str, algorithm: Algorithm) -> Dataset:
    return _item(
        ROINumber=structure.number,
        ReferencedFrameOfReferenceUID=frame,
        ROIName=structure.name,
        ROIGenerationAlgorithm="AUTOMATIC" if algorithm.automatic else "MANUAL",
        ROIGenerationDescription=_shortened(f"{algorithm.name} {algorithm.version}".strip()),
    )


def _roi_contour(structure: Structure, label: Volume, slices: list[_Slice]) -> Dataset:
    item = _item(ReferencedROINumber=structure.number)
    if structure.color is not None:
        item.ROIDisplayColor = list(structure.color)
    contours = [
        _contour(piece.points_mm(polygon), piece)
        for piece in sorted(slices, key=lambda s: s.spot.low[2])
        for polygon in trace(np.isin(piece.spot.view(label.array), structure.parts))
    ]
    if contours:
        item.ContourSequence = contours
    return item


def _contour(points: FloatArray, piece: _Slice) -> Dataset:
    """One closed contour. Its numbers go in as bytes: pydicom makes an object of every number, which takes minutes."""
    item = _item(
        ContourImageSequence=[piece.reference()],
        ContourGeometricType="CLOSED_PLANAR",
        NumberOfContourPoints=len(points),
    )
    text = _DECIMALS.sub("", "\\".join(map(f"%.{COORDINATE_DECIMALS}f".__mod__, points.ravel().tolist()))).encode(
        "ascii"
    )
    text += b" " * (len(text) % 2)
    item[_CONTOUR_DATA_TAG] = RawDataElement(_CONTOUR_DATA_TAG, "DS", len(text), text, 0, True, True)
    item.set_original_encoding(True, True, default_encoding)  # pydicom then writes the bytes as they are
    return item


def _observation(structure: Structure) -> Dataset:
    is_organ = structure.category is not None and structure.category.value in ANATOMICAL_STRUCTURES
    item = _item(
        ObservationNumber=structure.number,
        ReferencedROINumber=structure.number,
        RTROIInterpretedType="ORGAN" if is_organ else "",
        ROIInterpreter="",
    )
    if structure.concept is not None:
        item.RTROIIdentificationCodeSequence = [_code(structure.concept)]
    return item


def _code(concept: Concept) -> Dataset:
    item = _item(CodingSchemeDesignator=concept.scheme, CodeMeaning=_shortened(concept.meaning))
    setattr(item, "CodeValue" if len(concept.value) <= MAX_CODE else "LongCodeValue", concept.value)
    return item


def _item(**attributes: object) -> Dataset:
    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item


def _shortened(text: str) -> str:
    return text.replace("\\", "/")[:MAX_NAME].strip()


def _refused(
    path: Path, message: str, *, expected: object = None, got: object = None, remedy: str | None = None
) -> MedsegError:
    return MedsegError(Code.OUTPUT, message, where=path.name, expected=expected, got=got, remedy=remedy)
