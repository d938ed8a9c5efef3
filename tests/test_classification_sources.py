"""Images to classify: DICOM files and whose they are, series beside each other, arrays, grey of colour."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import dicom_images
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import UID
from rich.console import Console

from medseg.classification.cases import find_classified, find_images
from medseg.classification.division import divide
from medseg.classification.images import ImageCase, open_image
from medseg.classification.preparation import facts_of, survey_images
from medseg.classification.scoring import evaluate_predictions
from medseg.classification.sight import plan_sight
from medseg.data.splits import SplitConfig
from medseg.errors import MedsegError
from medseg.formats import Reading

READING = Reading(channels=True)


def xray(path: Path, *, patient: str, series: str, number: int) -> None:
    """A DICOM image without a position."""

    def change(ds: Dataset, k: int) -> None:
        dicom_images.only(0)(ds, k)
        ds.PatientID = ds.PatientName = patient
        ds.Modality = "DX"
        del ds.ImagePositionPatient, ds.ImageOrientationPatient
        ds.PixelData = np.random.default_rng(number).integers(0, 4000, (4, 5)).astype(np.uint16).tobytes()

    (made,) = dicom_images.make(path.parent, change, uid=series, name=path.stem)
    made.rename(path)


def stack(folder: Path, *, patient: str, series: str, name: str = "s") -> None:
    """Slices that make a volume."""

    def change(ds: Dataset, k: int) -> None:
        ds.PatientID = ds.PatientName = patient

    dicom_images.make(folder, change, uid=series, name=name)


def test_dicom_images_of_one_patient_stay_on_one_side(tmp_path: Path) -> None:
    patient_of = {}
    for number in range(24):  # the images of a patient are no neighbours by name
        case, patient = f"i{number:02d}", f"Smith^{number % 8}"
        xray(tmp_path / "ab"[number % 2] / f"{case}.dcm", patient=patient, series=f"1.2.{number}", number=number)
        patient_of[case] = patient
    cases = find_classified(tmp_path).cases
    assert {case.patient for case in cases} == {f"p{n:03}" for n in range(1, 9)}
    facts, bad = survey_images(cases, READING, threads=1)
    assert not bad
    for fold in range(4):
        split, _ = divide(cases, SplitConfig(num_folds=4), 0, fold, facts)
        assert split.val and "by patient (8 patients" in split.rule and "Smith" not in split.rule
        assert not {patient_of[i] for i in split.train} & {patient_of[i] for i in split.val}
    aside = [replace(case, split="test") if case.case_id == "i00" else case for case in cases]
    with pytest.raises(MedsegError, match="E_LEAK"):  # others of this patient train
        divide(aside, SplitConfig(num_folds=4), 0, 0, facts)
    alike = [replace(case, patient="p001") for case in cases]
    with pytest.raises(MedsegError, match=r"(?s)all images are of one patient.*by=block"):
        divide(alike, SplitConfig(num_folds=4), 0, 0, facts)
    assert divide(alike, SplitConfig(num_folds=4, by="block"), 0, 0, facts)[0].val


def test_a_table_s_patients_come_before_those_of_dicom(tmp_path: Path) -> None:
    for number, patient in enumerate("XXYYZ"):
        xray(tmp_path / f"i{number}.dcm", patient=patient, series=f"1.2.{number}", number=number)
    stack(tmp_path / "scan", patient="Z", series="1.3")
    rows = [["image", "class", "patient"], ["i0.dcm", "a", "p001"], ["i1.dcm", "b", ""], ["i2.dcm", "a", ""]]
    rows += [["i3.dcm", "b", ""], ["i4.dcm", "a", ""], ["scan", "b", ""]]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    found = [case.patient for case in find_classified(tmp_path / "list.csv").cases]
    assert found == ["p001", "p001", "p002", "p002", "p003", "p003"]


def test_folders_of_xrays_and_of_several_series(tmp_path: Path) -> None:
    for number in range(4):  # the first two share a series, as two views of one examination do
        xray(tmp_path / "a" / "2020" / f"x{number}.dcm", patient="P", series=f"1.{max(number, 1)}", number=number)
        xray(tmp_path / "b" / "2021" / f"y{number}.dcm", patient="Q", series=f"1.9{number}", number=number)
    found = find_classified(tmp_path)
    assert [case.case_id for case in found.cases] == [*(f"x{n}" for n in range(4)), *(f"y{n}" for n in range(4))]
    flat = find_images([tmp_path / "a" / "2020"]).cases
    assert [case.case_id for case in flat] == ["x0", "x1", "x2", "x3"]
    assert all(open_image(case, READING).grid.is_picture for case in flat)
    stack(tmp_path / "c" / "scan", patient="R", series="1.5", name="u")
    assert [(c.case_id, c.source) for c in find_images([tmp_path / "c"]).cases] == [("scan", tmp_path / "c" / "scan")]
    assert [c.case_id for c in find_images([tmp_path / "c" / "scan"]).cases] == ["scan"]
    stack(tmp_path / "c" / "scan", patient="R", series="1.6", name="v")
    two = find_images([tmp_path / "c"]).cases
    assert len(two) == 2 and all(case.case_id.startswith("CT_") for case in two)
    assert [open_image(case, READING).array.shape for case in two] == [(1, 5, 4, 6)] * 2
    (tmp_path / "c" / "scan" / "w.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"damaged")
    assert {case.case_id for case in find_images([tmp_path / "c"]).cases} == {"w", *(case.case_id for case in two)}


def test_other_dicom_objects_are_no_images(tmp_path: Path) -> None:
    for number in range(2):
        xray(tmp_path / f"x{number}.dcm", patient="P", series=f"1.{number}", number=number)
    report = pydicom.dcmread(tmp_path / "x0.dcm")
    del report.PixelData, report.Rows, report.Columns
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.88.11")
    report.save_as(tmp_path / "sr.dcm")
    assert [case.case_id for case in find_images([tmp_path]).cases] == ["x0", "x1"]


def test_arrays_are_predicted_without_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (12, 8, 6), dtype=np.uint8)
    for labels in ({}, {"test_labels": np.zeros(12, int)}, {"test_labels": np.zeros((12, 14), int)}):
        np.savez(tmp_path / f"{len(labels)}.npz", test_images=images, **labels)
        cases = find_images([tmp_path / f"{len(labels)}.npz"]).cases
        assert [case.case_id for case in cases] == [f"test_{n:02}" for n in range(12)]
        assert all(case.class_name is None and case.split is None for case in cases)
    with pytest.raises(MedsegError, match="do not fit each other"):
        find_classified(tmp_path / "0.npz")


def test_references_of_one_class_are_scored(tmp_path: Path) -> None:
    rows = ["case,class,probability_0,probability_1", *(f"test_{n},1,0.{n + 1},0.{9 - n}" for n in range(4))]
    (tmp_path / "predictions.csv").write_text("\n".join(rows) + "\n")
    np.savez(tmp_path / "one.npz", test_images=np.zeros((4, 8, 6), np.uint8), test_labels=np.ones(4, int))
    for number in range(4):
        path = tmp_path / "folders" / "1" / f"test_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 6), np.uint8)).save(path)
    for references in (tmp_path / "one.npz", tmp_path / "folders"):
        scores = evaluate_predictions(tmp_path / "predictions.csv", references, Console(quiet=True))
        assert scores.truth.tolist() == [1] * 4 and scores.summary["accuracy"].value == 1
        with pytest.raises(MedsegError, match="no number of classes|no class folders"):
            find_classified(references)


def test_a_last_axis_of_one_is_a_channel(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (4, 8, 6, 1), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=np.arange(4) % 2)
    image = open_image(find_classified(tmp_path / "set.npz").cases[2], READING)
    assert image.grid.is_picture and np.array_equal(image.array, images[2].transpose(2, 0, 1))


def test_intensities_of_colour_seen_in_grey_are_those_of_the_grey(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 100, (20, 20, 3), dtype=np.uint8)
    colours[..., 1] += 120  # red alone would tell another mean
    Image.fromarray(colours).save(tmp_path / "a.png")
    facts = [facts_of(ImageCase("a", tmp_path / "a.png"), READING)]
    sight = plan_sight(
        facts, size=(20, 20), spacing_mm=None, channels="grey", normalisation="dataset", smallest={},
        expects_imagenet=False,
    )  # fmt: skip
    seen = sight.prepare(open_image(ImageCase("a", tmp_path / "a.png"), READING), where="a")
    assert seen.shape == (1, 20, 20) and seen.mean() == pytest.approx(0, abs=0.02)
    assert seen.std() == pytest.approx(1, abs=0.02)
