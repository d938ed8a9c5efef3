"""`medseg predict --format`: NIfTI, DICOM SEG and RTSTRUCT of one prediction, and what the table says of each case."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medseg import __version__
from medseg.bundle import BundleInfo
from medseg.cli import main
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, open_label, read_grid, write_image
from medseg.formats.dicom.annotations import masks, read_annotation
from medseg.formats.dicom.export import Form, forms_of
from medseg.inference.export import Export
from medseg.inference.manifest import MANIFEST_FILE
from medseg.labels import TABLE_FILE
from medseg.phantom import write_dicom_series
from medseg.volume import Grid, Volume

ALL = "nifti,dicom-seg,rtstruct"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a prediction that must be refused; its message."""
    with pytest.raises(SystemExit) as exit_:
        predict(*arguments)
    assert exit_.value.code == 2
    message: str = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def predict(*arguments: object) -> None:
    main(["predict", *(str(a) for a in arguments)])


def files_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def indices_of(path: Path, grid: Grid) -> np.ndarray:
    """Class indices out of an annotation file."""
    found = np.zeros(grid.shape, dtype=np.uint8)
    for number, mask in masks(read_annotation(path), grid):
        assert not found[mask].any()
        found[mask] = number
    return found


def test_three_files_of_one_prediction_agree(tiny_run, tmp_path: Path, capsys) -> None:
    out, case = tmp_path / "out", tiny_run.dicom.name
    predict(tiny_run.run, tiny_run.dicom, "-o", out, "--format", "rtstruct, NIfTI,dicom-seg,nifti")
    shown = capsys.readouterr().out
    names = [f"{case}.nii.gz", f"{case}.seg.dcm", f"{case}.rtstruct.dcm"]
    assert files_in(out) == {*names, TABLE_FILE, MANIFEST_FILE}
    assert shown.count("carry the name and the identifiers") == 1 and all(name in shown for name in names)
    table = json.loads((out / TABLE_FILE).read_text())
    assert table["cases"] == {case: {"files": names, "notes": []}}

    label = open_label(out / names[0])
    assert set(np.unique(label.array)) > {0}, "an empty prediction tells nothing"
    grid = read_grid(tiny_run.dicom)
    written = {name: index for index, name in enumerate(table["labels"])}
    for name in names[1:]:
        annotation = read_annotation(out / name)
        assert {s.name: s.number for s in annotation.structures} == {k: v for k, v in written.items() if v}
        assert np.array_equal(indices_of(out / name, grid), label.reoriented(grid.orientation).array)
        source, drawn = pydicom.dcmread(next(tiny_run.dicom.iterdir())), pydicom.dcmread(out / name)
        assert annotation.series == (source.SeriesInstanceUID,)
        assert drawn.PatientID == source.PatientID and drawn.StudyInstanceUID == source.StudyInstanceUID
    algorithm = pydicom.dcmread(out / names[1]).SegmentSequence[0]
    assert algorithm.SegmentAlgorithmName == "medseg unet" and algorithm.SegmentAlgorithmType == "AUTOMATIC"
    assert __version__ in str(algorithm)


def test_a_scan_of_another_modality_is_said(tiny_run, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run.run, run)
    bundle = json.loads((run / "bundle.json").read_text())
    (run / "bundle.json").write_text(json.dumps({**bundle, "modality": "MR"}))
    predict(run, tiny_run.dicom, "-o", tmp_path / "out")
    table = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert "the scan is CT, the model was trained on MR" in table["cases"][tiny_run.dicom.name]["notes"][0]
    assert "trained on MR" in capsys.readouterr().out


def test_a_nifti_scan_has_no_dicom_to_refer_to(tiny_run, tmp_path: Path, capsys) -> None:
    scan = next((tiny_run.data / "imagesTr").glob("*.nii.gz"))
    message = refused(capsys, tiny_run.run, scan, tiny_run.dicom, "-o", tmp_path / "out", "--format", "dicom-seg")
    assert "E_OUTPUT" in message and scan.name.removesuffix("_0000.nii.gz") in message
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_drawn_on_is_refused_before_any_work(tiny_run, tmp_path: Path, capsys) -> None:
    root, out = tmp_path / "export", tmp_path / "out"
    for name in ("a", "b"):
        image = Volume(np.zeros((1, 20, 18, 9), dtype=np.float32), Grid((20, 18, 9), np.diag([2.0, 2.0, 4.0, 1.0])))
        write_dicom_series(root / name, image, uid_seed=name, patient_id=name)
    for path in (root / "b").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.FrameOfReferenceUID = ""
        dataset.save_as(path)
    for form in ("dicom-seg", "rtstruct"):
        message = refused(capsys, tiny_run.run, root, "-o", out, "--format", form)
        assert "E_NO_GEOMETRY" in message and "where:    b\n" in message
    assert not out.exists()
    info = BundleInfo.read(tiny_run.run)
    pictures = replace(info, plan=replace(info.plan, orientation=""))
    with pytest.raises(MedsegError, match="E_OUTPUT"):
        Export(pictures, (Form.NIFTI, Form.RTSTRUCT), STRICT, "unet").check([])
    Export(pictures, (Form.NIFTI, Form.DICOM_SEG), STRICT, "unet").check([])


def test_every_file_of_a_case_is_kept_unless_told(tiny_run, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    out.mkdir()
    precious = out / f"{tiny_run.dicom.name}.rtstruct.dcm"
    precious.write_bytes(b"precious")
    message = refused(capsys, tiny_run.run, tiny_run.dicom, "-o", out, "--format", ALL)
    assert "exist already" in message and precious.name in message
    assert files_in(out) == {precious.name} and precious.read_bytes() == b"precious"
    predict(tiny_run.run, tiny_run.dicom, "-o", out, "--format", ALL, "--overwrite")
    assert read_annotation(precious).kind == "RTSTRUCT"


def test_a_case_is_written_whole_or_not_at_all(tiny_run, tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_: object, **__: object) -> None:
        raise MedsegError(Code.OUTPUT, "the file cannot be written", got="No space left on device")

    monkeypatch.setattr("medseg.formats.dicom.rtstruct_writer.write_rtstruct", full)
    out = tmp_path / "out"
    assert "No space" in refused(capsys, tiny_run.run, tiny_run.dicom, "-o", out, "--format", ALL)
    assert files_in(out) == {TABLE_FILE}


def test_unknown_formats(tmp_path: Path, capsys) -> None:
    assert "did you mean 'dicom-seg'" in refused(capsys, "run", "scan", "-o", tmp_path, "--format", "nifti,dicomseg")
    assert forms_of(" rtstruct,NIFTI,nifti") == (Form.NIFTI, Form.RTSTRUCT)
    for wrong in ("", "nifti,,rtstruct", "all"):
        with pytest.raises(MedsegError) as refusal:
            forms_of(wrong)
        assert refusal.value.code is Code.NAME


def test_an_irregular_series_is_mended_when_asked_and_recorded(tiny_run, tmp_path: Path, capsys) -> None:
    series = tmp_path / "gap"
    shutil.copytree(tiny_run.dicom, series)
    sorted(series.iterdir())[3].unlink()
    out = tmp_path / "out"
    assert "--resample-irregular" in refused(capsys, tiny_run.run, series, "-o", out)
    message = refused(capsys, tiny_run.run, series, "-o", out, "--resample-irregular", "--format", ALL)
    assert "E_OUTPUT" in message and "nifti,dicom-seg" in message and not (out / "gap.nii.gz").exists()
    predict(tiny_run.run, series, "-o", out, "--resample-irregular", "--format", "nifti,dicom-seg")
    record = json.loads((out / TABLE_FILE).read_text())["cases"]["gap"]
    assert record["files"] == ["gap.nii.gz", "gap.seg.dcm"] and record["notes"]
    assert record["notes"][0] in " ".join(capsys.readouterr().out.split())
    label = open_label(out / "gap.nii.gz")
    assert np.array_equal(indices_of(out / "gap.seg.dcm", label.grid), label.array)


def test_the_table_remembers_earlier_cases(tiny_run, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    scans = sorted((tiny_run.data / "imagesTr").glob("*.nii.gz"))[:2]
    for scan in scans:
        predict(tiny_run.run, scan, "-o", out)
    table = json.loads((out / TABLE_FILE).read_text())
    assert len(table["cases"]) == 2
    (out / TABLE_FILE).write_text(json.dumps({**table, "labels": {"other": 1}}))
    assert "another model" in refused(capsys, tiny_run.run, tiny_run.dicom, "-o", out)
    predict(tiny_run.run, tiny_run.dicom, "-o", out, "--overwrite")
    assert list(json.loads((out / TABLE_FILE).read_text())["cases"]) == [tiny_run.dicom.name]


def test_a_tree_and_a_zip_of_series(tiny_run, tmp_path: Path) -> None:
    root = tmp_path / "export"
    shutil.copytree(tiny_run.dicom, root / "a")
    image = Volume(np.zeros((1, 20, 18, 9), dtype=np.float32), Grid((20, 18, 9), np.diag([2.0, 2.0, 4.0, 1.0])))
    write_dicom_series(root / "b", image, uid_seed="b", patient_id="b")
    shutil.make_archive(str(tmp_path / "zipped"), "zip", root)
    predict(tiny_run.run, root, "-o", tmp_path / "tree", "--format", "nifti,dicom-seg")
    predict(tiny_run.run, tmp_path / "zipped.zip", "-o", tmp_path / "zip", "--format", "nifti,dicom-seg")
    for folder in ("tree", "zip"):
        assert len(list((tmp_path / folder).glob("*.seg.dcm"))) == 2
        assert len(list((tmp_path / folder).glob("*.nii.gz"))) == 2
    uid = str(pydicom.dcmread(root / "b" / "slice_0001.dcm").SeriesInstanceUID)
    predict(tiny_run.run, root, "-o", tmp_path / "one", "--series", uid)
    (label,) = (tmp_path / "one").glob("*.nii.gz")
    assert read_grid(label).shape == (20, 18, 9)


def test_slices_without_preamble_are_one_series(tiny_run, tmp_path: Path, capsys) -> None:
    """Named .dcm they look like single images, each a case of its own."""
    old, out = tmp_path / "old", tmp_path / "out"
    shutil.copytree(tiny_run.dicom, old)
    for path in old.iterdir():
        path.write_bytes(path.read_bytes()[132:])
    assert "E_OUTPUT" in refused(capsys, tiny_run.run, old, "-o", out, "--format", ALL)
    predict(tiny_run.run, old, "-o", out, "--format", ALL, "--without-preamble")
    names = {"old.nii.gz", "old.seg.dcm", "old.rtstruct.dcm"}
    assert files_in(out) == {*names, TABLE_FILE, MANIFEST_FILE}
    label = open_label(out / "old.nii.gz")
    grid = read_grid(tiny_run.dicom)
    for name in ("old.seg.dcm", "old.rtstruct.dcm"):
        assert np.array_equal(indices_of(out / name, grid), label.reoriented(grid.orientation).array)


def test_pictures_stay_png(tiny_run, tmp_path: Path, capsys) -> None:
    write_image(tmp_path / "p.png", Volume(np.zeros((1, 8, 9), np.float32), Grid.of_picture((8, 9))))
    assert "E_" in refused(capsys, tiny_run.run, tmp_path / "p.png", "-o", tmp_path / "out", "--format", "rtstruct")
