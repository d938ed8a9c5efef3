"""Reading RT structure sets: contours to masks."""

from __future__ import annotations

import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from rtstruct_phantom import GRID, ORDERS, oblique_grid, read, square, turned, write_contours

from medseg.errors import Code, MedsegError
from medseg.formats import read_grid
from medseg.formats.dicom import annotations, rtstruct
from medseg.formats.dicom.structures import Annotation
from medseg.phantom import write_dicom_series
from medseg.volume import Volume


def test_contours_on_a_slice_are_combined_by_exclusive_or(tmp_path: Path) -> None:
    """A hole, an island in it, and a second island beside."""
    contours = [
        square(GRID, 4, 0.5, 8.5),
        square(GRID, 4, 2.5, 6.5),
        square(GRID, 4, 3.5, 5.5),
        square(GRID, 4, 8.6, 9.5),
    ]
    mask = read(write_contours(tmp_path / "rs.dcm", contours), GRID)[7]
    expected = np.zeros(GRID.shape, dtype=bool)
    for low, high in ((1, 9), (3, 7), (4, 6), (9, 10)):
        expected[low:high, low:high, 4] ^= True
    np.testing.assert_array_equal(mask, expected)


def test_copies_of_a_contour_count_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By exclusive or, a slice that was written twice would be empty, and a hole that was written twice filled."""
    outer, hole = square(GRID, 4, 0.5, 8.5), square(GRID, 4, 2.5, 6.5)
    once = read(write_contours(tmp_path / "once.dcm", [outer, hole, square(GRID, 5)]), GRID)[7]
    assert not caplog.text
    twice = read(write_contours(tmp_path / "twice.dcm", [outer, hole, outer, hole, square(GRID, 5)]), GRID)[7]
    np.testing.assert_array_equal(twice, once)
    assert once[1, 1, 4] and not once[4, 4, 4]
    assert "GTV-1: 2 contours are copies of others" in caplog.text


def test_the_log_names_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run keeps its log, and exports are named after patients."""
    contours = ["1\\2\\3", *planes(1.3, 3.3, 5.3), square(GRID, 7.3, -5.5, 2.5), square(GRID, 7.3, -5.5, 2.5)]
    kinds = ["POINT", *["CLOSED_PLANAR"] * 5]
    read(write_contours(tmp_path / "MILLER_JOHN.dcm", contours, kinds=kinds), GRID)
    for words in ("left out", "copies", "cut off", "beside the slices", "stay empty"):
        assert words in caplog.text
    assert "MILLER" not in caplog.text
    assert "RTSTRUCT_" in caplog.text


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_every_uncompressed_syntax_reads_the_same(tmp_path: Path, syntax: str) -> None:
    path = write_contours(tmp_path / "rs.dcm", [square(GRID, 2)], syntax=syntax)
    annotation = annotations.read_annotation(path)
    assert [(s.number, s.name) for s in annotation.structures] == [(7, "GTV-1")]
    (mask,) = read(path, GRID).values()
    assert mask.sum() == mask[3:7, 3:7, 2].sum() == 16


@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_grid_with_its_axes_in_any_order(tmp_path: Path, order: tuple[int, ...], kind: str) -> None:
    path = write_contours(tmp_path / "rs.dcm", [square(GRID, 2), square(GRID, 3)], kinds=[kind] * 2)
    expected = np.zeros(GRID.shape, dtype=bool)
    expected[3:7, 3:7, 2:4] = True
    label = turned(Volume(expected, GRID), order, (True, False, True))
    np.testing.assert_array_equal(read(path, label.grid)[7], label.array)


def test_contours_through_centres_do_not_hang_on_rounding(tmp_path: Path) -> None:
    """The half-open rule decides, with six digits in the file and another order of operations in the grid."""
    for seed in range(20):
        grid = oblique_grid((12, 11, 5), seed)
        mask = read(write_contours(tmp_path / "rs.dcm", [square(grid, 1, 2, 6)]), grid)[7]
        assert mask.sum() == mask[2:6, 2:6, 1].sum() == 16


@pytest.mark.parametrize("kind", ["POINT", "OPEN_PLANAR", "OPEN_NONPLANAR"])
def test_what_encloses_nothing_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    path = write_contours(tmp_path / "rs.dcm", ["1\\2\\3", square(GRID, 2)], kinds=[kind, "CLOSED_PLANAR"])
    assert read(path, GRID)[7].sum() == 16
    assert "GTV-1" in caplog.text
    assert kind in caplog.text
    assert "SECRET" not in caplog.text


def test_a_region_without_contours_is_empty(tmp_path: Path) -> None:
    assert not read(write_contours(tmp_path / "a.dcm", []), GRID)[7].any()

    def forget(dataset: Dataset) -> None:
        dataset.ROIContourSequence = []

    assert not read(write_contours(tmp_path / "b.dcm", [], edit=forget), GRID)[7].any()


@pytest.mark.parametrize(
    "text",
    ["1\\2\\3\\4\\5\\6", "1\\2\\3\\4\\5\\6\\7\\8\\9\\10", "1\\2\\3\\4\\5\\6\\7\\8\\x", "1\\2\\3\\4\\\\6\\7\\8\\9", "",
     "1\\2\\3\\4\\5\\6\\7\\8\\nan", "1\\2\\3\\4\\5\\6\\7\\8\\inf"],
)  # fmt: skip
def test_contours_that_are_no_polygons_are_malformed(tmp_path: Path, text: str) -> None:
    with pytest.raises(MedsegError, match="E_MALFORMED") as caught:
        read(write_contours(tmp_path / "rs.dcm", [square(GRID, 2), text]), GRID)
    assert "GTV-1" in str(caught.value.where)


def test_edges_are_cut_off_and_what_lies_outside_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mask = read(write_contours(tmp_path / "rs.dcm", [square(GRID, 8, -5.5, 2.5)]), GRID)[7]
    assert mask.sum() == mask[:3, :3, 8].sum() == 9
    assert "cut off" in caplog.text
    for contour in (square(GRID, 4, 20, 25), square(GRID, 4, -9, -3), square(GRID, 9), square(GRID, -3)):
        with pytest.raises(MedsegError, match="E_GRID") as caught:
            read(write_contours(tmp_path / "rs.dcm", [contour]), GRID)
        assert "mm" in str(caught.value.got)


def planes(*heights: float) -> list[NDArray[np.float64]]:
    return [square(GRID, height) for height in heights]


@pytest.mark.parametrize(
    ("contours", "reason"),
    [
        (planes(0, 5 / 3, 10 / 3, 5), "beside"),  # 5 mm where the image has 3
        (planes(0, 1 / 3, 2 / 3, 1, 4 / 3), "beside"),  # 1 mm
        (planes(2, 2.1), "on one slice"),
        (planes(1.5, 2.5, 3.5), "between"),
    ],
)
def test_planes_of_another_image_are_refused(tmp_path: Path, contours: list[NDArray[np.float64]], reason: str) -> None:
    with pytest.raises(MedsegError, match="E_GRID") as caught:
        read(write_contours(tmp_path / "rs.dcm", contours), GRID)
    assert reason in str(caught.value.got)
    assert "mm" in str(caught.value.got)


def test_contours_across_the_slices_are_refused(tmp_path: Path) -> None:
    slanted = square(GRID, 4)
    slanted[0] += 2 * (square(GRID, 5) - square(GRID, 4))[0]
    with pytest.raises(MedsegError, match="E_GRID") as caught:
        read(write_contours(tmp_path / "rs.dcm", [slanted]), GRID)
    assert "mm off their plane" in str(caught.value.got)


def test_planes_a_little_off_belong_to_the_nearest_slice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mask = read(write_contours(tmp_path / "rs.dcm", planes(1.3, 2.3, 3.3)), GRID)[7]
    assert mask.any(axis=(0, 1)).nonzero()[0].tolist() == [1, 2, 3]
    assert "beside the slices" in caplog.text


def test_slices_between_contours_stay_empty_and_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mask = read(write_contours(tmp_path / "rs.dcm", planes(1, 3, 5)), GRID)[7]
    assert mask.any(axis=(0, 1)).nonzero()[0].tolist() == [1, 3, 5]
    assert "stay empty" in caplog.text


def test_a_region_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = write_contours(tmp_path / "rs.dcm", [square(GRID, 2)])
    with pytest.raises(MedsegError, match="E_LABEL"):
        read(path, GRID, [8])


@pytest.mark.parametrize("depth", [300, 5000])
@pytest.mark.parametrize("keyword", ["StructureSetROISequence", "ROIContourSequence"])
def test_sequences_without_end_are_malformed(tmp_path: Path, keyword: str, depth: int) -> None:
    """Nested by hand, with undefined lengths: pydicom could not write it."""
    path = write_contours(tmp_path / "rs.dcm", [square(GRID, 2)])
    content = path.read_bytes()
    tag, unknown = tag_for_keyword(keyword) or 0, b"\xff\xff\xff\xff"
    name = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little")
    path.write_bytes(content[: content.index(name)] + (name + unknown + b"\xfe\xff\x00\xe0" + unknown) * depth)
    with pytest.raises(MedsegError, match="E_MALFORMED"):
        rtstruct.read_annotation(path)


def test_several_frames_of_reference_are_refused(tmp_path: Path) -> None:
    def add(dataset: Dataset) -> None:
        roi = Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = 8, "elsewhere", "1.2.4"
        dataset.StructureSetROISequence.append(roi)

    with pytest.raises(MedsegError, match="E_REFERENCE"):
        rtstruct.read_annotation(write_contours(tmp_path / "rs.dcm", [], edit=add))


def test_numbers_that_are_missing_or_there_twice_are_malformed(tmp_path: Path) -> None:
    def repeat(dataset: Dataset) -> None:
        dataset.StructureSetROISequence.append(dataset.StructureSetROISequence[0])

    def forget(dataset: Dataset) -> None:
        del dataset.StructureSetROISequence[0].ROINumber

    for edit in (repeat, forget):
        with pytest.raises(MedsegError, match="E_MALFORMED"):
            rtstruct.read_annotation(write_contours(tmp_path / "rs.dcm", [], edit=edit))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_file_cut_anywhere_is_refused_and_never_read_as_less(tmp_path: Path, syntax: str) -> None:
    whole = write_contours(tmp_path / "rs.dcm", [square(GRID, 2), square(GRID, 3)], syntax=syntax)
    content = whole.read_bytes()
    cut = tmp_path / "cut.dcm"
    for length in range(132, len(content) - 1, 7):
        cut.write_bytes(content[:length])
        try:
            masks = read(cut, GRID)
        except MedsegError as error:
            assert error.code in (Code.TRUNCATED, Code.MALFORMED, Code.NOT_DICOM)
        else:
            assert masks[7].sum() == 32, length


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1))
def test_only_refusals_come_out_of_damaged_files(tmp_path: Path, seed: int) -> None:
    whole = tmp_path / "rs.dcm"
    if not whole.exists():
        write_contours(whole, [square(GRID, 2), square(GRID, 3)])
    rng = np.random.default_rng(seed)
    content = bytearray(whole.read_bytes())
    for place in rng.integers(132, len(content), rng.integers(1, 6)):
        content[place] = rng.integers(256)
    damaged = tmp_path / "damaged.dcm"
    damaged.write_bytes(content)
    with warnings.catch_warnings(action="ignore"):
        try:
            read(damaged, GRID)
        except MedsegError as error:
            assert "SECRET" not in str(error)
        rtstruct.is_mine(damaged)


def test_other_files_are_not_mine(tmp_path: Path) -> None:
    (image, *_) = write_dicom_series(tmp_path / "scan", Volume(np.zeros(GRID.shape, dtype=np.int16), GRID))
    (tmp_path / "text").write_text("RTSTRUCT")
    assert not rtstruct.is_mine(image)
    assert not rtstruct.is_mine(tmp_path / "text")
    assert not rtstruct.is_mine(tmp_path / "nothing")
    assert rtstruct.is_mine(write_contours(tmp_path / "rs.dcm", []))


@pytest.mark.data
@pytest.mark.parametrize("modality", ["CT", "MR_T1", "PET"])
@pytest.mark.parametrize("patient", ["STS_002", "STS_008"])
def test_soft_tissue_sarcomas_against_the_masks_of_others(real_data: Path, patient: str, modality: str) -> None:
    """Masks by MIRP, which counts centres on the outline in: of the coarse PET of STS_002 ten lie there."""
    folder = real_data / "dicom/rtstruct/sts"
    grid = read_grid(folder / "dicom" / patient / modality / "image")
    (mask,) = read(folder / "dicom" / patient / modality / "mask/RS.dcm", grid).values()
    reference = nib.load(folder / "nifti" / patient / f"{modality}_mask.nii.gz")
    np.testing.assert_allclose(grid.affine, reference.affine, rtol=0, atol=1e-3)
    expected = np.asarray(reference.dataobj) > 0
    dice = 2 * (mask & expected).sum() / (mask.sum() + expected.sum())
    assert dice >= (0.99 if (patient, modality) == ("STS_002", "PET") else 1.0)


@pytest.mark.data
def test_a_lung_phantom(real_data: Path) -> None:
    folder = real_data / "dicom/rtstruct/phantom/pat_2"
    annotation = rtstruct.read_annotation(folder / "DCM_RS_00041.dcm")
    assert [(s.number, s.name, s.color) for s in annotation.structures] == [(1, "GTV-1", (0, 230, 0))]
    assert len(annotation.images) == 41
    ((_, mask),) = rtstruct.masks(annotation, read_grid(folder))
    assert mask.any(axis=(0, 1)).sum() == 7
    assert mask.sum() == 2256


@pytest.mark.data
def test_references_that_lead_nowhere(real_data: Path) -> None:
    folder = real_data / "dicom/rtstruct/rtutils"
    found: dict[str, Annotation] = {p.name: rtstruct.read_annotation(p) for p in sorted(folder.glob("*rt.dcm"))}
    assert {name: (len(a.structures), len(a.series), len(a.images)) for name, a in found.items()} == {
        "invalid_reference_rt.dcm": (4, 1, 5),
        "non_existent_reference_rt.dcm": (4, 0, 3),
        "rt.dcm": (1, 1, 2),
    }
    grid = read_grid(folder)
    for name, annotation in found.items():
        if name == "rt.dcm":
            assert next(rtstruct.masks(annotation, grid))[1].any()
        else:
            with pytest.raises(MedsegError, match="E_GRID"):  # drawn on slices that are not here
                next(rtstruct.masks(annotation, grid))
