"""Writing RT structure sets: what is written reads back exactly."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)
from rtstruct_phantom import GRID, ORDERS, oblique_grid, read, turned

from medseg.errors import Code, MedsegError
from medseg.formats import read_grid
from medseg.formats.dicom import annotations, rtstruct
from medseg.formats.dicom.rtstruct_writer import write_rtstruct
from medseg.formats.dicom.structures import Algorithm, Concept, Structure
from medseg.phantom import write_dicom_series
from medseg.volume import Grid, Volume

ANATOMY = Concept("91723000", "SCT", "Anatomical structure")
STRUCTURES = (
    Structure(1, "liver", Concept("10200004", "SCT", "Liver"), ANATOMY, (221, 130, 101)),
    Structure(2, "Läsion 病変", None, None, (255, 0, 0)),
    Structure(3, "nowhere"),
)
MODEL = Algorithm("medseg unet", "1.2.3")


def regions(shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.uint8]:
    """Noise in blobs: holes, islands, corners that touch, voxels at every face."""
    rng = np.random.default_rng(seed)
    array = (rng.random(shape) < 0.75).astype(np.uint8)
    array[rng.random(shape) < 0.2] = 2
    return array


def write_source(folder: Path, grid: Grid) -> list[Path]:
    return write_dicom_series(folder, Volume(np.zeros(grid.shape, dtype=np.int16), grid))


def assert_reads_back(path: Path, label: Volume) -> None:
    """Every mask is exactly the label map's, on the label map's grid."""
    annotation = annotations.read_annotation(path)
    found = dict(annotations.masks(annotation, label.grid))
    assert list(found) == [s.number for s in annotation.structures]
    for number, mask in found.items():
        np.testing.assert_array_equal(mask, label.array == number)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(st.integers(2, 14), st.integers(2, 14), st.integers(2, 6)),
    st.sampled_from(ORDERS),
    st.tuples(*[st.booleans()] * 3),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 8.0, 180.0]),
)
def test_what_is_written_reads_back_exactly(
    tmp_path: Path,
    shape: tuple[int, int, int],
    order: tuple[int, ...],
    flips: tuple[bool, ...],
    seed: int,
    angle: float,
) -> None:
    """Any orientation of the scan, any order of the label map's axes."""
    shutil.rmtree(tmp_path / "scan", ignore_errors=True)
    grid = oblique_grid(shape, seed, angle)
    source = write_source(tmp_path / "scan", grid)
    label = Volume(regions(shape, seed), grid)
    path = tmp_path / "rs.dcm"
    write_rtstruct(path, turned(label, order, flips), STRUCTURES, source, algorithm=MODEL)
    assert_reads_back(path, label)
    assert_reads_back(path, turned(label, order, flips))
    assert_reads_back(path, turned(label, order[::-1], flips[::-1]))


def test_structures_may_overlap(tmp_path: Path) -> None:
    """A region of several values, and one inside it."""
    grid = oblique_grid((9, 8, 4), 1, 8.0)
    label = Volume(regions((9, 8, 4)), grid)
    inside = replace(STRUCTURES[0], values=(2,)), replace(STRUCTURES[1], values=(1, 2))
    write_rtstruct(tmp_path / "rs.dcm", label, inside, write_source(tmp_path / "scan", grid), algorithm=MODEL)
    found = dict(annotations.masks(annotations.read_annotation(tmp_path / "rs.dcm"), grid))
    np.testing.assert_array_equal(found[1], label.array == 2)
    np.testing.assert_array_equal(found[2], label.array > 0)


def test_the_grid_that_the_series_is_read_with_gives_the_same(tmp_path: Path) -> None:
    source = write_source(tmp_path / "scan", GRID)
    label = Volume(regions(GRID.shape, 5), GRID)
    write_rtstruct(tmp_path / "rs.dcm", label, STRUCTURES, source, algorithm=MODEL)
    assert_reads_back(tmp_path / "rs.dcm", Volume(label.array, read_grid(tmp_path / "scan")))


def test_the_header_says_what_where_and_by_whom(tmp_path: Path) -> None:
    source = write_source(tmp_path / "scan", GRID)
    label = Volume(regions(GRID.shape), GRID)
    write_rtstruct(tmp_path / "rs.dcm", label, STRUCTURES, source[::-1], algorithm=MODEL)
    images = [pydicom.dcmread(file) for file in source]
    annotation = rtstruct.read_annotation(tmp_path / "rs.dcm")
    assert annotation.kind == "RTSTRUCT"
    assert [(s.number, s.name, s.concept, s.color) for s in annotation.structures] == [
        (s.number, s.name, s.concept, s.color) for s in STRUCTURES
    ]
    assert annotation.series == (images[0].SeriesInstanceUID,)
    assert annotation.images == {image.SOPInstanceUID for image in images}
    assert annotation.frame_of_reference == images[0].FrameOfReferenceUID
    written = pydicom.dcmread(tmp_path / "rs.dcm")
    assert (annotation.uid, annotation.series_uid) == (written.SOPInstanceUID, written.SeriesInstanceUID)
    assert annotation.series_uid not in annotation.series
    for tag in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID"):
        assert written[tag].value == images[0][tag].value
    assert (written.ApprovalStatus, written.Modality) == ("UNAPPROVED", "RTSTRUCT")
    assert {roi.ROIGenerationAlgorithm for roi in written.StructureSetROISequence} == {"AUTOMATIC"}
    assert {roi.ROIGenerationDescription for roi in written.StructureSetROISequence} == {"medseg unet 1.2.3"}
    assert [o.RTROIInterpretedType for o in written.RTROIObservationsSequence] == ["ORGAN", "", ""]
    assert "ContourSequence" not in written.ROIContourSequence[2]


def test_what_people_drew_is_manual(tmp_path: Path) -> None:
    source = write_source(tmp_path / "scan", GRID)
    label = Volume(regions(GRID.shape), GRID)
    write_rtstruct(tmp_path / "rs.dcm", label, STRUCTURES, source, algorithm=Algorithm("manual", "", automatic=False))
    rois = pydicom.dcmread(tmp_path / "rs.dcm").StructureSetROISequence
    assert {(r.ROIGenerationAlgorithm, r.ROIGenerationDescription) for r in rois} == {("MANUAL", "manual")}


def test_every_contour_lies_in_the_image_that_it_refers_to(tmp_path: Path) -> None:
    source = write_source(tmp_path / "scan", GRID)
    write_rtstruct(tmp_path / "rs.dcm", Volume(regions(GRID.shape), GRID), STRUCTURES, source, algorithm=MODEL)
    images = {image.SOPInstanceUID: image for image in map(pydicom.dcmread, source)}
    contours = [
        c for r in pydicom.dcmread(tmp_path / "rs.dcm").ROIContourSequence for c in r.get("ContourSequence", ())
    ]
    assert len(contours) > 20
    for contour in contours:
        assert contour.ContourGeometricType == "CLOSED_PLANAR"
        points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
        assert len(points) == contour.NumberOfContourPoints
        assert max(len(text) for text in map(str, contour.ContourData)) <= 16
        assert not np.array_equal(points[0], points[-1])
        image = images[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
        normal = np.cross(image.ImageOrientationPatient[:3], image.ImageOrientationPatient[3:])
        assert np.abs((points - image.ImagePositionPatient) @ normal).max() < 1e-5


def test_the_standard_s_checker_finds_no_error(tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None or shutil.which("dcmdump") is None:
        pytest.skip("needs dicom3tools and dcmtk")
    source = write_source(tmp_path / "scan", GRID)
    path = tmp_path / "rs.dcm"
    write_rtstruct(path, Volume(regions(GRID.shape), GRID), STRUCTURES, source, algorithm=MODEL)
    checked = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
    assert "Error" not in checked.stdout + checked.stderr
    assert "RTStructureSet" in checked.stdout + checked.stderr
    assert subprocess.run(["dcmdump", str(path)], capture_output=True, check=False).returncode == 0


def write_enhanced(path: Path, grid: Grid, order: Sequence[int]) -> Path:
    """Headers of an enhanced multi-frame MR whose frames come in any order."""
    (first, *_), dataset = write_source(path.parent / "classic", grid), Dataset()
    dataset.update({e.tag: e for e in pydicom.dcmread(first) if e.tag.group in (0x10, 0x20) or e.keyword == "Modality"})
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient"):
        del dataset[keyword]
    lps = np.diag([-1.0, -1.0, 1.0])
    dataset.SOPClassUID, dataset.SOPInstanceUID = EnhancedMRImageStorage, generate_uid()
    dataset.Columns, dataset.Rows, dataset.NumberOfFrames = grid.shape[0], grid.shape[1], grid.shape[2]
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [f"{v:.10f}" for v in (lps @ grid.direction)[:, :2].T.ravel()]
    measures.PixelSpacing = [f"{grid.spacing_mm[1]:.8f}", f"{grid.spacing_mm[0]:.8f}"]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    frames = []
    for k in order:
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = [f"{v:.8f}" for v in lps @ grid.to_world((0, 0, k))]
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], frames
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_a_multi_frame_source_is_referred_to_by_frames(tmp_path: Path) -> None:
    grid = oblique_grid((9, 7, 5), seed=4)
    order = [3, 0, 4, 1, 2]
    source = write_enhanced(tmp_path / "enhanced.dcm", grid, order)
    label = Volume(regions(grid.shape, 1), grid)
    path = tmp_path / "rs.dcm"
    write_rtstruct(path, label, STRUCTURES, [source], algorithm=MODEL)
    assert_reads_back(path, label)
    assert len(rtstruct.read_annotation(path).images) == 1
    for contour in pydicom.dcmread(path).ROIContourSequence[0].ContourSequence:
        k = grid.to_index(np.array(contour.ContourData[:3], dtype=float) * [-1, -1, 1])[2]
        assert order[contour.ContourImageSequence[0].ReferencedFrameNumber - 1] == round(k)


def refusal(
    path: Path, label: Volume, source: Sequence[Path], structures: Sequence[Structure] = STRUCTURES
) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        write_rtstruct(path, label, structures, source, algorithm=MODEL)
    assert list(path.parent.glob("*.dcm")) == []  # nothing was left behind
    return caught.value


def test_label_maps_beside_the_slices_are_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "scan", GRID)
    path, label = tmp_path / "rs.dcm", Volume(regions(GRID.shape), GRID)
    shifted = GRID.affine.copy()
    shifted[:3, 3] += GRID.affine[:3, 2] * 0.3
    thicker = GRID.affine @ np.diag([1, 1, 1.02, 1])
    for affine in (shifted, thicker):
        error = refusal(path, Volume(label.array, Grid(GRID.shape, affine)), source)
        assert (error.code, "dicom-seg" in str(error.remedy)) == (Code.OUTPUT, True)
    cropped = Volume(label.array[:, :, :-1], Grid((12, 11, 8), GRID.affine))
    assert refusal(path, cropped, source).code is Code.OUTPUT
    assert refusal(path, label, source[:-1]).code is Code.OUTPUT  # a slice is missing
    assert refusal(path, label, [*source[:-1], source[0]]).code is Code.OUTPUT  # one is there twice
    wider = Volume(np.zeros((13, 11, 9), dtype=np.uint8), Grid((13, 11, 9), GRID.affine))
    assert refusal(path, wider, source).code is Code.OUTPUT


def test_sources_that_cannot_be_referred_to_are_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "scan", GRID)
    path, label = tmp_path / "rs.dcm", Volume(regions(GRID.shape), GRID)
    assert refusal(path, label, []).code is Code.REFERENCE
    other = write_dicom_series(tmp_path / "other", Volume(np.zeros(GRID.shape, np.int16), GRID), uid_seed="9")
    assert refusal(path, label, [*source[:-1], other[-1]]).code is Code.REFERENCE
    for file in source:
        dataset = pydicom.dcmread(file)
        del dataset.FrameOfReferenceUID
        dataset.save_as(file)
    assert refusal(path, label, source).code is Code.NO_GEOMETRY
    source[0].write_bytes(source[0].read_bytes()[:300])
    assert refusal(path, label, source).code in (Code.TRUNCATED, Code.REFERENCE)


def test_structures_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "scan", GRID)
    path, label = tmp_path / "rs.dcm", Volume(regions(GRID.shape), GRID)
    assert refusal(path, label, source, STRUCTURES[:1]).code is Code.LABEL  # what are the twos?
    assert refusal(path, label, source, (*STRUCTURES, STRUCTURES[0])).code is Code.OUTPUT
    assert refusal(path, label, source, (*STRUCTURES[:2], Structure(3, "x" * 65))).code is Code.OUTPUT
    assert refusal(path, label, source, (*STRUCTURES[:2], Structure(3, "a\\b"))).code is Code.OUTPUT
    assert refusal(path, label, source, ()).code is Code.OUTPUT


def test_nothing_about_the_patient_comes_out_but_in_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """Values that break their type's rules make pydicom warn with the value."""
    source = write_source(tmp_path / "scan", GRID)
    for file in source:
        dataset = pydicom.dcmread(file)
        with pydicom.config.disable_value_validation():
            dataset.PatientBirthDate, dataset.PatientName = "CANARY-DATE", "CANARY=" * 20
            dataset.AccessionNumber, dataset.PatientSex = "CANARY" * 9, "canary"
            dataset.PatientComments = "CANARY"
            dataset.save_as(file)
    recwarn.clear()
    write_rtstruct(tmp_path / "rs.dcm", Volume(regions(GRID.shape), GRID), STRUCTURES, source, algorithm=MODEL)
    read(tmp_path / "rs.dcm", GRID)
    assert "canary" not in caplog.text.lower()
    assert not [w for w in recwarn if "canary" in str(w.message).lower()]
    assert "PatientComments" not in pydicom.dcmread(tmp_path / "rs.dcm")
