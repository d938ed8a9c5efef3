"""The list of bad inputs: a test for each of its rows, and what only the whole way of a prediction shows.

`ROWS` names for each row where it is tested. The rows of NIfTI files, images and labels go through the preflight in
`test_preflight.py`, where one folder holds them all; those that concern prediction stand here.
"""

from __future__ import annotations

import ast
import json
import multiprocessing.process
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from medseg.cli import main
from medseg.formats import open_label, open_volume, read_grid, write_image, write_label
from medseg.volume import Grid, Volume

TESTS = Path(__file__).parent

PREFLIGHT = "test_preflight.test_bad_case"
GOOD = "test_preflight.test_good_case"

ROWS: dict[str, tuple[str, ...]] = {
    "D1": ("test_dicom_series.test_several_series",),
    "D2": ("test_dicom_series.test_localizer_of_the_same_series_is_left_out",),
    "D3": ("test_dicom_series.test_missing_slice",
           "test_dicom_irregular.test_missing_slices_are_interpolated_and_the_others_kept"),
    "D4": ("test_dicom_series.test_a_missing_end_is_noted",),
    "D5": ("test_dicom_series.test_duplicates",),
    "D6": ("test_dicom_series.test_duplicates",),
    "D7": ("test_dicom_series.test_gantry_tilt", "test_dicom_irregular.test_landmarks_stay_in_place",
           "test_predict_formats.test_an_irregular_series_is_mended_when_asked_and_recorded"),
    "D8": ("test_dicom_series.test_uneven_spacing_and_jitter",),
    "D9": ("test_dicom_series.test_order_comes_from_positions_alone",),
    "D10": ("test_dicom_property.test_affine_and_voxels_are_those_of_highdicom",
            "test_dicom_series.test_oblique_series_lies_where_the_standard_says"),
    "D11": ("test_dicom_property.test_every_voxel_lies_where_the_standard_says",
            "test_dicom_seg.test_all_orders_and_directions_of_axes"),
    "D12": ("test_dicom_series.test_no_geometry", "test_dicom_pixels.test_an_image_without_a_position_is_a_picture"),
    "D13": ("test_dicom_frames.test_shuffled_frames_lie_where_their_groups_say",),
    "D14": ("test_dicom_frames.test_several_volumes_in_one_file",),
    "D15": ("test_dicom_pixels.test_rescale_is_per_slice_and_monochrome1_is_inverted",),
    "D16": ("test_dicom_pixels.test_only_the_bits_that_count_are_read",),
    "D17": ("test_dicom_pixels.test_big_endian_reads_equal",),
    "D18": ("test_dicom_damaged.test_files_without_preamble_are_read_when_asked_for",),
    "D19": ("test_dicom_pixels.test_compressed_without_loss_reads_equal",),
    "D20": ("test_dicom_pixels.test_missing_codec_names_syntax_and_package",),
    "D21": ("test_dicom_pixels.test_lossy_compression_is_noted", "test_bad_inputs.test_a_lossy_source_is_recorded"),
    "D22": ("test_dicom_pixels.test_rescale_is_per_slice_and_monochrome1_is_inverted",),
    "D23": ("test_dicom_pixels.test_colours_are_channels_where_asked_for",
            "test_dicom_pixels.test_palettes_are_colours"),
    "D24": ("test_dicom_damaged.test_truncated_files", "test_dicom_damaged.test_compressed_files_that_are_cut"),
    "D25": ("test_dicom_damaged.test_absurd_sizes", "test_dicom_damaged.test_absurd_frames"),
    "D26": ("test_dicom_damaged.test_deflate_bomb",),
    "D27": ("test_dicom_damaged.test_sequences_without_end",),
    "D28": ("test_dicom_series.test_other_objects_and_other_files_are_not_images",
            "test_dicom_series.test_scan_tells_what_lies_in_a_tree"),
    "D29": ("test_dicom_series.test_mixed_series",),
    "D30": ("test_dicom_series.test_mixed_series",),
    "D31": ("test_dicom_pixels.test_padding_becomes_air_in_ct",
            "test_dicom_pixels.test_padding_of_other_modalities_and_units_keeps_its_value"),
    "D32": ("test_dicom_series.test_a_tree_with_one_series_is_read_at_any_depth",),
    "D33": ("test_privacy.test_nothing_about_the_patient_is_written",
            "test_privacy.test_nothing_about_the_patient_is_printed",
            "test_privacy.test_what_is_newer_writes_nothing_about_the_patient",
            "test_privacy.test_what_is_newer_prints_nothing_about_the_patient"),
    "D34": ("test_dicom_damaged.test_nothing_to_read", "test_dicom_damaged.test_unreadable_files_and_folders"),
    "N1": (f"{PREFLIGHT}[N1]", "test_bad_nifti.test_the_form_that_is_asked_for_places_the_file",
           "test_bad_inputs.test_bad_scans_are_set_aside"),
    "N2": (f"{PREFLIGHT}[N2]", "test_bad_nifti.test_a_file_without_any_form_is_read_where_that_is_allowed"),
    "N3": (f"{PREFLIGHT}[N3]", "test_bad_nifti.test_a_slight_shear_is_made_perpendicular_about_the_centre"),
    "N4": (f"{GOOD}[N4]", "test_bad_inputs.test_axes_in_any_order_give_the_same_prediction"),
    "N5": (f"{PREFLIGHT}[N5_zero]", f"{PREFLIGHT}[N5_nan]"),
    "N6": (f"{GOOD}[N6]", "test_nifti.test_fourth_dimension"),
    "N7": (f"{PREFLIGHT}[N7]", "test_cases.test_a_4d_file_holds_channels_only_where_they_are_declared"),
    "N8": (f"{GOOD}[N8]", "test_nifti.test_slope_and_intercept_and_what_is_not_one"),
    "N9": ("test_bad_nifti.test_a_whole_body_of_doubles_stays_within_its_result",),
    "N10": (f"{PREFLIGHT}[N10]", "test_nifti.test_nonfinite_voxels_are_counted"),
    "N11": (f"{GOOD}[N11]", "test_bad_inputs.test_strange_scans_are_predicted_on_their_own_grids"),
    "N12": (f"{GOOD}[N12]", "test_nifti.test_label_round_trip"),
    "N13": (f"{PREFLIGHT}[N13]", f"{GOOD}[N13_near]",
            "test_volume.test_nearly_integers_are_rounded_and_others_refused"),
    "N14": (f"{PREFLIGHT}[N14_unknown]", f"{PREFLIGHT}[N14_negative]"),
    "N15": (f"{PREFLIGHT}[N15]",),
    "N16": (f"{PREFLIGHT}[N16_origin]", f"{PREFLIGHT}[N16_direction]"),
    "N17": (f"{GOOD}[N17]", "test_survey.test_an_empty_label_is_counted_and_left_out_of_the_pooled_statistics"),
    "N18": (f"{PREFLIGHT}[N18_cut]", f"{PREFLIGHT}[N18_sum]", "test_nifti.test_cut_and_corrupted_files"),
    "N19": (f"{GOOD}[N19]", "test_nifti.test_content_decides_not_the_name"),
    "N20": (f"{PREFLIGHT}[N20_dims]", f"{PREFLIGHT}[N20_bomb]", "test_nifti.test_absurd_headers_allocate_nothing"),
    "N21": (f"{PREFLIGHT}[N21_colour]", f"{PREFLIGHT}[N21_half]", "test_nifti.test_pairs_and_halves"),
    "N22": (f"{GOOD}[N22]", "test_training.test_volumes_smaller_than_any_patch",
            "test_bad_inputs.test_strange_scans_are_predicted_on_their_own_grids"),
    "N23": ("test_preflight.test_a_patient_on_two_sides_is_found_with_the_bad_cases",
            "test_splits.test_a_patient_on_two_sides_is_refused_by_the_cases"),
    "N24": (f"{PREFLIGHT}[N24]", f"{PREFLIGHT}[n24]", "test_cases.test_duplicate_ids"),
    "S1": ("test_export.test_s1_a_pickle_is_refused_and_never_runs", "test_bundle.test_missing_and_foreign"),
    "S2": ("test_export.test_s2_nothing_is_built_by_a_name_that_is_not_registered",
           "test_export.test_s2_configurations_name_registered_parts_only",),
    "S3": ("test_export.test_s3_archives_that_reach_out",
           "test_export.test_s3_links_in_a_folder_and_runs_elsewhere",
           "test_archive.test_paths_out_of_the_folder", "test_archive.test_links_and_special_files",
           "test_archive.test_a_bomb_within_the_ratio_of_deflate"),
    "S4": ("test_bundle.test_a_checkpoint_cut_anywhere_is_refused",
           "test_resume.test_a_damaged_checkpoint_falls_back_to_the_one_before",
           "test_resume.test_both_damaged_are_refused"),
    "S5": ("test_bad_inputs.test_bad_scans_are_set_aside", "test_preprocess.test_other_channels_are_refused",
           "test_ensemble.test_models_that_do_not_fit", "test_fine_tuning.test_another_network_is_refused"),
    "S6": ("test_resume.test_killed_in_a_validation", "test_resume.test_killed_again_and_again"),
    "S7": ("test_faults.test_a_full_disk", "test_faults.test_a_read_only_disk",
           "test_faults.test_a_full_disk_at_many_operations", "test_faults.test_real_small_file_systems",
           "test_faults.test_a_trial_that_met_a_full_disk_goes_on",
           "test_predict_many.test_a_full_disk_is_no_bad_case"),
    "S8": ("test_training.test_resume_goes_on_as_if_nothing_had_happened",
           "test_resume.test_where_a_run_lies_is_said_but_not_logged",
           "test_distributed.test_a_signal_to_stop_ends_all_processes"),
    "S9": ("test_faults.test_no_memory_for_a_training_step",
           "test_predictor.test_batches_that_do_not_fit_become_smaller_and_stay_so"),
    "S10": ("test_doctor.test_shared_memory_is_no_need", "test_doctor.test_several_gpus_need_shared_memory",
            "test_distributed.test_small_shared_memory_is_said_before_nccl_fails",
            "test_faults.test_small_shared_memory_is_no_full_disk",
            "test_bad_inputs.test_no_network_no_shared_memory_no_second_process",),
    "S11": ("test_bad_inputs.test_no_network_no_shared_memory_no_second_process",),
    "S12": ("test_training.test_a_loss_that_is_not_finite_ends_the_run",
            "test_resume.test_a_loss_that_is_not_finite_may_be_left_out",
            "test_faults.test_a_loss_that_is_nan_never_becomes_the_best",),
    "S13": ("test_preparation.test_changed_bytes_are_a_miss_even_with_size_and_time_kept",
            "test_preparation.test_settings_that_shape_a_case_are_in_its_key",
            "test_preparation.test_ct_intensities_labels_reading_and_code_are_in_the_key"),
    "S14": ("test_distributed.test_two_processes_train_what_one_does",
            "test_bad_inputs.test_the_table_is_the_same_however_many_are_measured_at_a_time",),
}  # fmt: skip
"""Row → where it is tested: module.function, with the id of the parameter where it matters."""

NUM_ROWS = {"D": 34, "N": 24, "S": 14}


def test_every_row_has_tests() -> None:
    assert list(ROWS) == [f"{letter}{n}" for letter, count in NUM_ROWS.items() for n in range(1, count + 1)]
    assert all(ROWS.values())


@pytest.mark.parametrize("row", ROWS)
def test_row(row: str) -> None:
    """Each test that a row names is there."""
    for name in ROWS[row]:
        module, _, rest = name.partition(".")
        function, _, parameter = rest.partition("[")
        functions, strings = contents(module)
        assert function in functions, f"{row}: there is no {name}"
        assert not parameter or parameter.rstrip("]") in strings, f"{row}: there is no {name}"


@cache
def contents(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """The functions at the top of a module of tests, and the strings in it."""
    tree = ast.parse((TESTS / f"{module}.py").read_text(encoding="utf-8"))
    functions = frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return functions, frozenset(strings)


def test_every_code_is_explained_and_the_page_is_up_to_date() -> None:
    script = TESTS.parent / "scripts" / "make_error_docs.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0, f"run {script.name}"


READERS = ("formats", "data/cases.py", "data/dicom_tree.py", "data/inputs.py", "data/layouts.py", "data/manifest.py",
           "data/pairing.py", "data/survey.py")  # fmt: skip
"""What refuses files and cases."""
REASONS = "formats/dicom/catalog.py"
"""Its refusals of annotations are reasons within others."""


def test_refusals_of_files_say_where_what_and_what_to_do() -> None:
    """Each names the place, a remedy, and at least one of what was expected and what came."""
    package = TESTS.parent / "medseg"
    paths = [
        p for name in READERS for p in ([package / name] if name.endswith(".py") else (package / name).rglob("*.py"))
    ]
    refusals = 0
    for path in paths:
        if path == package / REASONS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "MedsegError":
                said = {keyword.arg for keyword in node.keywords}
                assert {"where", "remedy"} <= said and said & {"expected", "got"}, f"{path}:{node.lineno}"
                refusals += 1
    assert refusals > 100


# prediction


class Outcome:
    """One call of `medseg predict` over good and bad scans: what it left."""

    def __init__(self, scans: Path, out: Path, status: int) -> None:
        self.scans, self.out, self.status = scans, out, status
        lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        self.cases: dict[str, dict[str, Any]] = {line["case"]: line for line in lines if "case" in line}

    def scan(self, case: str) -> Path:
        return self.scans / f"{case}.nii.gz"

    def label(self, case: str) -> Volume:
        return open_label(self.out / f"{case}.nii.gz")


ORIENTATIONS = ("RAS", "LPS", "PIR", "SLA")


@pytest.fixture(scope="module")
def outcome(tiny_run, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Scans in several orders of axes, strange ones, and bad ones. Tests read it; none writes into it."""
    folder = tmp_path_factory.mktemp("bad")
    scans = folder / "scans"
    scans.mkdir()
    scan = open_volume(tiny_run.dicom)
    for letters in ORIENTATIONS:
        turned = scan.reoriented(letters)
        write_image(scans / f"N4_{letters}.nii.gz", Volume(np.ascontiguousarray(turned.array), turned.grid))
    whole = scan.array.astype(np.float32)
    corner = tuple(slice(0, n) for n in (5, 7, 3))
    small, slice_ = (slice(None), *corner), (slice(None),) * 3 + (slice(4, 5),)
    for name, array, grid in (
        ("N11", np.full_like(whole, 40.0), scan.grid),
        ("N22_small", whole[small], scan.grid.boxed(corner)),
        ("N22_slice", whole[slice_], Grid((*scan.grid.shape[:2], 1), scan.grid.affine)),
    ):
        write_image(scans / f"{name}.nii.gz", Volume(array, grid))
    write_image(scans / "S5_channels.nii.gz", Volume(np.concatenate([whole, whole]), scan.grid))
    write_image(scans / "N10.nii.gz", Volume(np.where(whole > 0, np.nan, whole), scan.grid))
    for name in ("N1", "N2"):
        image = nib.load(scans / "N4_RAS.nii.gz")
        image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
        image.set_sform(image.affine, code=int(name == "N1"))
        moved = image.affine.copy()
        moved[0, 3] += 30
        image.set_qform(moved, code=int(name == "N1"))
        nib.save(image, scans / f"{name}.nii.gz")
    cut = (scans / "N4_RAS.nii.gz").read_bytes()
    (scans / "N18.nii.gz").write_bytes(cut[: len(cut) // 2])
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(scans / "S5_picture.png")
    lossy = shutil.copytree(tiny_run.dicom, scans / "D21")
    for path in lossy.iterdir():
        item = pydicom.dcmread(path)
        item.LossyImageCompression = "01"
        item.save_as(path)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "predict",
                str(tiny_run.run),
                str(scans),
                "-o",
                str(folder / "out"),
                "--on-bad-case",
                "skip",
                "--step",
                "1",
            ]
        )
    return Outcome(scans, folder / "out", int(ended.value.code or 0))


BAD_SCANS = {
    "N1": "E_FORM", "N2": "E_NO_GEOMETRY", "N10": "E_NONFINITE", "N18": "E_TRUNCATED", "S5_channels": "E_4D",
    "S5_picture": "E_MODEL",
}  # fmt: skip


def test_bad_scans_are_set_aside(outcome: Outcome) -> None:
    assert outcome.status == 3
    failed = {case: line["failed"]["code"] for case, line in outcome.cases.items() if line.get("failed")}
    assert failed == BAD_SCANS
    left = {path.name for path in outcome.out.iterdir() if path.is_file()}
    assert not left & {f"{case}{ending}" for case in BAD_SCANS for ending in (".nii.gz", ".png")}
    assert not [name for name in left if name.startswith(".")], "nothing half-written"


def test_axes_in_any_order_give_the_same_prediction(outcome: Outcome) -> None:
    first = outcome.label("N4_RAS")
    assert len(np.unique(first.array)) > 1
    for letters in ORIENTATIONS:
        label = outcome.label(f"N4_{letters}")
        assert label.grid.difference(read_grid(outcome.scan(f"N4_{letters}"))) is None
        assert label.grid.orientation == letters
        np.testing.assert_array_equal(label.reoriented("RAS").array, first.array)


@pytest.mark.parametrize("case", ["N11", "N22_small", "N22_slice"])
def test_strange_scans_are_predicted_on_their_own_grids(outcome: Outcome, case: str) -> None:
    label = outcome.label(case)
    assert label.grid.difference(read_grid(outcome.scan(case))) is None
    assert label.array.dtype == np.uint8 and label.array.max() < 10


def test_a_lossy_source_is_recorded(outcome: Outcome) -> None:
    assert outcome.cases["D21"]["notes"] == ["lossy compression"]
    assert json.loads((outcome.out / "predictions.json").read_text())["cases"]["D21"]["notes"] == ["lossy compression"]


def test_a_form_can_be_chosen(outcome: Outcome, tiny_run, tmp_path: Path) -> None:
    """N1 and N2 again, as the user allows them."""
    files = [str(outcome.scan(case)) for case in ("N1", "N2")]
    main(
        ["predict", str(tiny_run.run), *files, "-o", str(tmp_path), "--form", "qform", "--without-form", "--step", "1"]
    )
    notes = json.loads((tmp_path / "predictions.json").read_text())["cases"]
    assert "the qform was taken" in notes["N1"]["notes"][0] and "voxel sizes alone" in notes["N2"]["notes"][0]
    shift = read_grid(tmp_path / "N1.nii.gz").affine - read_grid(outcome.scan("N4_RAS")).affine
    np.testing.assert_allclose(shift[:3, 3], (30, 0, 0), atol=1e-3)


# the machine


def data_folder(root: Path) -> Path:
    """Four tiny volumes with a block in each."""
    grid = Grid((12, 10, 8), np.diag([1.0, 1.5, 2.0, 1.0]))
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for number in range(4):
        label = np.zeros(grid.shape, np.uint8)
        label[2 + number : 8, 3:7, 2:6] = 1
        noise = np.random.default_rng(number).normal(size=grid.shape)
        write_image(root / "images" / f"c{number}.nii.gz", Volume((noise + label)[None], grid))
        write_label(root / "labels" / f"c{number}.nii.gz", Volume(label, grid))
    return root


@pytest.fixture
def nothing_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """No network, no shared memory, no second process of Python; what tried is listed."""
    tried: list[str] = []

    def refuse(what: str) -> Any:
        def call(*arguments: object, **options: object) -> None:
            tried.append(what)
            raise OSError(what)

        return call

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse(f"socket.{name}"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse("getaddrinfo"))
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse("a process"))
    monkeypatch.setattr(shared_memory, "SharedMemory", refuse("shared memory"))
    for name in ("_new_using_filename_cpu", "_new_using_fd_cpu"):
        monkeypatch.setattr(torch.UntypedStorage, name, refuse("shared memory of torch"), raising=True)
    yield tried


def test_no_network_no_shared_memory_no_second_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_outside: list[str]
) -> None:
    """S10 and S11: unless trainer.devices asks for several processes, training and prediction are one process with
    threads, so that /dev/shm may be of any size."""
    monkeypatch.chdir(tmp_path)
    data = data_folder(tmp_path / "data")
    run, out = tmp_path / "run", tmp_path / "out"
    main(
        ["train", f"data.root={data}", f"hydra.run.dir={run}", "debug=fast", "data.plan.base_width=4",
         "data.plan.patch_size=[8,8,8]", "trainer.device=cpu", "trainer.max_steps=2", "trainer.num_validations=1"]
    )  # fmt: skip
    main(["predict", str(run), str(data / "images"), "-o", str(out)])
    main(["evaluate", str(out), str(data / "labels"), "-o", str(tmp_path / "scores")])
    assert len(list(out.glob("*.nii.gz"))) == 4
    assert nothing_outside == []


def test_the_table_is_the_same_however_many_are_measured_at_a_time(tmp_path: Path) -> None:
    """S14: scoring is spread over threads; what several processes validate: tests/test_distributed.py."""
    data = data_folder(tmp_path / "data")
    predictions = shutil.copytree(data / "labels", tmp_path / "predictions")
    for number in range(4):
        label = open_label(predictions / f"c{number}.nii.gz")
        array = np.asarray(label.array).copy()
        array[: 3 + number] = 0
        write_label(predictions / f"c{number}.nii.gz", Volume(array, label.grid))
    tables = []
    for threads in (1, 3):
        scores = tmp_path / f"scores{threads}"
        main(["evaluate", str(predictions), str(data / "labels"), "-o", str(scores), "--threads", str(threads)])
        tables.append((scores / "metrics.csv").read_bytes())
    assert tables[0] == tables[1] and tables[0].count(b"\n") >= 5
