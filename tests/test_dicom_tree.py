"""Trees of DICOM files with SEG and RTSTRUCT as data sets, and as inputs of prediction."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from dicom_phantom import CORD, GTV, OVER, SHAPE, box_mask, write_rtstruct, write_seg, write_series
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from medseg.bundle import BundleInfo
from medseg.cli import main
from medseg.config import compose
from medseg.data.cases import DataFolder, find_cases, find_inputs, load_image, load_label
from medseg.data.facts import Survey
from medseg.data.splits import SplitConfig, make_split
from medseg.data.structure_table import override
from medseg.data.summary import summary_lines
from medseg.data.survey import survey
from medseg.errors import Code, MedsegError
from medseg.formats import Reading, open_label
from medseg.training.beginning import begin, go_on

TABLE = {"tumour": ["gtv-1"], "cord": "Spinal Cord"}


def refused(code: Code, call: Callable[[], object]) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return caught.value


def main_succeeds(*arguments: object) -> None:
    try:
        main([str(a) for a in arguments])
    except SystemExit as ended:
        assert not ended.code


def look(folder: DataFolder, **options: Any) -> Survey:
    return survey(folder, num_threads=2, **options)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three patients: one with a SEG, two with an RTSTRUCT, one of them with a bare MR; deep and side by side."""
    root = tmp_path_factory.mktemp("tree") / "export"
    one = write_series(root / "A" / "study" / "ct", 1, [GTV, CORD])
    write_seg(root / "A" / "elsewhere" / "seg.dcm", one, {"GTV-1": GTV, "spinal cord ": CORD})
    two = write_series(root / "flat", 2, [GTV, CORD])
    for path in write_series(root / "other", 2, [], modality="MR"):
        path.rename(root / "flat" / f"mr_{path.name}")
    (root / "other").rmdir()
    write_rtstruct(
        root / "flat" / "RS.dcm", two, {"Spinal Cord": CORD, "GTV-1": GTV, "Body": ((1, 25), (1, 21), (0, 12))}
    )
    three = write_series(root / "C", 3, [GTV])
    write_rtstruct(root / "C" / "drawn" / "rs", three, {" gtv-1": GTV})
    (root / "notes.txt").write_text("no image")
    return root


def test_cases_are_the_annotated_series_under_pseudonyms(tree: Path) -> None:
    folder = find_cases(tree, labels=TABLE)
    assert len(folder.cases) == 3
    assert all(case.case_id.startswith("CT_") and case.patient.startswith("p_") for case in folder.cases)
    assert len({case.patient for case in folder.cases}) == 3
    assert folder.left_out == ("1 series without annotations: MR (1)",)
    assert not folder.problems


def test_voxels_are_those_that_were_drawn(tree: Path) -> None:
    folder = find_cases(tree, labels=TABLE)
    labels = folder.structures.labels
    assert labels.names == ("background", "tumour", "cord")
    expected = box_mask(GTV) * 1 + box_mask(CORD) * 2
    found = {}
    for case in folder.cases:
        image = load_image(case)
        assert image.modality == "CT"
        assert image.array.shape == (1, *SHAPE)
        found[case.case_id] = load_label(case, labels, image.grid).array
    with_cord = [array for array in found.values() if (array == 2).any()]
    assert len(with_cord) == 2
    for array in found.values():
        np.testing.assert_array_equal(array, expected if (array == 2).any() else box_mask(GTV))


def test_a_zip_is_the_same(tree: Path, tmp_path: Path) -> None:
    packed = Path(shutil.make_archive(str(tmp_path / "export"), "zip", tree))
    ids = [case.case_id for case in find_cases(tree, labels=TABLE).cases]
    assert [case.case_id for case in find_cases(packed, labels=TABLE).cases] == ids
    assert len(look(find_cases(packed, labels=TABLE)).cases) == 3


def test_the_survey_counts_cases_that_lack_a_structure(tree: Path) -> None:
    found = look(find_cases(tree, labels=TABLE))
    assert sorted(case.label_voxels[2] > 0 for case in found.cases) == [False, True, True]
    assert all(case.label_voxels[1] == box_mask(GTV).sum() for case in found.cases)
    assert found.modality == "CT"
    assert found.structures == {"tumour": ("gtv-1",), "cord": ("Spinal Cord",)}
    text = "\n".join(summary_lines(found))
    assert "in 2 of 3 cases, drawn as Spinal Cord" in text
    assert "left out   1 series without annotations: MR (1)" in text
    assert "labels     from data.labels" in text


def test_label_files_of_the_other_layouts_win(tmp_path: Path) -> None:
    for number in (1, 2):
        files = write_series(tmp_path / f"case{number}", number, [GTV])
        write_rtstruct(tmp_path / f"case{number}" / "other_seg.dcm", files, {"GTV": GTV})
        write_seg(tmp_path / f"case{number}" / "mask.dcm", files, {"GTV": GTV})
    assert find_cases(tmp_path).structures is not None  # annotations alone, though they are named as labels
    for number in (1, 2):
        label = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4))
        nib.save(label, tmp_path / f"case{number}" / "seg.nii.gz")
    folder = find_cases(tmp_path)
    assert folder.layout == "one folder per case"
    assert [case.label for case in folder.cases] == [tmp_path / f"case{n}" / "seg.nii.gz" for n in (1, 2)]


def test_folders_named_as_images_and_labels_hold_annotations_too(tmp_path: Path) -> None:
    files = write_series(tmp_path / "images" / "a", 1, [GTV])
    write_seg(tmp_path / "segmentations" / "a.dcm", files, {"GTV": GTV})
    (case,) = find_cases(tmp_path).cases
    assert case.case_id.startswith("CT_")


# modalities


def test_a_converted_tree_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    for number in (1, 2):
        files = write_series(tmp_path / "dicom" / str(number), number, [GTV, CORD])
        write_seg(tmp_path / "dicom" / f"{number}.dcm", files, {"GTV": GTV, "spinal cord": CORD})
    main_succeeds("convert", tmp_path / "dicom", tmp_path / "nifti")
    found = look(find_cases(tmp_path / "nifti"))
    assert found.labels.names == ("background", "GTV", "spinal cord")


@pytest.mark.parametrize("name", ["PT", "pet", " PET "])
def test_modalities_have_the_names_that_people_use(tmp_path: Path, name: str) -> None:
    files = write_series(tmp_path / "a", 1, [GTV])
    for file in files:
        slice_ = pydicom.dcmread(file)
        slice_.Modality = "PT"
        slice_.save_as(file)
    write_seg(tmp_path / "a" / "seg.dcm", files, {"GTV": GTV})
    assert len(find_cases(tmp_path, modality=name).cases) == 1


def test_folders_of_equal_names_are_told_apart(tmp_path: Path) -> None:
    for number in (7, 8):
        write_series(tmp_path / f"patient{number}" / "CT_series", number, [GTV])
    cases = find_inputs([tmp_path / "patient7" / "CT_series", tmp_path / "patient8" / "CT_series"])
    assert len({case.case_id for case in cases}) == 2
    assert all(re.fullmatch("CT_[0-9a-f]{6}", case.case_id) for case in cases)


def test_several_modalities_need_a_choice(tmp_path: Path) -> None:
    for number, modality in ((1, "CT"), (2, "CT"), (3, "MR")):
        files = write_series(tmp_path / str(number), number, [GTV], modality=modality)
        write_rtstruct(tmp_path / str(number) / "rs.dcm", files, {"GTV": GTV})
    assert "data.modality=CT" in str(refused(Code.MIXED, lambda: find_cases(tmp_path)).remedy)
    folder = find_cases(tmp_path, modality="ct")
    assert [case.case_id[:3] for case in folder.cases] == ["CT_", "CT_"]
    assert folder.left_out == ("1 series of another modality: MR (1)",)
    assert "CT (2), MR (1)" in str(refused(Code.NO_CASES, lambda: find_cases(tmp_path, modality="PT")).expected)


def test_a_modality_is_of_trees_only(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4)), tmp_path / folder / "a.nii.gz")
    refused(Code.CONFIG, lambda: find_cases(tmp_path, modality="CT"))
    error = refused(Code.LABEL, lambda: look(find_cases(tmp_path), declared_labels={"tumour": ["GTV-1"]}))
    assert "SEG" in str(error.remedy)


# tables of structures


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"tumour": 1}, "named structures, not values"),
        ({"tumour": ["GTV-1", 2]}, "named structures, not values"),
        ({"tumour": []}, "named structures, not values"),
        ({"tumour": "GTV-1", "again": ["Body", " gtv-1 "]}, "stands in two classes"),
        ({"background": "Body", "tumour": "GTV-1"}, "the background is what no structure covers"),
        ({"background": 0}, "names no structure"),
        ({"tumour": "GTV-2"}, "no case has a structure that means the class 'tumour'"),
        ({"tumour": "rest"}, "no case has a structure that means the class 'tumour'"),
    ],
)
def test_tables_that_are_refused(tree: Path, table: dict[str, Any], says: str) -> None:
    assert says in refused(Code.LABEL, lambda: find_cases(tree, labels=table)).message


def test_an_unknown_structure_names_the_nearest(tree: Path) -> None:
    error = refused(Code.LABEL, lambda: find_cases(tree, labels={"tumour": "GTV-2 "}))
    assert error.remedy == "did you mean 'gtv-1'?"
    assert "(3 of 3)" in str(error.got)


def test_other_names_of_a_class_need_not_occur(tree: Path) -> None:
    folder = find_cases(tree, labels={"tumour": ["GTV of another hospital", "GTV-1"]})
    assert {case.label.classes for case in folder.cases} == {(("GTV of another hospital", "GTV-1"),)}  # type: ignore[union-attr]


def test_the_background_may_be_stated(tree: Path) -> None:
    table = find_cases(tree, labels={"Background": 0, **TABLE}).structures
    assert table.labels.names == ("background", "tumour", "cord")


def test_without_a_table_differing_cases_are_listed_with_a_remedy_that_works(tree: Path) -> None:
    error = refused(Code.LABEL, lambda: find_cases(tree))
    assert "Body (1 of 3)" in str(error.got)
    assert "(3 of 3)" in str(error.got)
    argument = str(error.remedy).removeprefix("for example ").strip("'")
    labels = compose("train", [argument]).data.labels
    assert len(look(find_cases(tree, labels=labels)).cases) == 3


def test_without_a_table_structures_that_all_cases_have_are_the_classes(tmp_path: Path) -> None:
    names = ({"GTV (1)": GTV, "Cord": CORD}, {"cord": CORD, "gtv (1) ": GTV})
    for number, structures in enumerate(names):
        files = write_series(tmp_path / str(number), number, [GTV, CORD])
        write_rtstruct(tmp_path / str(number) / "rs.dcm", files, structures)
    found = look(find_cases(tmp_path))
    assert found.labels_from == "structures found"
    assert [name.casefold() for name in found.labels.names] == ["background", "cord", "gtv_1"]
    for case in found.cases:
        assert case.label_voxels[1:] == (box_mask(CORD).sum(), box_mask(GTV).sum())


def test_names_that_make_no_classes_ask_for_a_table(tmp_path: Path) -> None:
    files = write_series(tmp_path, 1, [GTV, CORD])
    write_rtstruct(tmp_path / "rs.dcm", files, {"GTV+": GTV, "GTV-": CORD})
    error = refused(Code.LABEL, lambda: find_cases(tmp_path))
    argument = str(error.remedy).removeprefix("for example ").strip("'")
    assert compose("train", [argument]).data.labels == {"gtv": ["GTV+", "GTV-"]}


# "${" would be an interpolation, to OmegaConf and in every configuration
NAME = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="$"), min_size=1)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAME, st.lists(NAME, min_size=1, max_size=2), min_size=1, max_size=2))
@example({"tumour": ["GTV-1", "gtv 2"], "null": ["null", "1", 'a"b', "c\\", '\\"', "x, {y}: [z]", "it's"]})
def test_a_table_can_be_pasted(classes: dict[str, list[str]]) -> None:
    (argument,) = shlex.split(override(classes))
    labels = OverridesParser.create().parse_override(argument).value()
    assert list(labels.values()) == list(classes.values())
    plain = [name for name in classes if re.fullmatch("[a-z]+", name) and name != "null"]
    assert set(plain) <= labels.keys()


# overlaps


def overlapping(root: Path) -> Path:
    files = write_series(root, 1, [GTV, OVER])
    write_seg(root / "seg.dcm", files, {"over": OVER, "gtv": GTV})
    return root


@pytest.mark.parametrize("order", [("gtv", "over"), ("over", "gtv")])
def test_the_later_class_of_a_table_wins(tmp_path: Path, order: tuple[str, str]) -> None:
    folder = find_cases(overlapping(tmp_path), labels={name: name for name in order})
    found = look(folder)
    common = int((box_mask(GTV) & box_mask(OVER)).sum())
    assert common > 0
    sizes = {"gtv": box_mask(GTV).sum(), "over": box_mask(OVER).sum()}
    assert found.cases[0].label_voxels[1:] == (sizes[order[0]] - common, sizes[order[1]])
    assert any(str(common) in note for note in found.cases[0].notes)
    assert any(line.startswith("note") and str(common) in line for line in summary_lines(found))


def test_overlaps_without_a_table_are_refused(tmp_path: Path) -> None:
    error = refused(Code.LABEL, lambda: look(find_cases(overlapping(tmp_path))))
    assert "'data.labels={gtv: [gtv], over: [over]}'" in str(error.remedy)


def test_what_several_annotations_hold_of_a_class_is_united_and_said(tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct", 1, [GTV, CORD])
    write_rtstruct(tmp_path / "first.dcm", files, {"GTV": GTV})
    larger = ((GTV[0][0], GTV[0][1] + 2), *GTV[1:])
    write_rtstruct(tmp_path / "second.dcm", files, {"gtv ": larger})
    found = look(find_cases(tmp_path))
    assert found.cases[0].label_voxels[1] == box_mask(larger).sum() > box_mask(GTV).sum()
    (note,) = found.cases[0].notes
    assert "united" in note and "GTV" in note
    write_rtstruct(tmp_path / "second.dcm", files, {"cord": CORD})
    assert look(find_cases(tmp_path)).cases[0].notes == ()
    write_rtstruct(tmp_path / "second.dcm", files, {"GTV": larger, "over": OVER})
    error = refused(Code.LABEL, lambda: look(find_cases(tmp_path)))
    assert "voxels lie in several classes" in str(error.got) and "united" not in str(error.got)


# what is bad


def test_a_case_without_any_of_the_structures_is_bad(tree: Path) -> None:
    folder = find_cases(tree, labels={"cord": "Spinal Cord"})
    assert "none of the structures" in refused(Code.LABEL, lambda: look(folder)).message
    found = look(folder, on_bad_case="skip")
    assert len(found.cases) == 2
    assert [problem.code for problem in found.quarantine] == ["E_LABEL"]


def test_annotations_without_images_are_refused_or_listed(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tree, root)
    for path in (root / "C").glob("*.dcm"):
        path.unlink()
    folder = find_cases(root, labels=TABLE)
    assert len(folder.cases) == 2
    error = refused(Code.REFERENCE, lambda: look(folder))
    assert str(error.where).startswith("RTSTRUCT_")
    found = look(folder, on_bad_case="skip")
    assert [problem.code for problem in found.quarantine] == ["E_REFERENCE"]
    assert len(found.cases) == 2


def test_broken_series_are_bad_cases_unless_they_may_be_resampled(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tree, root)
    (root / "C" / "slice_0009.dcm").unlink()
    folder = find_cases(root, labels=TABLE)
    assert len(folder.cases) == 3
    refused(Code.GAP, lambda: look(folder))
    found = look(folder, on_bad_case="skip")
    assert [problem.code for problem in found.quarantine] == ["E_GAP"]
    found = look(folder, reading=Reading(resample_irregular=True))
    assert len(found.cases) == 3
    assert sum("resampl" in note for case in found.cases for note in case.notes) == 1
    assert any(line.startswith("note") for line in summary_lines(found))


def test_a_tree_of_orphans_says_so(tmp_path: Path) -> None:
    files = write_series(tmp_path / "ct", 1, [GTV])
    write_rtstruct(tmp_path / "rs.dcm", files, {"GTV": GTV})
    shutil.rmtree(tmp_path / "ct")
    assert "RTSTRUCT" in str(refused(Code.REFERENCE, lambda: find_cases(tmp_path)).where)


def test_series_without_any_annotation_are_no_data_set(tmp_path: Path) -> None:
    write_series(tmp_path / "a" / "deep" / "ct", 1, [GTV])
    assert refused(Code.NO_CASES, lambda: find_cases(tmp_path)).got == "1 series: CT (1)"
    assert len(find_cases(tmp_path / "a" / "deep", require_labels=False).cases) == 1


def test_damaged_files_are_said_without_their_names_in_the_list(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tree, root)
    path = root / "C" / "slice_0012.dcm"
    path.write_bytes(path.read_bytes()[:200])
    folder = find_cases(root, labels=TABLE)
    refused(Code.TRUNCATED, lambda: look(folder))
    (problem,) = look(folder, on_bad_case="skip").quarantine
    assert "slice_0012" not in problem.case_id + problem.message


def test_series_of_one_patient_stay_together(tmp_path: Path) -> None:
    for number, patient in enumerate("aabbcc"):
        files = write_series(tmp_path / str(number), number, [GTV], patient=patient)
        write_rtstruct(tmp_path / str(number) / "rs.dcm", files, {"GTV": GTV})
    folder = find_cases(tmp_path)
    split = make_split(folder.cases, SplitConfig(num_folds=3), seed=0)
    assert "by patient (3 patients" in split.rule
    patients = {case.case_id: case.patient for case in folder.cases}
    assert len(split.val) == 2
    assert len({patients[case_id] for case_id in split.val}) == 1


# inputs of prediction


def test_one_series_keeps_its_folders_name(tmp_path: Path) -> None:
    write_series(tmp_path / "scans" / "p 1", 1, [GTV])
    write_series(tmp_path / "scans" / "p 2", 2, [GTV])
    assert [case.case_id for case in find_inputs([tmp_path / "scans" / "p 1"])] == ["p 1"]
    assert [case.case_id for case in find_inputs([tmp_path / "scans"])] == ["p 1", "p 2"]
    assert all(isinstance(case.images[0], Path) for case in find_inputs([tmp_path / "scans"]))


def test_series_of_a_tree_are_inputs_and_annotations_are_not(tree: Path, tmp_path: Path) -> None:
    known = {case.case_id for case in find_cases(tree, labels=TABLE).cases}
    cases = find_inputs([tree])
    assert len(cases) == 4
    assert all(case.label is None and load_image(case).array.shape == (1, *SHAPE) for case in cases)
    by_id = {case.case_id: case for case in cases}
    assert "C" in by_id  # a folder of one series
    assert len(known & by_id.keys()) == 2
    packed = Path(shutil.make_archive(str(tmp_path / "export"), "zip", tree))
    assert [case.case_id for case in find_inputs([packed])] == [case.case_id for case in cases]
    refused(Code.UNSUPPORTED, lambda: find_inputs([tree / "flat" / "RS.dcm"]))


def test_damaged_slices_are_refused_and_damage_elsewhere_is_said(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tree, root)
    last = root / "flat" / "slice_0012.dcm"  # whose loss no gap would show
    cut = last.read_bytes()[:300]
    (root / "cut.dcm").write_bytes(cut)
    with caplog.at_level(logging.WARNING):
        assert len(find_inputs([root])) == 4
    assert "1 files that cannot be read" in caplog.text
    last.write_bytes(cut)
    assert refused(Code.TRUNCATED, lambda: find_inputs([root])).where == "slice_0012.dcm"


def test_series_of_the_models_modality_only(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cases = find_inputs([tree], modality="CT")
    assert len(cases) == 3
    assert "MR (1)" in caplog.text
    assert refused(Code.NO_CASES, lambda: find_inputs([tree], modality="PT")).got == "CT (3), MR (1)"
    mr = next(case for case in find_inputs([tree / "flat"]) if case.case_id.startswith("MR_"))
    uid = mr.images[0].uid
    (chosen,) = find_inputs([tree], modality="CT", reading=Reading(series=uid))
    assert chosen.images[0].uid == uid
    assert load_image(chosen, reading=Reading(series=uid)).modality == "MR"
    assert uid in str(refused(Code.MISSING, lambda: find_inputs([tree], reading=Reading(series="1.2.3"))).expected)


def test_series_as_channels_of_one_case(tmp_path: Path) -> None:
    for name, number in (("t1", 1), ("t2", 1)):
        write_series(tmp_path / "patient" / name, number, [GTV], modality="MR" if name == "t1" else "CT")
    (case,) = find_inputs([tmp_path], channels=["t1", "t2"])
    assert case.case_id == "patient"
    assert len(find_inputs([tmp_path], num_channels=1)) == 2


# the whole way


def test_a_run_that_goes_on_keeps_its_structures_where_the_tree_has_grown(tmp_path: Path) -> None:
    root, run = tmp_path / "data", tmp_path / "run"
    run.mkdir()
    for number in (1, 2):
        files = write_series(root / str(number), number, [GTV])
        write_rtstruct(root / str(number) / "rs.dcm", files, {"GTV 1": GTV})
    settings = [f"data.root='{root}'", "data.split.num_folds=2", "data.plan.base_width=4"]
    experiment, quiet = compose("train", settings), Console(quiet=True)
    cases, split, info = begin(experiment, run, torch.device("cpu"), quiet)
    assert info.labels.names == ("background", "GTV_1")
    assert info.modality == "CT"
    for number, name, modality in ((3, "GTV 1", "CT"), (4, "other", "CT"), (5, "GTV 1", "MR")):
        files = write_series(root / str(number), number, [GTV], modality=modality)
        write_rtstruct(root / str(number) / "rs.dcm", files, {name: GTV})
    refused(Code.MIXED, lambda: find_cases(root))
    again, same_split, same_info = go_on(experiment, run, quiet)
    assert (same_split, same_info) == (split, info)
    for case_id in (*split.train, *split.val):
        assert again[case_id] == cases[case_id]


@pytest.mark.slow
@pytest.mark.data
def test_from_real_structure_sets_to_a_prediction(real_data: Path, tmp_path: Path) -> None:
    root = real_data / "dicom" / "rtstruct" / "sts" / "dicom"
    assert "'GTV_Mass_CT'" in str(
        refused(Code.LABEL, lambda: find_cases(root, labels={"tumour": "GTV_Mass"}, modality="CT")).remedy
    )
    settings = [
        "data.modality=CT",
        "data.labels={tumour: [gtv_mass_ct]}",
        "data.split.num_folds=2",
        "data.plan.base_width=4",
        "data.plan.patch_size=[16,48,48]",
        "trainer.max_steps=5",
        "trainer.num_validations=1",
        "trainer.device=cpu",
    ]
    main(["train", f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}", *settings])
    info = BundleInfo.read(tmp_path / "run")
    assert (info.modality, info.structures) == ("CT", {"tumour": ("gtv_mass_ct",)})
    validated = list((tmp_path / "run" / "validation").glob("CT_*.nii.gz"))
    assert len(validated) == 1
    main(["predict", str(tmp_path / "run"), str(root / "STS_008"), "-o", str(tmp_path / "out")])
    (predicted,) = (tmp_path / "out").glob("*.nii.gz")
    (case,) = find_inputs([root / "STS_008"], modality="CT")
    assert predicted.name == f"{case.case_id}.nii.gz"
    assert open_label(predicted).grid.difference(load_image(case).grid) is None
