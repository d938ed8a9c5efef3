"""Small DICOM series with boxes drawn on them as SEG or RTSTRUCT, for tests of trees of DICOM files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid
from scipy.spatial.transform import Rotation

from medseg.phantom import write_dicom_series
from medseg.volume import Grid, Volume

SHAPE = (26, 22, 12)
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""First voxel and the one after the last, along i, j, k."""
GTV: Box = ((4, 11), (5, 12), (2, 7))
CORD: Box = ((15, 21), (9, 18), (4, 10))
OVER: Box = ((8, 17), (6, 12), (3, 6))
"""Overlaps both others."""


def box_mask(box: Box, shape: tuple[int, ...] = SHAPE) -> NDArray[np.bool_]:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*side) for side in box)] = True
    return mask


def scan(number: int, boxes: Sequence[Box], spacing: tuple[float, float, float] = (2.5, 3.0, 5.0)) -> Volume:
    """Noise with bright boxes, on an oblique, right-handed grid of its own."""
    turn = Rotation.from_euler("xyz", [6 + number, -9, 4], degrees=True).as_matrix() @ np.diag([-1.0, -1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    affine[:3, 3] = (12 + number, -7, 30)
    array = np.random.default_rng(number).normal(0, 20, SHAPE)
    for index, box in enumerate(boxes, start=1):
        array[box_mask(box)] += 200 * index
    return Volume(np.rint(array)[None], Grid(SHAPE, affine), "CT")


def write_series(
    folder: Path, number: int, boxes: Sequence[Box], *, modality: str = "CT", patient: str = ""
) -> list[Path]:
    """A series; other numbers are other patients unless told."""
    patient = patient or f"patient {number}"
    return write_dicom_series(folder, scan(number, boxes), modality=modality, uid_seed=str(number), patient_id=patient)


def write_rtstruct(path: Path, files: Sequence[Path], structures: Mapping[str, Box]) -> Path:
    """Rectangles along the edges of the boxes' voxels, one on each slice."""
    slices = [pydicom.dcmread(p, stop_before_pixels=True) for p in files]
    ds = _annotation(slices[0], RTStructureSetStorage, "RTSTRUCT")
    images = [_item(ReferencedSOPClassUID=s.SOPClassUID, ReferencedSOPInstanceUID=s.SOPInstanceUID) for s in slices]
    series = _item(SeriesInstanceUID=slices[0].SeriesInstanceUID, ContourImageSequence=images)
    study = _item(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",
        ReferencedSOPInstanceUID=slices[0].StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    frame = slices[0].FrameOfReferenceUID
    ds.StructureSetLabel = "drawn"
    ds.ReferencedFrameOfReferenceSequence = [_item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[study])]
    ds.StructureSetROISequence, ds.ROIContourSequence, ds.RTROIObservationsSequence = [], [], []
    for number, (name, (i, j, k)) in enumerate(structures.items(), start=1):
        ds.StructureSetROISequence.append(
            _item(ROINumber=number, ReferencedFrameOfReferenceUID=frame, ROIName=name, ROIGenerationAlgorithm="MANUAL")
        )
        contours = [_rectangle(slices[s], i, j, images[s]) for s in range(*k)]
        ds.ROIContourSequence.append(_item(ReferencedROINumber=number, ContourSequence=contours))
        ds.RTROIObservationsSequence.append(
            _item(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="", ROIInterpreter="")
        )
    return _save(ds, path)


def write_seg(path: Path, files: Sequence[Path], structures: Mapping[str, Box]) -> Path:
    """A binary segmentation by highdicom."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    slices = [pydicom.dcmread(p) for p in files]
    described = [
        hd.seg.SegmentDescription(
            number,
            name,
            codes.SCT.MorphologicallyAbnormalStructure,
            codes.SCT.Neoplasm,
            hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(structures, start=1)
    ]
    masks = np.stack([box_mask(box).transpose(2, 1, 0) for box in structures.values()], axis=-1).astype(np.uint8)
    seg = hd.seg.Segmentation(
        slices, masks, hd.seg.SegmentationTypeValues.BINARY, described, generate_uid(), 7, generate_uid(), 1,
        "medseg", "tests", "0", "0",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    seg.save_as(path)
    return path


def _rectangle(
    header: pydicom.Dataset, i: tuple[int, int], j: tuple[int, int], image: pydicom.Dataset
) -> pydicom.Dataset:
    row, column = (np.array(header.ImageOrientationPatient[a : a + 3], float) for a in (0, 3))
    origin, (dj, di) = np.array(header.ImagePositionPatient, float), map(float, header.PixelSpacing)
    left, right, top, bottom = i[0] - 0.5, i[1] - 0.5, j[0] - 0.5, j[1] - 0.5
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    points = np.array([origin + row * di * a + column * dj * b for a, b in corners])
    return _item(
        ContourGeometricType="CLOSED_PLANAR",
        NumberOfContourPoints=4,
        ContourData=[f"{v:.6f}" for v in points.ravel()],
        ContourImageSequence=[image],
    )


def _annotation(first: pydicom.Dataset, sop_class: str, modality: str) -> pydicom.Dataset:
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = sop_class, generate_uid(), generate_uid()
    ds.StudyInstanceUID, ds.PatientName, ds.PatientID = first.StudyInstanceUID, first.PatientName, first.PatientID
    ds.Modality = modality
    return ds


def _item(**tags: object) -> pydicom.Dataset:
    item = pydicom.Dataset()
    for tag, value in tags.items():
        setattr(item, tag, value)
    return item


def _save(ds: pydicom.Dataset, path: Path) -> Path:
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path
