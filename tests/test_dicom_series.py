from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_images import (
    ALONG_ROW,
    CANARY,
    COLUMNS,
    DOWN_COLUMN,
    NORMAL,
    ORIGIN,
    PIXELS,
    ROWS,
    SLICES,
    STEP,
    digits,
    expected_world,
    make,
    moved,
    only,
    refused,
    setting,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from scipy.spatial.transform import Rotation

from medseg.errors import Code
from medseg.formats import Reading, find_series, open_label, open_volume, read_grid
from medseg.formats.dicom import files
from medseg.formats.dicom.series import assess, series_files
from medseg.phantom import write_dicom_series
from medseg.volume import Grid, Volume

SEG = "1.2.840.10008.5.1.4.1.1.66.4"


def test_oblique_series_lies_where_the_standard_says(tmp_path: Path) -> None:
    make(tmp_path)
    volume = open_volume(tmp_path)
    assert volume.array.shape == (1, COLUMNS, ROWS, SLICES) and volume.array.dtype == np.float32
    assert volume.modality == "CT"
    np.testing.assert_array_equal(volume.array[0], PIXELS.transpose(2, 1, 0))
    for index in ((0, 0, 0), (4, 0, 0), (0, 3, 0), (2, 1, 5)):
        np.testing.assert_allclose(volume.grid.to_world(index), expected_world(*index), atol=1e-6)
    assert read_grid(tmp_path).difference(volume.grid, tolerance_mm=0) is None
    np.testing.assert_array_equal(open_label(tmp_path).array, volume.array[0])


def test_order_comes_from_positions_alone(tmp_path: Path) -> None:
    numbers = list(range(SLICES))
    random.Random(1).shuffle(numbers)
    folder, reference = tmp_path / "a", tmp_path / "b"
    for k, path in enumerate(make(folder, lambda ds, k: setattr(ds, "InstanceNumber", numbers[k]))):
        path.rename(path.with_name(f"{numbers[k]:03d}x"))
    make(reference)
    np.testing.assert_array_equal(open_volume(folder).array, open_volume(reference).array)
    assert open_volume(folder).grid.difference(open_volume(reference).grid, tolerance_mm=0) is None


def test_slices_stored_backwards_give_the_same_volume_in_space(tmp_path: Path) -> None:
    make(tmp_path, lambda ds, k: setattr(ds, "ImagePositionPatient", digits(ORIGIN + (SLICES - 1 - k) * STEP * NORMAL)))
    volume = open_volume(tmp_path)
    np.testing.assert_array_equal(volume.array[0], PIXELS[::-1].transpose(2, 1, 0))
    np.testing.assert_allclose(volume.grid.to_world([0, 0, 0]), expected_world(0, 0, 0), atol=1e-6)


def test_missing_slice(tmp_path: Path) -> None:
    make(tmp_path, only(0, 1, 3, 4, 5))
    error = refused(tmp_path, Code.GAP)
    height = float(ORIGIN @ NORMAL)
    assert f"1 between {height + STEP:.3f} and {height + 3 * STEP:.3f} mm" in str(error.got)
    make(tmp_path / "three", only(0, 1, 3))
    refused(tmp_path / "three", Code.GAP)


def test_uneven_spacing_and_jitter(tmp_path: Path) -> None:
    make(tmp_path / "jitter", moved(lambda k: (-1) ** k * 0.0005 * STEP * NORMAL))
    assert open_volume(tmp_path / "jitter").grid.shape[2] == SLICES
    make(tmp_path / "uneven", moved(lambda k: (0.02 * STEP if k == 3 else 0) * NORMAL))
    refused(tmp_path / "uneven", Code.SPACING)


def test_gantry_tilt(tmp_path: Path) -> None:
    make(tmp_path / "tilted", moved(lambda k: k * STEP * np.tan(np.deg2rad(12)) * DOWN_COLUMN))
    assert "12.00 degrees" in str(refused(tmp_path / "tilted", Code.TILT).got)
    make(
        tmp_path / "table", moved(lambda k: (0.45 if k == 3 else 0) * ALONG_ROW)
    )  # one slice aside: half a pixel is 0.4
    refused(tmp_path / "table", Code.TILT)


def test_a_shift_below_half_a_pixel_is_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, moved(lambda k: 0.06 * k * ALONG_ROW))  # 0.3 mm over the stack, 1.4 degrees: beyond Grid's shear
    volume = open_volume(tmp_path)
    np.testing.assert_allclose(volume.grid.spacing_mm, (0.8, 1.5, STEP), atol=1e-6)
    assert "shift is ignored" in caplog.text


def test_duplicates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make(tmp_path)[2]
    (tmp_path / "copy.dcm").write_bytes(first.read_bytes())
    np.testing.assert_array_equal(open_volume(tmp_path).array[0], PIXELS.transpose(2, 1, 0))
    assert "1 slices that are there twice" in caplog.text and CANARY not in caplog.text
    ds = pydicom.dcmread(first)
    ds.EchoTime, ds.PixelData = 80, bytes(len(ds.PixelData))
    ds.save_as(tmp_path / "copy.dcm")
    error = refused(tmp_path, Code.DUPLICATE)
    assert "copy.dcm" in str(error.got) and error.remedy == "split the series by EchoTime"


def test_several_series(tmp_path: Path) -> None:
    make(tmp_path, uid="1.2.3", name="a")
    make(tmp_path, lambda ds, k: (only(0, 1, 2)(ds, k), setting(Modality="MR")(ds, k)), uid="4.5.6", name="b")
    error = refused(tmp_path, Code.MULTI_SERIES)
    assert "6 slices 5 × 4, UID 1.2.3" in str(error.got) and "3 slices 5 × 4, UID 4.5.6" in str(error.got)
    assert open_volume(tmp_path, Reading(series="4.5.6")).grid.shape[2] == 3
    assert open_volume(tmp_path, Reading(series="4.5.6")).modality == "MR"
    assert open_volume(tmp_path, Reading(series="MR_b5413b")).grid.shape[2] == 3  # its name, as `inspect` shows it
    refused(tmp_path, Code.MISSING, Reading(series="7.8.9"))
    infos = find_series(tmp_path)
    assert [(i.uid, i.modality, i.num_slices, i.shape) for i in infos] == [
        ("1.2.3", "CT", 6, (5, 4, 6)),
        ("4.5.6", "MR", 3, (5, 4, 3)),
    ]
    assert [p.name for p in infos[1].files] == ["b00.dcm", "b01.dcm", "b02.dcm"]


def turned(ds: Dataset, k: int) -> None:
    only(0, 1)(ds, k)
    ds.ImageOrientationPatient = digits([*ALONG_ROW, *NORMAL])


def test_localizer_of_the_same_series_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path)
    make(tmp_path, turned, name="scout")
    np.testing.assert_array_equal(open_volume(tmp_path).array[0], PIXELS.transpose(2, 1, 0))
    assert "left out 2 localizer images" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda ds, k: setattr(ds, "ImageOrientationPatient", digits([*ALONG_ROW, *NORMAL])),  # too many for a localizer
        lambda ds, k: (only(5)(ds, k), setting(PixelSpacing=[1.5, 0.9])(ds, k)),  # parallel: may belong to the stack
        lambda ds, k: (only(1)(ds, k), setting(Modality="PT")(ds, k)),
        lambda ds, k: (only(1)(ds, k), setting(Rows=2, PixelData=PIXELS[0][:2].tobytes())(ds, k)),
    ],
    ids=["two stacks", "other spacing", "other modality", "other size"],
)
def test_mixed_series(tmp_path: Path, change: Callable[[Dataset, int], None]) -> None:
    make(tmp_path)
    make(tmp_path, change, name="x")
    refused(tmp_path, Code.MIXED)


def test_no_stack_is_small_enough_to_guess(tmp_path: Path) -> None:
    make(tmp_path, only(0, 1, 2))
    make(tmp_path, turned, name="x")
    refused(tmp_path, Code.MIXED)


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_no_geometry(tmp_path: Path, tag: str) -> None:
    make(tmp_path, lambda ds, k: delattr(ds, tag) if k == 2 else None)
    assert tag in str(refused(tmp_path, Code.NO_GEOMETRY).expected)


def test_slides_are_not_slices(tmp_path: Path) -> None:
    make(tmp_path, lambda ds, k: (setting(Modality="SM")(ds, k), delattr(ds, "ImagePositionPatient")))
    assert "slides" in refused(tmp_path, Code.UNSUPPORTED).message


def test_small_deviations_of_one_sign_add_up(tmp_path: Path) -> None:
    wide = lambda k: NORMAL * STEP * 0.009 * min(k, SLICES // 2)  # noqa: E731
    make(tmp_path / "short", moved(wide))
    assert open_volume(tmp_path / "short").grid.shape[2] == SLICES  # 0.9 % over a few slices is nothing
    for part in range(12):
        make(
            tmp_path / "long",
            moved(lambda k, p=part: NORMAL * (STEP * SLICES * p + drift(k + SLICES * p))),
            name=f"{part:02d}_",
        )
    assert "further than" in str(refused(tmp_path / "long", Code.SPACING).expected)


def drift(k: int, total: int = 12 * SLICES) -> float:
    """Steps 0.9 % longer in the first half of a long stack."""
    return STEP * 0.009 * min(k, total // 2)


def test_other_objects_and_other_files_are_not_images(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, lambda ds, k: (only(0)(ds, k), setting(SOPClassUID=SEG, Modality="SEG")(ds, k)), uid="9", name="seg")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").touch()
    assert open_volume(tmp_path).grid.shape == (COLUMNS, ROWS, SLICES)
    assert len(find_series(tmp_path)) == 1


def test_single_slice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make(tmp_path / "a", only(3))[0]
    for source in (path, path.parent):
        grid = open_volume(source).grid
        assert grid.shape == (COLUMNS, ROWS, 1)
        np.testing.assert_allclose(grid.spacing_mm, (0.8, 1.5, 3.0), atol=1e-6)
    assert "single slice" in caplog.text
    make(tmp_path / "b", lambda ds, k: (only(3)(ds, k), setting(SpacingBetweenSlices=4.5)(ds, k)))
    assert open_volume(tmp_path / "b").grid.spacing_mm[2] == pytest.approx(4.5)
    make(tmp_path / "c", lambda ds, k: (only(3)(ds, k), setting(SliceThickness=None)(ds, k)))
    refused(tmp_path / "c", Code.NO_GEOMETRY)


def test_nothing_about_the_patient_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="medseg")
    folder = tmp_path / CANARY / "series"
    make(folder)
    make(folder, turned, name="scout")
    make(folder, lambda ds, k: (only(0)(ds, k), setting(SOPClassUID=SEG)(ds, k)), uid="9", name="seg")
    open_volume(folder)
    assert caplog.records and CANARY not in caplog.text


def test_a_tree_with_one_series_is_read_at_any_depth(tmp_path: Path) -> None:
    root = tmp_path / "study äß 中 ;$()"
    make(root / "a" / "b c" / "series")
    np.testing.assert_array_equal(open_volume(root).array[0], PIXELS.transpose(2, 1, 0))
    make(root, uid="5")
    assert [info.uid for info in find_series(root)] == ["1.2.3", "5"]
    assert refused(root, Code.MULTI_SERIES).remedy == "pick one with --series"
    assert open_volume(root, Reading(series="5")).grid.shape[2] == SLICES


def test_a_missing_end_is_noted(tmp_path: Path) -> None:
    make(tmp_path / "a", only(2, 3, 4, 5))
    (note,) = open_volume(tmp_path / "a").notes
    assert "InstanceNumber runs from 3 to 6" in note
    make(tmp_path / "b", lambda ds, k: (only(0, 1, 2, 3, 4)(ds, k), setting(ImagesInAcquisition=SLICES)(ds, k)))
    (note,) = open_volume(tmp_path / "b").notes
    assert "5 of 6" in note
    make(tmp_path / "c", setting(ImagesInAcquisition=SLICES))
    assert open_volume(tmp_path / "c").notes == ()


def test_two_slices_are_a_volume_with_a_warning(tmp_path: Path) -> None:
    make(tmp_path, only(0, 1))
    volume = open_volume(tmp_path)
    assert volume.grid.shape == (COLUMNS, ROWS, 2) and volume.grid.spacing_mm[2] == pytest.approx(STEP)
    assert len(volume.notes) == 1 and "only two slices" in volume.notes[0]


def test_another_frame_of_reference_does_not_fit(tmp_path: Path) -> None:
    make(tmp_path, lambda ds, k: setting(FrameOfReferenceUID="1.2.9" if k < 4 else "1.2.8")(ds, k))
    refused(tmp_path, Code.MIXED)
    frames = ["", "1.2.9", "1.2.9", "1.2.9", "1.2.8", "1.2.8"]
    make(tmp_path / "first without", lambda ds, k: setting(FrameOfReferenceUID=frames[k])(ds, k))
    refused(tmp_path / "first without", Code.MIXED)
    make(tmp_path / "one without", lambda ds, k: setting(FrameOfReferenceUID="" if k == 0 else "1.2.9")(ds, k))
    assert open_volume(tmp_path / "one without").grid.shape[2] == SLICES


def test_patients_that_share_a_series_are_not_stacked(tmp_path: Path) -> None:
    make(tmp_path, lambda ds, k: setting(PatientID=CANARY if k < 4 else CANARY + "2")(ds, k))
    assert refused(tmp_path, Code.MIXED).got == "2 of them"


def test_a_few_slices_gone_wrong_are_no_localizer(tmp_path: Path) -> None:
    def tilted(degrees: float, *kept: int) -> Callable[[Dataset, int], None]:
        row = np.cos(np.deg2rad(degrees)) * ALONG_ROW + np.sin(np.deg2rad(degrees)) * NORMAL

        def change(ds: Dataset, k: int) -> None:
            only(*kept)(ds, k)
            ds.ImageOrientationPatient = digits([*row, *DOWN_COLUMN])

        return change

    make(tmp_path / "last", only(0, 1, 2, 3, 4))
    make(tmp_path / "last", tilted(0.2, 5), name="x")
    refused(tmp_path / "last", Code.MIXED)
    make(tmp_path / "many")
    for number, degrees in enumerate((60, 70, 80, 90)):
        make(tmp_path / "many", tilted(degrees, 0), name=f"x{number}_")
    refused(tmp_path / "many", Code.MIXED)


@settings(max_examples=25, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
    shape=st.tuples(*[st.integers(2, 7)] * 3),
    seed=st.integers(0, 2**16),
)
def test_any_orientation_lies_where_highdicom_and_the_writer_say(
    tmp_path_factory: pytest.TempPathFactory,
    angles: tuple[float, float, float],
    spacing: tuple[float, float, float],
    shape: tuple[int, int, int],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    written = Volume(rng.integers(-1000, 2000, (1, *shape)), Grid(shape, affine))
    folder = tmp_path_factory.mktemp("series")
    paths = write_dicom_series(folder, written)
    volume = open_volume(folder)
    weights = np.abs(written.array[0].astype(float))
    centroid = affine[:3, :3] @ centre(weights) + affine[:3, 3]
    np.testing.assert_allclose(volume.grid.to_world(centre(np.abs(volume.array[0]))), centroid, atol=1e-3)
    oracle = highdicom.get_volume_from_series([pydicom.dcmread(p) for p in paths])
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    theirs = [  # highdicom's axes are (slice, row, column), from either end; its world is LPS
        (np.c_[np.abs(corners[:, 2] - last), corners[:, 1], corners[:, 0], np.ones(8)] @ oracle.affine.T)[:, :3]
        for last in (0, shape[2] - 1)
    ]
    ours = volume.grid.to_world(corners) * (-1, -1, 1)
    assert min(np.abs(ours - t).max() for t in theirs) < 1e-3


def centre(weights: np.ndarray) -> np.ndarray:
    index = np.indices(weights.shape).reshape(3, -1)
    return index @ weights.reshape(-1) / weights.sum()


def test_scan_tells_what_lies_in_a_tree(tmp_path: Path) -> None:
    make(tmp_path / "images")
    other = {
        "seg": (SEG, "SEG"),
        "map": ("1.2.840.10008.5.1.4.1.1.66.7", "SEG"),
        "struct": ("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"),
        "report": ("1.2.840.10008.5.1.4.1.1.88.33", "SR"),
        "dose": ("1.2.840.10008.5.1.4.1.1.481.2", "RTDOSE"),
        "directory": ("1.2.840.10008.1.3.10", ""),
    }
    for number, (name, (sop_class, modality)) in enumerate(other.items()):
        change = setting(SOPClassUID=sop_class, Modality=modality)
        make(tmp_path, lambda ds, k, c=change: (only(0)(ds, k), c(ds, k)), uid=f"9.{number}", name=name)
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "images" / "s00.dcm").read_bytes()[:300])
    (tmp_path / "text.dcm").write_text("hello")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "outside").symlink_to(Path(__file__).parent)
    (tmp_path / "loop").symlink_to(tmp_path)
    done: list[tuple[int, int]] = []
    found = files.scan(tmp_path, progress=lambda *step: done.append(step))
    assert [s.path.name for s in found.slices] == [f"s{k:02d}.dcm" for k in range(SLICES)]
    assert [p.name for p in found.annotations] == ["map00.dcm", "seg00.dcm", "struct00.dcm"]
    assert found.others == {"SR": 1, "RTDOSE": 1, "DICOMDIR": 1, "link": 2}
    assert {path.name: reason.split(":")[0] for path, reason in found.damaged} == {
        "cut.dcm": "E_TRUNCATED",
        "text.dcm": "E_NOT_DICOM",
    }
    assert done[-1] == (15, 15) and [d for d, _ in done] == list(range(1, 16))


def test_scan_keeps_no_patient_but_a_key(tmp_path: Path) -> None:
    make(tmp_path, lambda ds, k: setting(PatientID=CANARY if k else "other", StudyInstanceUID="7.8")(ds, k))
    slices = files.scan(tmp_path).slices
    assert CANARY not in repr(slices)
    assert len({s.patient_key for s in slices}) == 2 and len(slices[0].patient_key) == 32
    assert slices[1].patient_key == slices[2].patient_key
    assert {s.study_uid for s in slices} == {"7.8"} and len({s.sop_uid for s in slices}) == SLICES
    make(tmp_path / "none", lambda ds, k: delattr(ds, "PatientID"), uid="4")
    assert {s.patient_key for s in files.scan(tmp_path / "none").slices} == {""}


def test_assess_says_what_reading_would(tmp_path: Path) -> None:
    make(tmp_path / "good", only(1, 2, 3))
    make(tmp_path / "bad", only(0, 1, 3, 4), uid="4")
    for folder, code in (("good", None), ("bad", Code.GAP)):
        slices = files.scan(tmp_path / folder).slices
        assessment = assess(slices)
        assert (assessment.problem.code if assessment.problem else None) is code
        if code is None:
            assert assessment.grid is not None
            volume = open_volume(tmp_path / folder)
            assert assessment.grid.difference(volume.grid, tolerance_mm=0) is None
            assert assessment.notes == volume.notes != ()
        else:
            assert assessment.grid is None


def test_files_of_a_series_stand_in_the_order_of_its_slices(tmp_path: Path) -> None:
    paths = make(tmp_path, lambda ds, k: setting(ImagePositionPatient=digits(ORIGIN - k * STEP * NORMAL))(ds, k))
    make(tmp_path, turned, name="scout")
    assert series_files(tmp_path) == paths[::-1]
    assert series_files(find_series(tmp_path)[0]) == paths[::-1]


def test_irregular_series_are_resampled_when_asked_for(tmp_path: Path) -> None:
    make(tmp_path, only(0, 1, 3, 4, 5))
    reading = Reading(resample_irregular=True)
    volume = open_volume(tmp_path, reading)
    assert volume.grid.shape == (COLUMNS, ROWS, SLICES) and "resampled" in volume.notes[-1]
    assert read_grid(tmp_path, reading).difference(volume.grid, tolerance_mm=0) is None
    np.testing.assert_allclose(volume.grid.to_world([4, 3, 5]), expected_world(4, 3, 5), atol=1e-6)
    whole = PIXELS.transpose(2, 1, 0).astype(float)
    np.testing.assert_array_equal(volume.array[0][..., [0, 1, 3, 4, 5]], whole[..., [0, 1, 3, 4, 5]])
    np.testing.assert_allclose(volume.array[0][..., 2], (whole[..., 1] + whole[..., 3]) / 2, rtol=1e-6)
    make(tmp_path / "tilt", moved(lambda k: k * STEP * np.tan(np.deg2rad(12)) * DOWN_COLUMN), uid="4")
    tilted = open_volume(tmp_path / "tilt", reading)
    assert "12 degrees" in tilted.notes[-1] and tilted.grid.shape[2] == SLICES
