"""`medseg convert`: series, trees, SEG and RTSTRUCT to NIfTI, and labels back to DICOM, as a user types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from medseg.cli import main
from medseg.formats import open_label, open_volume, read_grid, write_label
from medseg.formats.dicom.annotations import read_annotation
from medseg.formats.nifti_names import names_in
from medseg.phantom import write_dicom_series
from medseg.volume import GRID_TOLERANCE_MM, Grid, Volume

CANARY = "CanaryPatient"
"""One component only: highdicom warns of such names, and quotes them."""
CLASSES = {"liver": 1, "spleen": 2}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must be refused; its message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        convert(*arguments)
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return str(shown.out + shown.err)


def convert(*arguments: object) -> None:
    main(["convert", *(str(a) for a in arguments)])


def header_names(path: Path) -> dict[int, str]:
    """The names of values that a NIfTI file itself holds."""
    return names_in(nib.load(path).header.extensions[0].content)


def oblique(shape: tuple[int, int, int], *, seed: int = 0, orientation: str = "LPS") -> Grid:
    """A grid of three different spacings whose axes are turned about all three."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(np.eye(3) + rng.normal(0, 0.15, (3, 3)))
    turn = turn * np.sign(np.diag(turn))
    affine = np.eye(4)
    affine[:3, :3] = turn * [0.8, 1.1, 2.5]
    affine[:3, 3] = rng.normal(0, 50, 3)
    return Grid(shape, affine).reoriented(orientation)


def picture_of(grid: Grid, seed: int) -> Volume:
    return Volume(np.random.default_rng(seed).integers(-1000, 2000, (1, *grid.shape)).astype(np.float32), grid, "CT")


def label_on(grid: Grid) -> Volume:
    """Two touching blocks, off the middle, one of them with a hole: asymmetric along each axis."""
    label = np.zeros(grid.shape, dtype=np.uint8)
    i, j, k = grid.shape
    label[2 : i // 2, 1 : j - 4, 1 : k - 1] = 1
    label[4:6, 4:6, 2] = 0
    label[i // 2 : i - 2, 3 : j // 2, : k // 2] = 2
    return Volume(label, grid)


def as_patient(files: list[Path], change: Callable[[pydicom.Dataset], None] | None = None) -> None:
    """Name the patient in every file."""
    for path in files:
        dataset = pydicom.dcmread(path)
        dataset.PatientName = dataset.PatientID = CANARY
        dataset.PatientBirthDate = "19700101"
        if change is not None:
            change(dataset)
        dataset.save_as(path)


@dataclass(frozen=True)
class Tree:
    """An export: two series of which one is drawn on, and one that lacks a slice."""

    root: Path
    series: Path
    label: Path
    seg: Path
    rtstruct: Path


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    folder = tmp_path_factory.mktemp("convert")
    root = folder / "export"
    grid = oblique((22, 18, 8))
    files = write_dicom_series(root / "a" / "ct", picture_of(grid, 0), uid_seed="a")
    as_patient(files)
    label = folder / "label.nii.gz"
    write_label(label, label_on(grid))
    drawn = root / "a" / "drawn"
    table = "{liver: 1, spleen: 2}"
    convert(label, drawn / "a.seg.dcm", "--image", root / "a" / "ct", "--labels", table)
    convert(label, folder / "a.rtstruct.dcm", "--image", root / "a" / "ct", "--labels", table)
    as_patient(write_dicom_series(root / "b", picture_of(oblique((9, 11, 7), seed=1), 1), modality="MR", uid_seed="b"))
    broken = write_dicom_series(root / "c", picture_of(oblique((9, 11, 7), seed=2), 2), uid_seed="c")
    broken[3].unlink()
    return Tree(root, root / "a" / "ct", label, drawn / "a.seg.dcm", folder / "a.rtstruct.dcm")


@pytest.fixture()
def whole_tree(tree: Tree, tmp_path: Path) -> Path:
    """The export without the broken series, to write into."""
    root = tmp_path / "whole"
    shutil.copytree(tree.root, root, ignore=shutil.ignore_patterns("c"))
    return root


def same_label(path: Path, reference: Path) -> bool:
    """Whether two label files hold the same voxels at the same places."""
    a, b = open_label(path), open_label(reference)
    a = a.reoriented(b.grid.orientation)
    return b.grid.difference(a.grid) is None and np.array_equal(a.array, b.array)


def test_a_series_becomes_one_nifti_file(tree: Tree, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new folder" / "scan, 1.nii.gz"
    convert(tree.series, out)
    volume, source = open_volume(out), open_volume(tree.series)
    assert np.array_equal(volume.array, source.array)
    assert np.abs(volume.grid.corners() - source.grid.corners()).max() < GRID_TOLERANCE_MM
    assert str(out) in capsys.readouterr().out and not list(tmp_path.rglob("*.json"))
    assert CANARY.encode() not in nib.load(out).header.binaryblock
    assert "exists already" in refused(capsys, tree.series, out)
    convert(tree.series, out, "--overwrite")
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tree.series)
    convert(tmp_path / "zipped.zip", tmp_path / "zip.nii")
    assert np.array_equal(open_volume(tmp_path / "zip.nii").array, source.array)


def test_several_series_need_a_choice_or_a_folder(tree: Tree, tmp_path: Path, capsys) -> None:
    message = refused(capsys, tree.root, tmp_path / "x.nii.gz")
    assert "E_MULTI_SERIES" in message and not (tmp_path / "x.nii.gz").exists()
    uid = pydicom.dcmread(tree.root / "b" / "slice_0001.dcm").SeriesInstanceUID
    convert(tree.root, tmp_path / "x.nii.gz", "--series", uid)
    assert read_grid(tmp_path / "x.nii.gz").shape == (9, 11, 7)
    assert "no such series" in refused(capsys, tree.root, tmp_path / "folder", "--series", "1.2.3")


def test_a_tree_becomes_a_folder_of_images_and_labels(tree: Tree, tmp_path: Path, capsys) -> None:
    out = tmp_path / "nifti"
    message = refused(capsys, tree.root, out)
    assert any("remedy: " in line and "--resample-irregular" in line for line in message.splitlines())
    assert message.endswith("\nE_GAP: 1 of 3 series was not converted; see above\n")
    names = sorted(p.name for p in out.iterdir())
    (image,) = [n for n in names if n.startswith("CT_") and "_seg" not in n]
    case = image.removesuffix(".nii.gz")
    assert len(names) == 4 and f"{case}_seg.nii.gz" in names and "predictions.json" in names
    assert same_label(out / f"{case}_seg.nii.gz", tree.label)
    assert header_names(out / f"{case}_seg.nii.gz") == {value: name for name, value in CLASSES.items()}
    table = json.loads((out / "predictions.json").read_text())
    assert table["labels"] == {"background": 0, **CLASSES}
    assert table["cases"][case]["files"] == [image, f"{case}_seg.nii.gz"]
    assert not any(CANARY in p.read_bytes().decode("latin-1") for p in out.rglob("*") if p.is_file())
    assert "exist already" in refused(capsys, tree.root, out)


def test_what_is_irregular_is_mended_when_asked(tree: Tree, tmp_path: Path) -> None:
    convert(tree.root, tmp_path / "out", "--resample-irregular")
    cases = json.loads((tmp_path / "out" / "predictions.json").read_text())["cases"]
    assert len(cases) == 3
    assert [bool(record["notes"]) for record in cases.values()].count(True) == 1
    convert(tree.root / "c", tmp_path / "c.nii.gz", "--resample-irregular")
    (record,) = json.loads((tmp_path / "c.json").read_text())["cases"].values()
    assert record["notes"]


def test_a_tree_without_problems_ends_well(whole_tree: Path, tmp_path: Path, capsys) -> None:
    convert(whole_tree, tmp_path / "out", "--labels", "{organ: [Liver, SPLEEN]}")
    assert "2 of 2 series" in capsys.readouterr().out
    (label,) = (tmp_path / "out").glob("*_seg.nii.gz")
    assert set(np.unique(open_label(label).array)) == {0, 1}
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["labels"] == {"background": 0, "organ": 1}
    convert(whole_tree, tmp_path / "separate", "--separate")
    names = sorted(p.name for p in (tmp_path / "separate").glob("*_seg/*"))
    assert names == ["liver.nii.gz", "spleen.nii.gz"]


def test_a_broken_annotation_leaves_the_image(whole_tree: Path, tmp_path: Path, capsys) -> None:
    seg = whole_tree / "a" / "drawn" / "a.seg.dcm"
    dataset = pydicom.dcmread(seg)
    dataset.PixelData = dataset.PixelData[:10]
    dataset.save_as(seg)
    message = refused(capsys, whole_tree, tmp_path / "out")
    assert "what was drawn on it" in message and "1 label was not converted" in message
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2 and not list((tmp_path / "out").glob(".*"))


def test_each_failure_of_a_tree_comes_with_its_own_remedy(tree: Tree, whole_tree: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(tree.root / "c", whole_tree / "c")
    shutil.copy(tree.rtstruct, whole_tree / "a" / "drawn" / "lost.dcm")
    dataset = pydicom.dcmread(whole_tree / "a" / "drawn" / "lost.dcm")
    dataset.walk(lambda ds, e: setattr(e, "value", "1.2.3") if e.VR == "UI" and "Class" not in e.keyword else None)
    dataset.save_as(whole_tree / "a" / "drawn" / "lost.dcm")
    (whole_tree / "photo.dcm").write_bytes(b"\xff\xd8\xff\xe0" + bytes(300))
    (whole_tree / "raw.dcm").write_bytes(bytes(300))
    lines = refused(capsys, whole_tree, tmp_path / "out").splitlines()
    after = {key: below for line, below in pairwise(lines) for key in ("E_GAP", "lost", "photo", "raw") if key in line}
    assert "--resample-irregular" in after["E_GAP"]
    assert "shows what belongs together" in after["lost"]
    assert "ending of its content" in after["photo"]
    assert "--without-preamble" in after["raw"]
    assert any("its content is a JPEG picture" in line for line in lines)
    end = "1 of 3 series, 1 annotation without its images and 2 damaged files were not converted; see above"
    assert lines[-1] == f"E_GAP: {end}"


def test_a_scan_is_not_taken_for_a_label_map(tree: Tree, tmp_path: Path, capsys) -> None:
    grid = read_grid(tree.series)
    for name, values in (
        ("many", np.arange(np.prod(grid.shape)) % 300),
        ("negative", np.arange(np.prod(grid.shape)) % 3 - 1),
    ):
        write_label(tmp_path / f"{name}.nii.gz", Volume(values.reshape(grid.shape).astype(np.int16), grid))
        message = refused(capsys, tmp_path / f"{name}.nii.gz", tmp_path / "x.seg.dcm", "--image", tree.series)
        assert "E_LABEL: this looks like a scan, not a label map" in message and "--labels" not in message
    write_label(tmp_path / "empty.nii.gz", Volume(np.zeros(grid.shape, np.uint8), grid))
    message = refused(capsys, tmp_path / "empty.nii.gz", tmp_path / "x.seg.dcm", "--image", tree.series)
    assert "nothing is drawn" in message and "nothing but 0" in message


def test_a_picture_that_is_called_dicom_is_called_a_picture(tmp_path: Path, capsys) -> None:
    (tmp_path / "x.dcm").write_bytes(b"\xff\xd8\xff\xe0" + bytes(300))
    assert "its content is a JPEG picture" in refused(capsys, tmp_path / "x.dcm", tmp_path / "x.nii.gz")


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
@pytest.mark.parametrize("orientation", ["LPS", "RAS", "SPL", "IRA"])
def test_label_to_dicom_and_back(kind: str, orientation: str, tree: Tree, tmp_path: Path) -> None:
    turned = open_label(tree.label).reoriented(orientation)
    write_label(tmp_path / "turned.nii.gz", turned)
    drawn, back = tmp_path / f"x.{kind}.dcm", tmp_path / "back.nii.gz"
    (tmp_path / "turned.json").write_text(json.dumps({"labels": CLASSES}))
    convert(tmp_path / "turned.nii.gz", drawn, "--image", tree.series)
    convert(drawn, back, "--image", tree.series)
    assert same_label(back, tree.label)
    assert json.loads((tmp_path / "back.json").read_text())["labels"] == {"background": 0, **CLASSES}
    names = [s.name for s in read_annotation(drawn).structures]
    assert names == list(CLASSES)
    convert(back, tmp_path / "again.dcm", "--image", tree.series, "--format", "dicom-seg")
    assert [s.name for s in read_annotation(tmp_path / "again.dcm").structures] == names


def test_the_patient_is_named_in_annotations_alone(tree: Tree, tmp_path: Path, capfd) -> None:
    for kind in ("seg", "rtstruct"):
        command = [sys.executable, "-W", "always", "-m", "medseg", "convert"]
        out = tmp_path / f"x.{kind}.dcm"
        subprocess.run(
            [*command, tree.label, out, "--image", tree.series], check=True, cwd=Path(__file__).parent.parent
        )
        assert str(pydicom.dcmread(out).PatientName) == CANARY
    shown = capfd.readouterr()
    assert "x.seg.dcm" in shown.out and CANARY not in shown.out + shown.err
    assert "carry the name" in shown.out


def test_images_are_found_beside_an_rtstruct(tree: Tree, whole_tree: Path, tmp_path: Path, capsys) -> None:
    lonely = tmp_path / "lonely" / "deep" / "rt.dcm"
    lonely.parent.mkdir(parents=True)
    shutil.copy(tree.rtstruct, lonely)
    message = refused(capsys, lonely, tmp_path / "x.nii.gz")
    assert "E_REFERENCE" in message and "--image SERIES" in message
    shutil.copy(tree.rtstruct, whole_tree / "a" / "drawn" / "rt.dcm")
    convert(whole_tree / "a" / "drawn" / "rt.dcm", tmp_path / "x.nii.gz")
    assert same_label(tmp_path / "x.nii.gz", tree.label)


def test_the_referenced_series_is_picked_out_of_many(tree: Tree, tmp_path: Path) -> None:
    for drawn in (tree.seg, tree.rtstruct):
        convert(drawn, tmp_path / f"{drawn.name}.nii.gz", "--image", tree.root)
        assert same_label(tmp_path / f"{drawn.name}.nii.gz", tree.label)


def test_a_seg_without_images_keeps_its_own_grid(tree: Tree, tmp_path: Path) -> None:
    convert(tree.seg, tmp_path / "own.nii.gz")
    assert header_names(tmp_path / "own.nii.gz") == {value: name for name, value in CLASSES.items()}
    convert(tree.seg, tmp_path / "each", "--separate")
    assert {path.name: header_names(path) for path in (tmp_path / "each").iterdir()} == {
        f"{name}.nii.gz": {1: name} for name in CLASSES
    }
    own, whole = open_label(tmp_path / "own.nii.gz"), open_label(tree.label)
    for value in CLASSES.values():
        a, b = (v.grid.to_world(np.argwhere(v.array == value)) for v in (own, whole))
        assert len(a) == len(b) and np.abs(a.mean(axis=0) - b.mean(axis=0)).max() < GRID_TOLERANCE_MM


def test_structures_are_chosen_and_mapped(tree: Tree, tmp_path: Path, capsys) -> None:
    convert(tree.rtstruct, tmp_path / "x.nii.gz", "--image", tree.series, "--labels", "{spleen: [milz, Spleen ]}")
    assert np.array_equal(open_label(tmp_path / "x.nii.gz").array == 1, label_on(read_grid(tree.series)).array == 2)
    common = [tree.rtstruct, tmp_path / "y.nii.gz", "--image", tree.series, "--labels"]
    assert "did you mean 'spleen'" in refused(capsys, *common, "{s: splen}")
    for wrong in ("liver", "{liver: 1}", "{a: [liver, Liver], b: spleen, c: liver}", "{", "{a: []}"):
        assert "E_LABEL" in refused(capsys, *common, wrong), wrong
    assert not (tmp_path / "y.nii.gz").exists()


def overlapping(tree: Tree, path: Path) -> Path:
    """A SEG whose two segments share voxels."""
    from medseg.formats.dicom.codes import structures_of
    from medseg.formats.dicom.seg_writer import write_seg
    from medseg.formats.dicom.series import series_files
    from medseg.formats.dicom.structures import Algorithm
    from medseg.formats.reading import STRICT

    label = label_on(read_grid(tree.series))
    files = series_files(tree.series, STRICT)
    write_seg(path, label, structures_of(["liver", "spleen"]), files, algorithm=Algorithm("manual", "0", False))
    dataset = pydicom.dcmread(path)
    frames = dataset.pixel_array.copy()
    frames[:] = 1  # every frame full: the segments share their slices
    from pydicom.pixels.utils import pack_bits

    dataset.PixelData = pack_bits(frames)
    dataset.save_as(path)
    return path


def test_overlap_is_refused_unless_the_user_decides(tree: Tree, tmp_path: Path, capsys) -> None:
    seg = overlapping(tree, tmp_path / "both.seg.dcm")
    message = refused(capsys, seg, tmp_path / "x.nii.gz", "--image", tree.series)
    assert "E_LABEL" in message and "--labels '{" in message and "--separate" in message
    assert not (tmp_path / "x.nii.gz").exists()
    convert(seg, tmp_path / "x.nii.gz", "--image", tree.series, "--labels", "{a: liver, b: spleen}")
    assert json.loads((tmp_path / "x.json").read_text())["cases"]["x"]["notes"]
    convert(seg, tmp_path / "apart", "--image", tree.series, "--separate")
    liver, spleen = (open_label(tmp_path / "apart" / f"{n}.nii.gz").array for n in CLASSES)
    assert (liver.astype(bool) & spleen.astype(bool)).any()
    first = open_label(tmp_path / "x.nii.gz").array
    assert np.array_equal(first == 2, spleen == 1) and np.array_equal(first == 1, (liver == 1) & (spleen == 0))


def test_a_label_that_lies_elsewhere_is_refused(tree: Tree, tmp_path: Path, capsys) -> None:
    label = open_label(tree.label)
    moved = label.grid.affine.copy()
    moved[0, 3] += 3.25
    write_label(tmp_path / "moved.nii.gz", Volume(label.array, Grid(label.grid.shape, moved)))
    message = refused(capsys, tmp_path / "moved.nii.gz", tmp_path / "x.seg.dcm", "--image", tree.series)
    assert "E_GRID" in message and "3.25" in message and not (tmp_path / "x.seg.dcm").exists()


def test_names_come_from_the_folder_or_are_made_up(tree: Tree, tmp_path: Path, capsys) -> None:
    values = np.array([0, 7, 3], dtype=np.uint8)[open_label(tree.label).array]
    write_label(tmp_path / "l.nii.gz", Volume(values, open_label(tree.label).grid))
    convert(tmp_path / "l.nii.gz", tmp_path / "x.seg.dcm", "--image", tree.series)
    assert [s.name for s in read_annotation(tmp_path / "x.seg.dcm").structures] == ["structure_3", "structure_7"]
    (tmp_path / "predictions.json").write_text(json.dumps({"labels": {"spleen": 3}}))
    message = refused(capsys, tmp_path / "l.nii.gz", tmp_path / "y.seg.dcm", "--image", tree.series)
    assert "ids [7]" in message
    convert(tmp_path / "l.nii.gz", tmp_path / "y.seg.dcm", "--image", tree.series, "--labels", "{a: 7, b: 3}")
    assert [s.name for s in read_annotation(tmp_path / "y.seg.dcm").structures] == ["a", "b"]
    (tmp_path / "l.json").write_text("[")
    assert "cannot be read" in refused(capsys, tmp_path / "l.nii.gz", tmp_path / "z.seg.dcm", "--image", tree.series)


def test_annotations_of_other_images_are_refused(tree: Tree, tmp_path: Path, capsys) -> None:
    grid = read_grid(tree.series)
    write_dicom_series(tmp_path / "other", picture_of(grid, 5), uid_seed="somebody else", patient_id="X")
    for drawn in (tree.seg, tree.rtstruct):
        message = refused(capsys, drawn, tmp_path / "x.nii.gz", "--image", tmp_path / "other")
        assert "E_REFERENCE" in message and "other images" in message
    write_dicom_series(tmp_path / "finer", picture_of(oblique((22, 18, 8), seed=3), 5), uid_seed="a")  # its frame
    assert "E_GRID" in refused(capsys, tree.seg, tmp_path / "x.nii.gz", "--image", tmp_path / "finer")


def test_a_source_is_never_replaced(tree: Tree, whole_tree: Path, capsys) -> None:
    victim = sorted((whole_tree / "a" / "ct").iterdir())[0]
    before = victim.read_bytes()
    arguments = (tree.label, victim, "--image", victim.parent, "--labels", "{liver: 1, spleen: 2}")
    message = refused(capsys, *arguments, "--format", "dicom-seg", "--overwrite")
    assert "E_OUTPUT" in message and "made from" in message
    assert victim.read_bytes() == before


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_another_frame_of_reference_is_refused(kind: str, tree: Tree, tmp_path: Path, capsys) -> None:
    """Even of the right series: somebody registered or moved it since, and the grid fits all the same."""
    drawn = tmp_path / f"moved.{kind}.dcm"
    dataset = pydicom.dcmread(tree.seg if kind == "seg" else tree.rtstruct)
    frame = dataset.FrameOfReferenceUID
    dataset.walk(lambda ds, element: setattr(element, "value", "1.2.3.4") if element.value == frame else None)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.5"
    dataset.save_as(drawn)
    assert read_annotation(drawn).frame_of_reference == "1.2.3.4"
    message = refused(capsys, drawn, tmp_path / "x.nii.gz", "--image", tree.series)
    assert "E_REFERENCE" in message and "another frame of reference" in message
    assert not (tmp_path / "x.nii.gz").exists()


def test_another_series_of_the_same_space_is_said(tree: Tree, tmp_path: Path, capsys) -> None:
    """A contour of the CT on the MR that was registered with it: allowed, but never in silence."""
    dataset = pydicom.dcmread(tree.rtstruct)
    uid = pydicom.dcmread(next(tree.series.iterdir())).SeriesInstanceUID
    dataset.walk(lambda ds, element: setattr(element, "value", "1.2.3.6") if element.value == uid else None)
    dataset.save_as(tmp_path / "other.dcm")
    convert(tmp_path / "other.dcm", tmp_path / "x.nii.gz", "--image", tree.series)
    assert "drawn on another series than CT_" in capsys.readouterr().out


def test_what_makes_no_sense_is_refused(tree: Tree, tmp_path: Path, capsys) -> None:
    out = tmp_path / "x.nii.gz"
    assert "E_MISSING" in refused(capsys, tmp_path / "nothing", out)
    assert "nothing to convert" in refused(capsys, tree.label, out)
    assert "--image" in refused(capsys, tree.label, tmp_path / "x.seg.dcm")
    assert "of which kind" in refused(capsys, tree.label, tmp_path / "x.dcm", "--image", tree.series)
    assert "does not fit" in refused(capsys, tree.label, out, "--image", tree.series, "--format", "dicom-seg")
    assert "did you mean" in refused(capsys, tree.label, out, "--format", "dicomseg")
    assert "is DICOM already" in refused(capsys, tree.series, tmp_path / "x.seg.dcm")
    assert "are not written" in refused(capsys, tree.series, tmp_path / "x.nrrd")
    assert "--labels means nothing" in refused(capsys, tree.series, out, "--labels", "{a: liver}")
    assert "--image means nothing" in refused(capsys, tree.root, tmp_path / "folder", "--image", tree.series)
    assert "E_OUTPUT" in refused(capsys, tree.seg, tmp_path / "folder")
    assert "E_OUTPUT" in refused(capsys, tree.seg, out, "--separate")
    (tmp_path / "empty").mkdir()
    assert "E_NO_CASES" in refused(capsys, tmp_path / "empty", tmp_path / "folder")
    (tmp_path / "notes.txt").write_text("hello")
    assert "E_UNSUPPORTED" in refused(capsys, tmp_path / "notes.txt", tmp_path / "x.seg.dcm", "--image", tree.series)
    (tmp_path / "file").write_text("")
    assert "E_OUTPUT" in refused(capsys, tree.series, tmp_path / "file" / "x.nii.gz")
    shutil.copy(tree.label, tmp_path / "l.nii.gz")
    before = tree.seg.read_bytes()
    message = refused(capsys, tree.label, tree.seg, "--image", tree.series, "--overwrite", "--format", "rtstruct")
    assert "does not fit" in message and tree.seg.read_bytes() == before
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"empty", "notes.txt", "file", "l.nii.gz"}


def test_real_cases_become_their_nifti_files(real_data: Path, tmp_path: Path) -> None:
    cases = real_data / "dicom" / "series" / "dicom2nifti_cases"
    for case in ("generic/compressed_rle", "generic/compressed_j2k", "philips_enhanced/anatomical", "generic/rgb"):
        out = tmp_path / f"{case.replace('/', '_')}.nii.gz"
        convert(cases / case / "001", out)
        expected = open_volume(cases / case / "001_ground_truth.nii.gz") if "rgb" not in case else None
        written = nib.load(out)
        assert written.ndim == (4 if "rgb" in case else 3)
        if expected is not None:
            found = open_volume(out).reoriented(expected.grid.orientation)
            assert expected.grid.difference(found.grid) is None and np.allclose(found.array, expected.array, rtol=1e-6)


def test_real_structures_become_their_masks(real_data: Path, tmp_path: Path) -> None:
    sts = real_data / "dicom" / "rtstruct" / "sts"
    (drawn,) = (sts / "dicom" / "STS_002" / "CT" / "mask").iterdir()
    convert(drawn, tmp_path / "mask.nii.gz")
    found = open_label(tmp_path / "mask.nii.gz")
    expected = open_label(sts / "nifti" / "STS_002" / "CT_mask.nii.gz").reoriented(found.grid.orientation)
    assert found.grid.difference(expected.grid) is None
    a, b = found.array > 0, expected.array > 0
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) >= 0.97
