from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless, generate_uid

from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading, find_series, is_dicom, open_label, open_volume, read_grid
from medseg.volume import GRID_TOLERANCE_MM

CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
COLUMNS, ROWS, SLICES = 5, 4, 6
PIXEL_SPACING = (1.5, 0.8)  # between rows, between columns
STEP = 2.5
ORIGIN = np.array([11.0, -23.0, 37.0])
CANARY = "CanaryPatient"

rotation, _ = np.linalg.qr(np.array([[1, 0.3, -0.2], [-0.25, 1, 0.35], [0.1, -0.4, 1]]))
ALONG_ROW, DOWN_COLUMN = rotation[:, 0], rotation[:, 1]
NORMAL = np.cross(ALONG_ROW, DOWN_COLUMN)
PIXELS = np.random.default_rng(0).integers(0, 4000, (SLICES, ROWS, COLUMNS)).astype(np.uint16)


def make(
    folder: Path, change: Callable[[Dataset, int], None] | None = None, *, uid: str = "1.2.3", name: str = "s"
) -> list[Path]:
    """A series of SLICES oblique slices; `change` may alter (or, by setting `skip`, leave out) each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(SLICES):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CT
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = CT, meta.MediaStorageSOPInstanceUID
        ds.PatientName, ds.PatientID, ds.SeriesDescription = CANARY, CANARY, CANARY
        ds.SeriesInstanceUID, ds.Modality, ds.InstanceNumber = uid, "CT", k + 1
        ds.ImagePositionPatient = digits(ORIGIN + k * STEP * NORMAL)
        ds.ImageOrientationPatient = digits([*ALONG_ROW, *DOWN_COLUMN])
        ds.PixelSpacing, ds.SliceThickness = list(PIXEL_SPACING), 3.0
        ds.Rows, ds.Columns, ds.SamplesPerPixel = ROWS, COLUMNS, 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = PIXELS[k].tobytes()
        if change is not None:
            change(ds, k)
        if not getattr(ds, "skip", False):
            paths.append(folder / f"{name}{k:02d}.dcm")
            ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def digits(numbers: object) -> list[str]:
    """Decimal strings have at most 16 characters."""
    return [f"{n:.10f}"[:16] for n in np.asarray(numbers)]


def position(ds: Dataset) -> np.ndarray:
    return np.array([float(v) for v in ds.ImagePositionPatient])


def moved(offset: Callable[[int], np.ndarray]) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        ds.ImagePositionPatient = digits(position(ds) + offset(k))

    return change


def only(*kept: int) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        ds.skip = k not in kept

    return change


def setting(**tags: object) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        for tag, value in tags.items():
            setattr(ds, tag, value)

    return change


def refused(path: Path, code: Code, reading: Reading = STRICT) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        open_volume(path, reading)
    assert caught.value.code is code, caught.value
    assert CANARY not in str(caught.value)
    return caught.value


def expected_world(i: int, j: int, k: int) -> np.ndarray:
    """RAS+ mm of a voxel, written out from the standard: PixelSpacing[0] is between rows."""
    lps = ORIGIN + i * PIXEL_SPACING[1] * ALONG_ROW + j * PIXEL_SPACING[0] * DOWN_COLUMN + k * STEP * NORMAL
    return lps * (-1, -1, 1)


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
    assert "1.2.3 CT 6 slices 5 × 4" in str(error.got) and "4.5.6 MR 3 slices 5 × 4" in str(error.got)
    assert open_volume(tmp_path, Reading(series="4.5.6")).grid.shape[2] == 3
    assert open_volume(tmp_path, Reading(series="4.5.6")).modality == "MR"
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


def test_rescale_is_per_slice_and_monochrome1_is_inverted(tmp_path: Path) -> None:
    make(tmp_path / "pet", lambda ds, k: setting(RescaleSlope=k + 0.5, RescaleIntercept=-k)(ds, k))
    k = np.arange(SLICES)
    np.testing.assert_allclose(
        open_volume(tmp_path / "pet").array[0], PIXELS.transpose(2, 1, 0) * (k + 0.5) - k, rtol=1e-6
    )
    make(
        tmp_path / "inverted",
        setting(PhotometricInterpretation="MONOCHROME1", RescaleSlope=2, RescaleIntercept=-10),
    )
    inverted = open_volume(tmp_path / "inverted").array[0]
    np.testing.assert_array_equal(inverted, 2 * (4095 - PIXELS.astype(float).transpose(2, 1, 0)) - 10)


def test_rescale_that_is_no_number(tmp_path: Path) -> None:
    for path in make(tmp_path, setting(RescaleSlope="1.25", RescaleIntercept="")):
        path.write_bytes(path.read_bytes().replace(b"1.25", b"nan "))
    assert "RescaleSlope" in str(refused(tmp_path, Code.TRUNCATED).got)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"nan ", b"abc "))
    assert "RescaleSlope" in str(refused(tmp_path, Code.TRUNCATED).got)


def test_signed_values_with_junk_in_the_high_bits(tmp_path: Path) -> None:
    signed = np.random.default_rng(2).integers(-2048, 2048, (ROWS, COLUMNS))
    stored = ((signed & 0x0FFF) | 0x5000).astype(np.uint16)
    make(tmp_path, setting(PixelRepresentation=1, PixelData=stored.tobytes()))
    np.testing.assert_array_equal(open_volume(tmp_path).array[0, :, :, 0], signed.T)


def test_colour_and_multi_frame(tmp_path: Path) -> None:
    rgb = setting(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, PixelData=bytes(120),
                  BitsAllocated=8, BitsStored=8, HighBit=7)  # fmt: skip
    make(tmp_path / "rgb", rgb)
    refused(tmp_path / "rgb", Code.PHOTOMETRIC)
    make(tmp_path / "frames", lambda ds, k: (only(0)(ds, k), setting(NumberOfFrames=4, SOPClassUID=ENHANCED_MR)(ds, k)))
    refused(tmp_path / "frames", Code.UNSUPPORTED)


def test_other_objects_and_other_files_are_not_images(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, lambda ds, k: (only(0)(ds, k), setting(SOPClassUID=SEG, Modality="SEG")(ds, k)), uid="9", name="seg")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").touch()
    assert open_volume(tmp_path).grid.shape == (COLUMNS, ROWS, SLICES)
    assert len(find_series(tmp_path)) == 1


def test_nested_folders_only_below_an_empty_one(tmp_path: Path) -> None:
    make(tmp_path / "study äß 中 ;$()" / "series")
    assert open_volume(tmp_path / "study äß 中 ;$()").grid.shape[2] == SLICES
    make(tmp_path / "study äß 中 ;$()", uid="5")
    assert [info.uid for info in find_series(tmp_path / "study äß 中 ;$()")] == ["5"]


def test_nothing_to_read(tmp_path: Path) -> None:
    refused(tmp_path, Code.NOT_DICOM)
    (tmp_path / "a.dcm").write_bytes(b"\0" * 400)
    assert not is_dicom(tmp_path / "a.dcm")
    refused(tmp_path / "a.dcm", Code.NOT_DICOM)
    (tmp_path / "loop").symlink_to(tmp_path)
    refused(tmp_path, Code.NOT_DICOM)


def test_truncated_files(tmp_path: Path) -> None:
    whole = make(tmp_path)[3]
    data = whole.read_bytes()
    for keep in (140, 300, len(data) // 2, len(data) - 20, len(data) - 2):
        whole.write_bytes(data[:keep])
        refused(tmp_path, Code.TRUNCATED)


def test_absurd_sizes(tmp_path: Path) -> None:
    make(tmp_path, setting(Rows=65535, Columns=65535))
    refused(tmp_path, Code.LIMIT)
    make(tmp_path, setting(Rows=12000, Columns=12000))
    refused(tmp_path, Code.LIMIT)


def test_compressed(tmp_path: Path) -> None:
    for path in make(tmp_path):
        ds = pydicom.dcmread(path)
        ds.compress(RLELossless)
        ds.save_as(path)
    np.testing.assert_array_equal(open_volume(tmp_path).array[0], PIXELS.transpose(2, 1, 0))


def test_missing_codec_names_syntax_and_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels.decoders.base import Decoder

    for path in make(tmp_path):
        ds = pydicom.dcmread(path)
        ds.compress(RLELossless)
        ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        ds.save_as(path)
    monkeypatch.setattr(Decoder, "is_available", False)
    error = refused(tmp_path, Code.CODEC)
    assert "JPEG Lossless" in str(error.got) and "pylibjpeg" in str(error.remedy)


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


@pytest.mark.data
@pytest.mark.parametrize(
    "case",
    ["ge/anatomical", "generic/anatomical", "siemens/anatomical", "philips/anatomical", "generic/compressed_rle"],
)
def test_real_series_match_their_nifti(real_data: Path, case: str) -> None:
    folder = real_data / "dicom" / "series" / "dicom2nifti_cases" / case
    volume, expected = open_volume(folder / "001"), nib.load(folder / "001_ground_truth.nii.gz")
    voxels = np.stack(np.indices(expected.shape), axis=-1).reshape(-1, 3)
    world = voxels @ expected.affine[:3, :3].T + expected.affine[:3, 3]
    index = np.rint(volume.grid.to_index(world)).astype(int)
    assert np.linalg.norm(volume.grid.to_world(index) - world, axis=1).max() <= 1e-3 < GRID_TOLERANCE_MM
    np.testing.assert_array_equal(volume.array[0][tuple(index.T)], np.asanyarray(expected.dataobj).reshape(-1))


@pytest.mark.data
@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("dicom2nifti_cases/failing/gantrytilting/001", Code.TILT),
        ("dicom2nifti_cases/failing/notavolume/001", Code.DUPLICATE),
        ("dicom2nifti_cases/failing/sliceincrement/001", Code.GAP),
        ("dicom2nifti_cases/failing/sliceincrement/002", Code.GAP),
        ("dicom2nifti_cases/failing/sliceorientation/001", Code.MIXED),
        ("dicom2nifti_cases/generic/rgb/001", Code.PHOTOMETRIC),
        ("dicom2nifti_cases/philips_enhanced/anatomical/001", Code.UNSUPPORTED),
        ("dcm_qa_ct/GE", Code.SPACING),
        ("dcm_qa_enh/In/Siemens/XA10", Code.UNSUPPORTED),
    ],
)
def test_real_series_that_are_refused(real_data: Path, case: str, code: Code) -> None:
    refused(real_data / "dicom" / "series" / case, code)


@pytest.mark.data
def test_real_crops_are_read(real_data: Path) -> None:
    for study, shape in (("Study1", (35, 51, 32)), ("Study2", (36, 48, 35))):
        volume = open_volume(real_data / "dicom" / "series" / "hippocrop_dicom" / study)
        assert volume.grid.shape == shape and volume.modality == "MR"
        np.testing.assert_allclose(volume.grid.spacing_mm, 1)
