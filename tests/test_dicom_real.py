"""Real series against the NIfTI files that others made of them: the same values at the same places."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_images import refused

from medseg.errors import Code
from medseg.formats import Reading, find_series, open_volume
from medseg.formats.dicom import files
from medseg.formats.dicom.series import assess
from medseg.volume import GRID_TOLERANCE_MM, Volume

pytestmark = pytest.mark.data
CASES = Path("dicom", "series", "dicom2nifti_cases")


def differences(volume: Volume, expected: nib.Nifti1Image, channel: int = 0, time: int = 0) -> tuple[float, float]:
    """Largest distance of a NIfTI voxel to ours nearest to it (mm), and largest difference of their values."""
    values = np.asanyarray(expected.dataobj)
    if values.dtype.names:
        values = values["RGB"[channel]]
    shape = expected.shape[:3]
    assert sorted(shape) == sorted(volume.grid.shape)
    world = nib.affines.apply_affine(expected.affine, np.stack(np.indices(shape), axis=-1).reshape(-1, 3))
    index = np.rint(volume.grid.to_index(world)).astype(int)
    assert len(np.unique(index, axis=0)) == len(index)
    distance = np.linalg.norm(volume.grid.to_world(index) - world, axis=1).max()
    theirs = values.reshape(len(index), -1)[:, time].astype(np.float64)
    return float(distance), float(np.abs(volume.array[channel][tuple(index.T)] - theirs).max())


@pytest.mark.parametrize(
    "case",
    [
        "ge/anatomical",
        "siemens/anatomical",
        "philips/anatomical",
        "generic/anatomical",
        "generic/compressed",
        "generic/compressed_rle",
        "generic/compressed_j2k",
        "generic/compressed_jpegls",
        "generic/compressed_jpeg",
        "failing/slicecount",
        "philips_enhanced/anatomical",
    ],
)
def test_series_match_their_nifti(real_data: Path, case: str) -> None:
    if case == "generic/compressed_jpeg":
        pytest.importorskip("gdcm")  # JPEG Lossless
    folder = real_data / CASES / case
    volume = open_volume(folder / "001")
    distance, difference = differences(volume, nib.load(folder / "001_ground_truth.nii.gz"))
    assert distance <= 1e-3 < GRID_TOLERANCE_MM
    assert difference <= 1e-6 * volume.array.max()
    assert any("only two slices" in note for note in volume.notes) == (case == "failing/slicecount")
    assert assess(files.scan(folder / "001").slices).grid.difference(volume.grid, 0) is None  # type: ignore[union-attr]


def test_colours_match_their_nifti(real_data: Path) -> None:
    folder = real_data / CASES / "generic" / "rgb"
    refused(folder / "001", Code.PHOTOMETRIC)
    volume = open_volume(folder / "001", Reading(channels=True))
    for channel in range(3):
        distance, difference = differences(volume, nib.load(folder / "001_ground_truth.nii.gz"), channel)
        assert distance <= 1e-3 and difference == 0


@pytest.mark.parametrize(
    ("case", "code"),
    [
        (CASES / "failing" / "gantrytilting" / "001", Code.TILT),
        (CASES / "failing" / "notavolume" / "001", Code.DUPLICATE),
        (CASES / "failing" / "sliceincrement" / "001", Code.GAP),
        (CASES / "failing" / "sliceincrement" / "002", Code.GAP),
        (CASES / "failing" / "sliceorientation" / "001", Code.MIXED),
        ("dicom/series/dcm_qa_ct/GE", Code.SPACING),
        ("dicom/series/hippocrop_dicom", Code.MULTI_SERIES),
        ("dicom/seg/dcmqi/liver.dcm", Code.UNSUPPORTED),
    ],
)
def test_series_that_are_refused(real_data: Path, case: Path | str, code: Code) -> None:
    refused(real_data / case, code)


def test_tilted_and_uneven_slices_are_resampled_when_asked_for(real_data: Path) -> None:
    volume = open_volume(real_data / "dicom/series/dcm_qa_ct/GE", Reading(resample_irregular=True))
    assert "18.5 degrees" in volume.notes[-1]
    assert volume.array.min() >= -1024  # padding of -1500 is air, and nothing overshoots


def test_volumes_of_a_time_series_are_read_one_by_one(real_data: Path) -> None:
    folder = real_data / "dicom/series/dcm_qa_enh"
    error = refused(folder / "In", Code.FOUR_D)
    assert error.got == "TemporalPositionIndex: 1, 2, 3, 4" and error.remedy == "read one of its files by itself"
    (reference,) = (nib.load(path) for path in (folder / "Ref").glob("*.nii"))
    for time, path in enumerate(sorted((folder / "In").rglob("*.dcm"))):
        distance, difference = differences(open_volume(path), reference, time=time)
        assert distance <= 1e-3 and difference == 0


def test_crops_are_read(real_data: Path) -> None:
    for study, shape in (("Study1", (35, 51, 32)), ("Study2", (36, 48, 35))):
        volume = open_volume(real_data / "dicom" / "series" / "hippocrop_dicom" / study)
        assert volume.grid.shape == shape and volume.modality == "MR"
        np.testing.assert_allclose(volume.grid.spacing_mm, 1)


@pytest.mark.parametrize("patient", ["STS_002", "STS_008"])
@pytest.mark.parametrize(("modality", "code"), [("CT", "CT"), ("MR_T1", "MR"), ("PET", "PT")])
def test_images_of_radiotherapy_match_their_nifti(real_data: Path, patient: str, modality: str, code: str) -> None:
    root = real_data / "dicom" / "rtstruct" / "sts"
    (info,) = find_series(root / "dicom" / patient / modality)
    volume = open_volume(info)
    distance, difference = differences(volume, nib.load(root / "nifti" / patient / f"{modality}_image.nii.gz"))
    assert distance <= 1e-3 and difference <= 1e-6 * volume.array.max() and volume.modality == code


def test_multi_frame_equals_single_frames(real_data: Path) -> None:
    for case in ("23x38x3", "24x38x3"):
        folder = real_data / "dicom" / "seg" / "dcmqi" / case
        single, multi = open_volume(folder / "image"), open_volume(folder / "multiframe")
        assert single.grid.difference(multi.grid, tolerance_mm=1e-3) is None
        np.testing.assert_array_equal(single.array, multi.array)


def test_x_ray_is_a_picture(real_data: Path) -> None:
    volume = open_volume(real_data / "dicom" / "seg" / "highdicom" / "dx_image.dcm")
    assert volume.grid.is_picture and volume.array.shape == (1, *volume.grid.shape)


def test_the_whole_tree_is_scanned(real_data: Path) -> None:
    found = files.scan(real_data / "dicom")
    assert len(found.slices) > 480 and len(found.annotations) > 20 and found.others["SR"] == 2
    assert found.damaged == []
