"""The catalog of a DICOM tree: whose series, which annotations belong to them, what is wrong; from headers alone."""

from __future__ import annotations

import hashlib
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid
from scipy.spatial.transform import Rotation

from medseg.formats.dicom import files
from medseg.formats.dicom.catalog import Catalog, CatalogSeries, read_catalog
from medseg.phantom import write_dicom_series
from medseg.volume import Grid, Volume

SHAPE = (14, 11, 6)


def oblique(shift: float = 0.0) -> Volume:
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", [7, -11, 4], degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.diag([-1, -1, 1]) @ np.diag([0.9, 1.1, 2.5])
    affine[:3, 3] = (12 + shift, -7, 30)
    array = np.random.default_rng(3).integers(-200, 300, SHAPE).astype(np.int16)
    return Volume(array[None], Grid(SHAPE, affine), "CT")


def change(files: Sequence[Path], **tags: object) -> None:
    for path in files:
        dataset = pydicom.dcmread(path)
        for tag, value in tags.items():
            setattr(dataset, tag, value)
        dataset.save_as(path, enforce_file_format=True)


def write_rtstruct(
    path: Path,
    source: Sequence[Path],
    *,
    names: Sequence[str] = ("GTV",),
    series: str | None = None,
    images: Sequence[str] | None = None,
    frame: str | None = None,
) -> str:
    """A structure set with one square per structure on the second slice of a series; what it refers to can be bent."""
    slices = [pydicom.dcmread(p) for p in source]
    first = slices[0]
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = first.StudyInstanceUID, generate_uid()
    ds.PatientName, ds.PatientID, ds.Modality = first.PatientName, first.PatientID, "RTSTRUCT"
    ds.StructureSetLabel = "drawn"
    frame = frame or first.FrameOfReferenceUID
    drawn_on = [s.SOPInstanceUID for s in slices] if images is None else list(images)
    contour_images = [sequence(ReferencedSOPClassUID=first.SOPClassUID, ReferencedSOPInstanceUID=u) for u in drawn_on]
    rt_series = sequence(SeriesInstanceUID=series or first.SeriesInstanceUID, ContourImageSequence=contour_images)
    study = sequence(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",
        ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[rt_series],
    )
    ds.ReferencedFrameOfReferenceSequence = [sequence(FrameOfReferenceUID=frame, RTReferencedStudySequence=[study])]
    ds.StructureSetROISequence = [
        sequence(ROINumber=n, ReferencedFrameOfReferenceUID=frame, ROIName=name, ROIGenerationAlgorithm="MANUAL")
        for n, name in enumerate(names, start=1)
    ]
    ds.ROIContourSequence, ds.RTROIObservationsSequence = [], []
    middle = slices[1]
    row, column = (np.array(middle.ImageOrientationPatient[i : i + 3], float) for i in (0, 3))
    origin, (dj, di) = np.array(middle.ImagePositionPatient, float), map(float, middle.PixelSpacing)
    for number in range(1, len(names) + 1):
        corners = [(2, 2), (2 + 2 * number, 2), (2 + 2 * number, 6), (2, 6)]
        points = np.array([origin + row * di * i + column * dj * j for i, j in corners])
        contour = sequence(
            ContourGeometricType="CLOSED_PLANAR",
            NumberOfContourPoints=4,
            ContourData=[f"{v:.6f}" for v in points.ravel()],
            ContourImageSequence=[contour_images[min(1, len(contour_images) - 1)]] if contour_images else [],
        )
        ds.ROIContourSequence.append(sequence(ReferencedROINumber=number, ContourSequence=[contour]))
        ds.RTROIObservationsSequence.append(
            sequence(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="", ROIInterpreter="")
        )
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.save_as(path, enforce_file_format=True)
    return str(ds.SOPInstanceUID)


def sequence(**tags: object) -> pydicom.Dataset:
    item = pydicom.Dataset()
    for tag, value in tags.items():
        setattr(item, tag, value)
    return item


def write_seg(path: Path, source: Sequence[Path], names: Sequence[str] = ("liver", "kidney")) -> str:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    slices = [pydicom.dcmread(p) for p in source]
    mask = np.zeros((len(slices), slices[0].Rows, slices[0].Columns), dtype=np.uint8)
    for number in range(1, len(names) + 1):
        mask[1:4, 2 * number : 2 * number + 2, 3:9] = number
    segments = [
        hd.seg.SegmentDescription(
            number,
            name,
            codes.SCT.AnatomicalStructure,
            codes.SCT.Liver,
            hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(names, start=1)
    ]
    seg = hd.seg.Segmentation(
        slices,
        mask,
        hd.seg.SegmentationTypeValues.BINARY,
        segments,
        generate_uid(),
        2,
        generate_uid(),
        1,
        "medseg",
        "tests",
        "1",
        "1",
    )
    seg.save_as(path)
    return str(seg.SOPInstanceUID)


def write_tree(root: Path) -> dict[str, list[Path]]:
    """Two patients with two series each in one study per series; the second MR lacks a slice."""
    tree = {
        "a_ct": write_dicom_series(root / "A" / "1", oblique(), patient_id="A", uid_seed="1"),
        "a_mr": write_dicom_series(root / "A" / "x" / "y" / "2", oblique(), modality="MR", patient_id="A"),
        "b_ct": write_dicom_series(root / "B", oblique(5), patient_id="B", uid_seed="2"),
        "b_mr": write_dicom_series(root / "B" / "mr", oblique(5), modality="MR", patient_id="B"),
    }
    tree["b_mr"].pop(3).unlink()
    return tree


def uid_of(files: Sequence[Path]) -> str:
    return str(pydicom.dcmread(files[0], specific_tags=["SeriesInstanceUID"]).SeriesInstanceUID)


def entry(catalog: Catalog, files: Sequence[Path]) -> CatalogSeries:
    (found,) = [s for s in catalog.series if s.info.uid == uid_of(files)]
    return found


def test_series_are_grouped_named_and_assessed(tmp_path: Path) -> None:
    tree = write_tree(tmp_path)
    calls: list[tuple[int, int]] = []
    catalog = read_catalog(tmp_path, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (23, 23)
    assert [s.case_id for s in catalog.series] == sorted(s.case_id for s in catalog.series)
    assert len(catalog.series) == 4
    ct = entry(catalog, tree["a_ct"])
    assert ct.case_id == "CT_" + hashlib.sha256(ct.info.uid.encode()).hexdigest()[:6]
    assert ct.problem is None
    assert ct.grid is not None
    assert ct.grid.difference(oblique().grid) is None or ct.grid.difference(oblique().grid.reoriented("LPS")) is None
    broken = entry(catalog, tree["b_mr"])
    assert broken.grid is None
    assert broken.problem is not None
    assert broken.problem.code == "E_GAP"
    assert broken.info.num_slices == 5
    assert (catalog.orphans, catalog.others, catalog.damaged) == ((), {}, ())


def test_patients_are_told_apart_without_their_names(tmp_path: Path) -> None:
    tree = write_tree(tmp_path)
    catalog = read_catalog(tmp_path)
    patients = {name: entry(catalog, files).patient for name, files in tree.items()}
    assert patients["a_ct"] == patients["a_mr"] != patients["b_ct"] == patients["b_mr"]
    assert all(re.fullmatch("p_[0-9a-f]{6}", p) for p in patients.values())
    smallest = min(entry(catalog, tree[n]).study_uid for n in ("a_ct", "a_mr"))
    assert patients["a_ct"] == "p_" + hashlib.sha256(smallest.encode()).hexdigest()[:6]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for folder in ("A", "B"):
        shutil.move(tmp_path / folder, moved / folder)
    again = read_catalog(moved)
    assert [(s.case_id, s.patient) for s in again.series] == [(s.case_id, s.patient) for s in catalog.series]


def test_a_shared_study_joins_series_without_a_patient_id(tmp_path: Path) -> None:
    tree = write_tree(tmp_path)
    change(tree["a_ct"], PatientID="", StudyInstanceUID="1.2.3")
    change(tree["a_mr"], PatientID="", StudyInstanceUID="1.2.4")
    change(tree["b_ct"], PatientID="", StudyInstanceUID="1.2.3")
    catalog = read_catalog(tmp_path)
    patient = {name: entry(catalog, files).patient for name, files in tree.items()}
    assert patient["a_ct"] == patient["b_ct"]
    assert len(set(patient.values())) == 3  # an empty PatientID joins nobody
    change(tree["b_ct"][:1], PatientID="B")  # one slice that tells: over it, three series are one patient's
    catalog = read_catalog(tmp_path)
    patient = {name: entry(catalog, files).patient for name, files in tree.items()}
    assert patient["a_ct"] == patient["b_ct"] == patient["b_mr"] != patient["a_mr"]


def test_annotations_find_the_series_that_they_were_drawn_on(tmp_path: Path) -> None:
    tree = write_tree(tmp_path)
    rt = write_rtstruct(tmp_path / "rt.dcm", tree["a_ct"], names=("GTV", "spinal cord"))
    seg = write_seg(tmp_path / "A" / "x" / "seg.dcm", tree["b_ct"])
    catalog = read_catalog(tmp_path)
    (on_a,) = entry(catalog, tree["a_ct"]).annotations
    (on_b,) = entry(catalog, tree["b_ct"]).annotations
    assert (on_a.kind, on_a.uid, [s.name for s in on_a.structures]) == ("RTSTRUCT", rt, ["GTV", "spinal cord"])
    assert (on_b.kind, on_b.uid, [s.name for s in on_b.structures]) == ("SEG", seg, ["liver", "kidney"])
    assert not entry(catalog, tree["a_mr"]).annotations
    assert not entry(catalog, tree["b_mr"]).annotations
    assert entry(catalog, tree["a_ct"]).warnings == entry(catalog, tree["b_ct"]).warnings == ()
    assert (catalog.orphans, catalog.damaged) == ((), ())


def test_a_wrong_series_reference_is_mended_by_the_images(tmp_path: Path) -> None:
    tree = write_tree(tmp_path)
    write_rtstruct(tmp_path / "rt.dcm", tree["a_ct"], series=generate_uid())
    catalog = read_catalog(tmp_path)
    ct = entry(catalog, tree["a_ct"])
    assert len(ct.annotations) == 1
    assert ct.problem is None
    assert "names another series" in ct.warnings[-1]


def test_a_cropped_series_keeps_its_structures_by_its_frame_of_reference(tmp_path: Path) -> None:
    tree = write_tree(tmp_path)
    write_rtstruct(tmp_path / "rt.dcm", tree["a_ct"], images=["1.2.3.4.5"])
    ct = entry(read_catalog(tmp_path), tree["a_ct"])
    assert len(ct.annotations) == 1
    assert ct.warnings[-1] == "RTSTRUCT: it refers to other images of this series, in the same frame of reference"


@pytest.mark.parametrize(
    ("bent", "reason"),
    [
        ({"frame": "1.2.3.4"}, "another frame of reference"),
        ({"series": "1.2.3.4", "images": ["1.2.3.4.5"]}, "images that are not here"),
        ({"series": "1.2.3.4", "images": []}, "images that are not here"),
        ({"images": ["1.2.3.4.5"], "frame": "1.2.3.4"}, "another frame of reference"),
    ],
)
def test_annotations_without_a_home(tmp_path: Path, bent: dict[str, object], reason: str) -> None:
    tree = write_tree(tmp_path)
    uid = write_rtstruct(tmp_path / "rt.dcm", tree["a_ct"], **bent)  # type: ignore[arg-type]
    catalog = read_catalog(tmp_path)
    ((orphan, told),) = catalog.orphans
    assert orphan.uid == uid
    assert told.startswith("E_REFERENCE: ")
    assert reason in told
    assert not any(s.annotations for s in catalog.series)


def test_images_in_two_series_do_not_mend_a_wrong_reference(tmp_path: Path) -> None:
    tree = write_tree(tmp_path)
    images = [pydicom.dcmread(tree[name][0]).SOPInstanceUID for name in ("a_ct", "a_mr")]
    write_rtstruct(tmp_path / "rt.dcm", tree["a_ct"], series=generate_uid(), images=images)
    ((_, reason),) = read_catalog(tmp_path).orphans
    assert "do not all lie in one other series" in reason


def test_missing_images_are_counted(tmp_path: Path) -> None:
    tree = write_tree(tmp_path)
    write_rtstruct(tmp_path / "rt.dcm", tree["a_ct"])
    tree["a_ct"][-1].unlink()
    assert (
        "RTSTRUCT: 1 of the 6 images that it refers to are not here"
        in entry(read_catalog(tmp_path), tree["a_ct"]).warnings
    )


def test_damaged_files_other_objects_and_copies(tmp_path: Path) -> None:
    tree = write_tree(tmp_path)
    write_rtstruct(tmp_path / "rt.dcm", tree["a_ct"])
    shutil.copy(tmp_path / "rt.dcm", tmp_path / "copy.dcm")
    write_rtstruct(tmp_path / "cut.dcm", tree["a_ct"])
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "cut.dcm").read_bytes()[:900])
    report = pydicom.dcmread(tree["a_ct"][0])
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    del report.Rows, report.Columns, report.PixelData
    report.save_as(tmp_path / "report.dcm", enforce_file_format=True)
    nameless = pydicom.dcmread(tree["a_ct"][0])
    del nameless.SeriesInstanceUID
    nameless.save_as(tmp_path / "nameless.dcm", enforce_file_format=True)
    (tmp_path / "notes.txt").write_text("not DICOM")
    catalog = read_catalog(tmp_path)
    assert len(catalog.series) == 4
    assert len(entry(catalog, tree["a_ct"]).annotations) == 1
    assert sum(catalog.others.values()) == 1
    damaged = {path.name: reason for path, reason in catalog.damaged}
    assert sorted(damaged) == ["cut.dcm", "nameless.dcm"]
    assert damaged["cut.dcm"].startswith("E_")
    assert damaged["nameless.dcm"].startswith("E_MALFORMED")


def test_a_zip_and_a_single_file(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    catalog = read_catalog(tmp_path / "tree")
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for path in sorted((tmp_path / "tree").rglob("*.dcm")):
            archive.write(path, path.relative_to(tmp_path))
    zipped = read_catalog(tmp_path / "tree.zip")
    assert [(s.case_id, s.patient) for s in zipped.series] == [(s.case_id, s.patient) for s in catalog.series]
    (single,) = read_catalog(tree["a_ct"][0]).series
    assert single.case_id == entry(catalog, tree["a_ct"]).case_id
    assert single.info.num_slices == 1


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_the_modality_is_safe_in_a_file_name(tmp_path: Path) -> None:
    tree = write_tree(tmp_path)
    change(tree["a_ct"], Modality="../X")
    change(tree["a_mr"], Modality="")
    catalog = read_catalog(tmp_path)
    assert entry(catalog, tree["a_ct"]).case_id.startswith("X_")
    assert entry(catalog, tree["a_mr"]).case_id.startswith("OT_")


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 10**6), max_size=60))
def test_digests_tell_apart(numbers: set[int]) -> None:
    uids = [f"1.2.{n}" for n in numbers]
    digests = files.digests(uids)
    assert len(set(digests.values())) == len(uids)
    assert all(hashlib.sha256(uid.encode()).hexdigest().startswith(d) for uid, d in digests.items())


def test_digests_grow_where_they_collide() -> None:
    first: dict[str, str] = {}
    for n in range(100_000):  # a birthday among 2**24 comes after some thousands
        uid = f"1.2.{n}"
        short = hashlib.sha256(uid.encode()).hexdigest()[:6]
        if short in first:
            break
        first[short] = uid
    digests = files.digests([uid, first[short]])
    assert digests[uid] != digests[first[short]]
    assert min(map(len, digests.values())) > 6
