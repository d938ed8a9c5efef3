from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medseg.data.cases import Case, find_cases, find_inputs, load_image, load_label
from medseg.errors import Code, MedsegError
from medseg.formats import open_volume
from medseg.labels import Labels

AFFINE = np.array([[2.0, 0, 0, 10], [0, 3, 0, -20], [0, 0, 4, 30], [0, 0, 0, 1]])
SHAPE = (5, 4, 3)
BINARY = Labels.from_mapping({"background": 0, "object": 1})


def touch(root: Path, *names: str) -> None:
    """Empty files: discovery looks at names only."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def ramp(dtype: str = "float32") -> np.ndarray:
    return np.arange(np.prod(SHAPE), dtype=dtype).reshape(SHAPE)


def dicom_series(folder: Path, num_slices: int = 3) -> Path:
    folder.mkdir(parents=True)
    series, frame, study = generate_uid(), generate_uid(), generate_uid()
    for k in range(num_slices):
        item = pydicom.Dataset()
        item.file_meta = pydicom.dataset.FileMetaDataset()
        item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        item.file_meta.MediaStorageSOPClassUID = item.SOPClassUID = CTImageStorage
        item.file_meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID = generate_uid()
        item.StudyInstanceUID, item.SeriesInstanceUID, item.FrameOfReferenceUID = study, series, frame
        item.Modality, item.InstanceNumber = "CT", k + 1
        item.Rows, item.Columns, item.PixelSpacing, item.SliceThickness = 4, 5, [2, 3], 4
        item.ImagePositionPatient, item.ImageOrientationPatient = [0, 0, 4 * k], [1, 0, 0, 0, 1, 0]
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 0
        item.PixelData = np.full((4, 5), k, dtype="<u2").tobytes()
        item.save_as(folder / f"{k}.dcm", enforce_file_format=True)
    return folder


def refused(code: Code, call: Callable[[], object]) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


def ids(root: Path, **options: bool) -> list[str]:
    return [case.case_id for case in find_cases(root, **options).cases]


# layouts


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images", "labels"), ("image", "label"), ("img", "masks"), ("imagesTr", "labelsTr"), ("Imgs", "Annotations")],
)
def test_paired_folders(tmp_path: Path, images: str, labels: str) -> None:
    touch(tmp_path, f"{images}/b.png", f"{images}/a.png", f"{labels}/a.png", f"{labels}/b.png", f"{labels}/.hidden.png")
    folder = find_cases(tmp_path)
    assert [(c.case_id, c.images, c.label) for c in folder.cases] == [
        (name, (tmp_path / images / f"{name}.png",), tmp_path / labels / f"{name}.png") for name in "ab"
    ]


@pytest.mark.parametrize("suffix", ["", "_seg", "_mask", "_label", "-seg"])
def test_label_names_and_types_may_differ_from_the_images(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "images/a.jpg", "images/b.png", f"labels/a{suffix}.png", f"labels/b{suffix}.tif")
    assert [c.label.name for c in find_cases(tmp_path).cases if c.label] == [f"a{suffix}.png", f"b{suffix}.tif"]


def test_an_id_that_ends_like_a_label_stays_whole(tmp_path: Path) -> None:
    touch(tmp_path, "images/a_mask.png", "images/a.png", "labels/a_mask.png", "labels/a.png")
    cases = find_cases(tmp_path).cases
    assert [(c.case_id, c.label.name) for c in cases if c.label] == [("a", "a.png"), ("a_mask", "a_mask.png")]


def test_nnunet_v2(tmp_path: Path) -> None:
    touch(tmp_path, *(f"imagesTr/{c}_{k:04d}.nii.gz" for c in ("x_1", "x_2") for k in (1, 0)))
    touch(tmp_path, "labelsTr/x_1.nii.gz", "labelsTr/x_2.nii.gz", "imagesTs/x_9_0000.nii.gz")
    description = {
        "channel_names": {"1": "T2", "0": "T1"},
        "labels": {"background": 0, "tumour": 1},
        "file_ending": ".nii.gz",
        "numTraining": 2,
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    folder = find_cases(tmp_path)
    assert [c.case_id for c in folder.cases] == ["x_1", "x_2"]
    assert [p.name for p in folder.cases[0].images] == ["x_1_0000.nii.gz", "x_1_0001.nii.gz"]
    assert folder.channels == ("T1", "T2")
    assert folder.labels == {"background": 0, "tumour": 1}
    assert "v2" in folder.layout
    assert find_cases(tmp_path / "dataset.json") == folder


def test_decathlon(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{f}/h_{n}.nii.gz" for f in ("imagesTr", "labelsTr") for n in ("001", "002")))
    description = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": [{"image": f"./imagesTr/h_{n}.nii.gz", "label": "-"} for n in ("001", "002")],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    folder = find_cases(tmp_path)
    assert [c.case_id for c in folder.cases] == ["h_001", "h_002"]
    assert folder.labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert folder.channels == ("MRI",)
    description["training"] = [{"image": "./imagesTr/h_007.nii.gz", "label": "-"}]
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    assert refused(Code.MISSING, lambda: find_cases(tmp_path)).where == "h_007"


def test_dataset_json_with_files_elsewhere(tmp_path: Path) -> None:
    touch(tmp_path, "there/a.png", "there/a_l.png")
    table = {
        "channel_names": {"0": "grey"},
        "labels": {"background": 0, "x": 1},
        "file_ending": ".png",
        "dataset": {"A": {"images": ["there/a.png"], "label": "there/a_l.png"}},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    assert find_cases(tmp_path).cases == (Case("A", (tmp_path / "there/a.png",), tmp_path / "there/a_l.png"),)
    (tmp_path / "dataset.json").write_text(json.dumps({**table, "file_ending": ".b2nd"}))
    assert refused(Code.UNSUPPORTED, lambda: find_cases(tmp_path)).got == ".b2nd"


def test_four_digits_are_a_channel_only_where_the_label_lacks_them(tmp_path: Path) -> None:
    touch(tmp_path / "own", "images/s_0001.png", "images/s_0002.png", "labels/s_0001.png", "labels/s_0002.png")
    assert ids(tmp_path / "own") == ["s_0001", "s_0002"]
    touch(tmp_path / "channel", "images/s_0001.png", "images/s_0002.png", "labels/s.png")
    (case,) = find_cases(tmp_path / "channel").cases
    assert (case.case_id, len(case.images)) == ("s", 2)
    touch(tmp_path / "three", "images/s_001.png", "images/s_002.png", "labels/s_001.png", "labels/s_002.png")
    assert ids(tmp_path / "three") == ["s_001", "s_002"]


def test_four_digits_belong_to_the_id_where_both_labels_are_there(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{folder}/{name}.png" for folder in ("images", "labels") for name in ("s", "s_0001")))
    assert [(c.case_id, len(c.images)) for c in find_cases(tmp_path).cases] == [("s", 1), ("s_0001", 1)]


def test_one_folder_per_case(tmp_path: Path) -> None:
    for name in ("p1", "p2"):
        touch(tmp_path, *(f"{name}/{name}_{part}.nii.gz" for part in ("t1", "flair", "seg")), f"{name}/notes.txt")
    touch(tmp_path, "logs/log.txt")
    folder = find_cases(tmp_path)
    assert [c.case_id for c in folder.cases] == ["p1", "p2"]
    assert [p.name for p in folder.cases[0].images] == ["p1_flair.nii.gz", "p1_t1.nii.gz"]
    assert folder.cases[0].label == tmp_path / "p1/p1_seg.nii.gz"
    assert folder.channels == ("flair", "t1")


def test_folders_of_channels_beside_a_folder_of_labels(tmp_path: Path) -> None:
    touch(tmp_path, "images/p1/t1.nii", "images/p1/t2.nii", "labels/p1.nii")
    folder = find_cases(tmp_path)
    assert [p.name for p in folder.cases[0].images] == ["t1.nii", "t2.nii"]
    assert folder.channels == ("t1", "t2")


def test_labels_beside_images(tmp_path: Path) -> None:
    touch(tmp_path, "img01.png", "img01_mask.png", "img02.png", "img02_mask.png")
    assert [(c.case_id, c.label and c.label.name) for c in find_cases(tmp_path).cases] == [
        ("img01", "img01_mask.png"),
        ("img02", "img02_mask.png"),
    ]


def test_drive_takes_the_vessels_not_the_field_of_view(tmp_path: Path) -> None:
    for n in ("21", "22"):
        touch(tmp_path, f"images/{n}_training.tif", f"1st_manual/{n}_manual1.gif", f"mask/{n}_training_mask.gif")
    assert [(c.case_id, c.label and c.label.name) for c in find_cases(tmp_path).cases] == [
        ("21", "21_manual1.gif"),
        ("22", "22_manual1.gif"),
    ]


def test_two_folders_that_could_be_labels_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "labels/a.png", "masks/a.png")
    assert "labels, masks" in str(refused(Code.NO_CASES, lambda: find_cases(tmp_path)).got)


def test_dicom_series_are_images(tmp_path: Path) -> None:
    series = dicom_series(tmp_path / "images" / "p1")
    touch(tmp_path, "labels/p1.nii.gz")
    assert find_cases(tmp_path).cases == (Case("p1", (series,), tmp_path / "labels/p1.nii.gz"),)


def test_dicom_slices_with_a_label_among_them(tmp_path: Path) -> None:
    series = dicom_series(tmp_path / "p1")
    touch(tmp_path, "p1/seg.nii.gz")
    assert find_cases(tmp_path).cases == (Case("p1", (series,), series / "seg.nii.gz"),)


def test_images_alone_need_leave(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "images/b.png")
    refused(Code.NO_CASES, lambda: find_cases(tmp_path))
    assert ids(tmp_path, require_labels=False) == ["a", "b"]
    touch(tmp_path, "labels/b.png")
    assert [c.label is None for c in find_cases(tmp_path, require_labels=False).cases] == [True, False]


# refusals


def test_nothing_found_says_what_lies_there_and_where_to_look(tmp_path: Path) -> None:
    touch(tmp_path, "readme.txt", "training/images/a.png", "training/labels/a.png")
    error = refused(Code.NO_CASES, lambda: find_cases(tmp_path))
    assert "readme.txt, training/" in str(error.got)
    assert "dataset.json" in str(error.expected)
    assert "folder training" in str(error.remedy)
    refused(Code.MISSING, lambda: find_cases(tmp_path / "absent"))
    refused(Code.NO_CASES, lambda: find_cases(tmp_path / "readme.txt"))


def test_an_image_without_label_and_a_label_without_image(tmp_path: Path) -> None:
    touch(tmp_path, *(f"images/c{n:02d}.png" for n in range(13)), "labels/c00.png")
    error = refused(Code.MISSING, lambda: find_cases(tmp_path))
    assert "12 of 13 images" in error.message
    assert "c01, c02" in str(error.where)
    assert "c10 and 2 more" in str(error.where)
    touch(tmp_path, "labels/c1.png")
    assert "'c1'" in str(refused(Code.MISSING, lambda: find_cases(tmp_path)).got)
    touch(tmp_path / "extra", "images/a.png", "labels/a.png", "labels/b.png")
    error = refused(Code.MISSING, lambda: find_cases(tmp_path / "extra"))
    assert ("label" in error.message, error.where) == (True, "b")
    refused(Code.MISSING, lambda: find_cases(tmp_path / "extra", require_labels=False))


@pytest.mark.parametrize(
    "files",
    [
        ("images/a.png", "images/a.tif", "labels/a.png"),
        ("images/a.png", "labels/a.png", "labels/a_mask.png"),
        ("images/a.png", "images/A.png", "labels/a.png", "labels/A.png"),
        ("p/a.nii", "p/a_seg.nii", "p/b_seg.nii"),
    ],
    ids=["two images", "two labels", "upper case", "two labels in a case's folder"],
)
def test_duplicate_ids(tmp_path: Path, files: tuple[str, ...]) -> None:
    touch(tmp_path, *files)
    refused(Code.DUPLICATE_ID, lambda: find_cases(tmp_path))


def test_cases_with_other_channels(tmp_path: Path) -> None:
    for name in "abc":
        touch(tmp_path, f"images/{name}_0000.nii", f"images/{name}_0001.nii", f"labels/{name}.nii")
    (tmp_path / "images/b_0001.nii").rename(tmp_path / "images/b_0002.nii")
    error = refused(Code.CHANNELS, lambda: find_cases(tmp_path))
    assert error.where == "b"
    assert "0002" in str(error.got)
    (tmp_path / "images/b_0002.nii").unlink()
    assert refused(Code.CHANNELS, lambda: find_cases(tmp_path)).where == "b"


# manifests


def test_csv_manifest(tmp_path: Path) -> None:
    touch(tmp_path, "i/1.png", "i/2.png", "l/1.png", "l/2.png")
    (tmp_path / "cases.csv").write_text(
        "case,Image,label,patient,split,age\nz,i/1.png,l/1.png,P1,training,50\ny,i/2.png,l/2.png,P2,Val,60\n"
    )
    folder = find_cases(tmp_path / "cases.csv")
    assert folder.cases == (
        Case("y", (tmp_path / "i/2.png",), tmp_path / "l/2.png", "P2", "val"),
        Case("z", (tmp_path / "i/1.png",), tmp_path / "l/1.png", "P1", "train"),
    )
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "cases.csv").rename(tmp_path / "elsewhere" / "cases.csv")
    assert find_cases(tmp_path, manifest=moved).cases == folder.cases
    moved.rename(tmp_path / "manifest.csv")
    assert find_cases(tmp_path).cases == folder.cases


def test_csv_manifest_of_channels_with_semicolons(tmp_path: Path) -> None:
    touch(tmp_path, "a, b;c.png", "t2.png", "l.png")
    (tmp_path / "m.csv").write_text(
        'id;image_t1;image_t2;label\r\nx;"a, b;c.png";t2.png;l.png\r\n', encoding="utf-8-sig"
    )
    folder = find_cases(tmp_path / "m.csv")
    assert folder.cases == (Case("x", (tmp_path / "a, b;c.png", tmp_path / "t2.png"), tmp_path / "l.png"),)
    assert folder.channels == ("t1", "t2")


def test_json_manifest(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png", "l.png")
    rows = [{"images": ["1.png", "2.png"], "label": "l.png", "patient": 7}]
    table = {"cases": rows, "labels": {"background": 0, "x": [1, 2]}, "channels": ["p", "q"]}
    (tmp_path / "m.json").write_text(json.dumps(table))
    folder = find_cases(tmp_path / "m.json")
    assert folder.cases == (Case("1", (tmp_path / "1.png", tmp_path / "2.png"), tmp_path / "l.png", "7"),)
    assert (folder.labels, folder.channels) == ({"background": 0, "x": [1, 2]}, ("p", "q"))
    (tmp_path / "m.json").write_text(json.dumps(rows))
    assert find_cases(tmp_path / "m.json").cases == folder.cases


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("case,image,label,patiend\na,1.png,l.png,P\n", Code.CONFIG, "patient"),
        ("case,label\na,l.png\n", Code.CONFIG, "no column of images"),
        ("case,image,label,split\na,1.png,l.png,dev\n", Code.CONFIG, "dev"),
        ("case,image,label\na,1.png\n", Code.CONFIG, "lines 2"),
        ("case,image,label\na,,l.png\n", Code.CONFIG, "without an image"),
        ("case,image,label\na,9.png,l.png\n", Code.MISSING, "a: 9.png"),
        ("case,image,label\na,1.png,\n", Code.MISSING, "no label"),
        ("case,image,label\na,1.png,l.png\nA,1.png,l.png\n", Code.DUPLICATE_ID, "a, A"),
        ("case,image,label\n", Code.CONFIG, "no column of images"),
    ],
)
def test_bad_manifests(tmp_path: Path, text: str, code: Code, says: str) -> None:
    touch(tmp_path, "1.png", "l.png")
    (tmp_path / "m.csv").write_text(text)
    assert says in str(refused(code, lambda: find_cases(tmp_path / "m.csv")))


def test_manifest_whose_cases_have_other_channels(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "2.png", "l.png")
    rows = [{"case": name, "images": ["1.png", "2.png"], "label": "l.png"} for name in "abc"]
    rows[1]["images"] = ["1.png"]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    error = refused(Code.CHANNELS, lambda: find_cases(tmp_path / "m.json"))
    assert (error.where, error.expected, error.got) == ("b", "2 files", "b: 1")


def test_manifest_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("[{]")
    refused(Code.CONFIG, lambda: find_cases(tmp_path / "m.json"))
    (tmp_path / "m.json").write_text("3")
    refused(Code.CONFIG, lambda: find_cases(tmp_path / "m.json"))


# inputs of prediction


def test_inputs_as_files_folders_and_series(tmp_path: Path) -> None:
    touch(tmp_path, "one.nii.gz", "many/a.png", "many/b.png", "data/images/c.nii", "data/labels/c.nii")
    series = dicom_series(tmp_path / "CT head")
    cases = find_inputs([tmp_path / "one.nii.gz", tmp_path / "many", tmp_path / "data", series])
    assert [c.case_id for c in cases] == ["CT head", "a", "b", "c", "one"]
    assert all(c.label is None for c in cases)
    assert cases[0].images == (series,)
    assert cases[3].images == (tmp_path / "data/images/c.nii",)
    assert [c.case_id for c in find_inputs([series / "0.dcm"])] == ["0"]


def test_inputs_in_a_folder_of_series_and_of_case_folders(tmp_path: Path) -> None:
    touch(tmp_path, "p1/t1.nii", "p1/t2.nii", "p1/seg.nii", "x.png", "x_mask.png")
    dicom_series(tmp_path / "p2")
    assert [(c.case_id, [p.name for p in c.images]) for c in find_inputs([tmp_path])] == [
        ("p1", ["t1.nii", "t2.nii"]),
        ("p2", ["p2"]),
        ("x", ["x.png"]),
    ]


def test_inputs_with_channel_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii", "a_0001.nii", "b_0000.nii", "b_0001.nii")
    assert [(c.case_id, len(c.images)) for c in find_inputs([tmp_path], num_channels=2)] == [("a", 2), ("b", 2)]
    assert [(c.case_id, len(c.images)) for c in find_inputs([tmp_path])] == [("a", 2), ("b", 2)]
    assert find_inputs(sorted(tmp_path.iterdir()), num_channels=2) == find_inputs([tmp_path], num_channels=2)
    # a model of one channel: these are four scans with numbers
    assert [c.case_id for c in find_inputs([tmp_path], num_channels=1)] == ["a_0000", "a_0001", "b_0000", "b_0001"]
    (tmp_path / "b_0001.nii").unlink()
    assert [c.case_id for c in find_inputs([tmp_path], num_channels=2)] == ["a_0000", "a_0001", "b_0000"]


def test_inputs_that_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.png", "y/a.png", "x/notes.txt", "x/a.tif", "empty/notes.txt")
    refused(Code.MISSING, lambda: find_inputs([tmp_path / "z"]))
    refused(Code.UNSUPPORTED, lambda: find_inputs([tmp_path / "x/notes.txt"]))
    assert "x/a.png, y/a.png" in str(
        refused(Code.DUPLICATE_ID, lambda: find_inputs([tmp_path / "x/a.png", tmp_path / "y/a.png"])).got
    )
    refused(Code.DUPLICATE_ID, lambda: find_inputs([tmp_path / "x/a.png", tmp_path / "x/a.tif"]))
    assert "notes.txt" in str(refused(Code.NO_CASES, lambda: find_inputs([tmp_path / "empty"])).got)


# arrays


def test_channels_of_several_modalities_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CT and PET as channels are not CT: each of them would be clipped and scaled as one."""
    case = Case("a", (nifti(tmp_path / "0.nii", ramp()), nifti(tmp_path / "1.nii", ramp())), None)
    for told, expected in ((("CT", "PT"), None), (("CT", "CT"), "CT"), ((None, None), None)):
        answers = iter(told)
        opened = lambda *a, answers=answers, **k: replace(open_volume(*a, **k), modality=next(answers))  # noqa: E731
        monkeypatch.setattr("medseg.data.cases.open_volume", opened)
        assert load_image(case, num_channels=2).modality == expected


def test_channels_are_stacked_in_order(tmp_path: Path) -> None:
    case = Case("a", (nifti(tmp_path / "0.nii", ramp()), nifti(tmp_path / "1.nii", ramp() + 100)), None)
    image = load_image(case, num_channels=2)
    assert image.array.dtype == np.float32
    assert image.array.flags.c_contiguous
    np.testing.assert_array_equal(image.array, np.stack([ramp(), ramp() + 100]))
    np.testing.assert_allclose(image.grid.affine, AFFINE)
    error = refused(Code.CHANNELS, lambda: load_image(case, num_channels=3))
    assert (error.where, error.expected) == ("a", 3)


def test_a_4d_file_holds_channels_only_where_they_are_declared(tmp_path: Path) -> None:
    case = Case("a", (nifti(tmp_path / "x.nii", np.stack([ramp(), ramp() + 9], axis=-1)),), None)
    np.testing.assert_array_equal(load_image(case, num_channels=2).array, np.stack([ramp(), ramp() + 9]))
    refused(Code.FOUR_D, lambda: load_image(case))
    refused(Code.FOUR_D, lambda: load_image(case, num_channels=1))


def test_channel_files_on_other_grids(tmp_path: Path) -> None:
    shifted = AFFINE.copy()
    shifted[1, 3] += 1.5
    case = Case("a", (nifti(tmp_path / "0.nii", ramp()), nifti(tmp_path / "1.nii", ramp(), shifted)), None)
    error = refused(Code.GRID, lambda: load_image(case))
    assert "1.nii" in error.message
    assert "1.5" in error.message
    assert error.where == "a"


def test_label_as_indices_on_the_image_grid(tmp_path: Path) -> None:
    values = (ramp("int16") % 2) * 255
    case = Case("a", (nifti(tmp_path / "i.nii", ramp()),), nifti(tmp_path / "l.nii", values))
    label = load_label(case, Labels.from_mapping({"background": 0, "x": 255}), load_image(case).grid)
    assert label.array.dtype == np.uint8
    np.testing.assert_array_equal(label.array, ramp("uint8") % 2)
    error = refused(Code.LABEL, lambda: load_label(case, BINARY, load_image(case).grid))
    assert (error.where, "255" in str(error.got)) == ("a", True)


def test_a_label_stored_in_other_axis_order_is_brought_back(tmp_path: Path) -> None:
    label = (ramp("uint8") == 7).astype(np.uint8)
    stored = nib.Nifti1Image(label, AFFINE).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("PIL"))
    )
    assert stored.shape != SHAPE
    nib.save(stored, tmp_path / "l.nii")
    case = Case("a", (nifti(tmp_path / "i.nii", ramp()),), tmp_path / "l.nii")
    image = load_image(case)
    found = load_label(case, BINARY, image.grid)
    np.testing.assert_array_equal(found.array, label)
    assert found.grid.difference(image.grid) is None


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    image = nifti(tmp_path / "i.nii", ramp())
    grid = load_image(Case("a", (image,), None)).grid
    refused(Code.MISSING, lambda: load_label(Case("a", (image,), None), BINARY, grid))
    small = Case("a", (image,), nifti(tmp_path / "s.nii", np.zeros((5, 4, 2), np.uint8)))
    error = refused(Code.GRID, lambda: load_label(small, BINARY, grid))
    assert str(SHAPE) in str(error.expected)
    assert "(5, 4, 2)" in str(error.got)
    shifted = AFFINE.copy()
    shifted[2, 3] -= 8
    away = Case("a", (image,), nifti(tmp_path / "m.nii", np.zeros(SHAPE, np.uint8), shifted))
    assert "origin shifted by (0, 0, -8) mm" in refused(Code.GRID, lambda: load_label(away, BINARY, grid)).message
    picture = tmp_path / "p.png"
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(picture)
    refused(Code.GRID, lambda: load_label(Case("a", (image,), picture), BINARY, grid))


def test_dicom_image_with_a_nifti_label(tmp_path: Path) -> None:
    series = dicom_series(tmp_path / "ct")
    image = load_image(Case("a", (series,), None), num_channels=1)
    assert sorted(set(image.array.ravel())) == [0, 1, 2]
    assert image.modality == "CT"
    label = image.array[0] == 2
    nifti(tmp_path / "l.nii", label.astype(np.uint8), image.grid.affine)
    found = load_label(Case("a", (series,), tmp_path / "l.nii"), BINARY, image.grid)
    np.testing.assert_array_equal(found.array, label)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "count", "first"),
    [("hippocampus", 191, "hippocampus_001"), ("isbi2012_em", 24, "00"), ("drive/training", 20, "21")],
)
def test_real_folders(real_data: Path, name: str, count: int, first: str) -> None:
    found = ids(real_data / "segmentation" / name)
    assert (len(found), found[0]) == (count, first)


def test_named_channels_are_taken_by_name_in_prediction(tmp_path: Path) -> None:
    for patient, files in {"pt0": ["flair", "t1"], "pt1": ["T1", "flair"]}.items():
        (tmp_path / patient).mkdir()
        for name in files:
            nifti(tmp_path / patient / f"{name}.nii.gz", np.zeros((4, 4, 4), np.float32), np.eye(4))
    for paths in ([tmp_path], [tmp_path / "pt0", tmp_path / "pt1"]):
        found = find_inputs(paths, channels=("flair", "t1"))
        assert [c.case_id for c in found] == ["pt0", "pt1"]
        assert [[p.name.lower() for p in c.images] for c in found] == [["flair.nii.gz", "t1.nii.gz"]] * 2
    (tmp_path / "pt1" / "T1.nii.gz").rename(tmp_path / "pt1" / "t2.nii.gz")
    with pytest.raises(MedsegError, match="E_CHANNELS"):
        find_inputs([tmp_path], channels=("flair", "t1"))
