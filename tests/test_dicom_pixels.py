from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_images import COLUMNS, PIXELS, ROWS, SLICES, make, only, refused, setting
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from medseg.errors import Code
from medseg.formats import Reading, find_series, open_label, open_volume, read_grid
from medseg.formats.dicom import files
from medseg.formats.dicom.series import assess
from medseg.volume import PIXEL_FRAME, PLANE_FRAME

INDEX_ORDER = (2, 1, 0)
"""(slice, row, column) → (i, j, k)."""


def test_rescale_is_per_slice_and_monochrome1_is_inverted(tmp_path: Path) -> None:
    make(tmp_path / "pet", lambda ds, k: setting(RescaleSlope=k + 0.5, RescaleIntercept=-k)(ds, k))
    k = np.arange(SLICES)
    np.testing.assert_allclose(
        open_volume(tmp_path / "pet").array[0], PIXELS.transpose(INDEX_ORDER) * (k + 0.5) - k, rtol=1e-6
    )
    make(
        tmp_path / "inverted",
        setting(PhotometricInterpretation="MONOCHROME1", RescaleSlope=2, RescaleIntercept=-10),
    )
    inverted = open_volume(tmp_path / "inverted").array[0]
    np.testing.assert_array_equal(inverted, 2 * (4095 - PIXELS.astype(float).transpose(INDEX_ORDER)) - 10)


def test_rescale_that_is_no_number(tmp_path: Path) -> None:
    for path in make(tmp_path, setting(RescaleSlope="1.25", RescaleIntercept="")):
        path.write_bytes(path.read_bytes().replace(b"1.25", b"nan "))
    assert "RescaleSlope" in str(refused(tmp_path, Code.TRUNCATED).got)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"nan ", b"abc "))
    assert "RescaleSlope" in str(refused(tmp_path, Code.TRUNCATED).got)


@settings(max_examples=40, deadline=None)
@given(
    allocated=st.sampled_from([8, 16, 32]),
    data=st.data(),
    signed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_only_the_bits_that_count_are_read(
    tmp_path_factory: pytest.TempPathFactory, allocated: int, data: st.DataObject, signed: bool, seed: int
) -> None:
    stored = data.draw(st.integers(2, min(allocated, 20)))
    high = data.draw(st.integers(stored - 1, allocated - 1))
    rng = np.random.default_rng(seed)
    low = -(2 ** (stored - 1)) if signed else 0
    values = rng.integers(low, low + 2**stored, (ROWS, COLUMNS))
    junk = rng.integers(0, 2**allocated, (ROWS, COLUMNS), dtype=np.uint64)
    mask = np.uint64((2**stored - 1) << (high + 1 - stored))
    words = (junk & ~mask) | ((values.astype(np.uint64) << np.uint64(high + 1 - stored)) & mask)
    pixels = words.astype(f"<u{allocated // 8}").tobytes()
    change = setting(BitsAllocated=allocated, BitsStored=stored, HighBit=high, PixelRepresentation=int(signed))
    folder = tmp_path_factory.mktemp("bits")
    make(folder, lambda ds, k: (only(0)(ds, k), change(ds, k), setting(PixelData=pixels)(ds, k)))
    np.testing.assert_array_equal(open_volume(folder).array[0, :, :, 0], values.T)


@pytest.mark.parametrize("bits", [(16, 17, 16), (16, 12, 10), (12, 12, 11), (1, 1, 0)])
def test_bits_that_make_no_sense(tmp_path: Path, bits: tuple[int, int, int]) -> None:
    make(tmp_path, setting(BitsAllocated=bits[0], BitsStored=bits[1], HighBit=bits[2]))
    assert "BitsStored" in str(refused(tmp_path, Code.MALFORMED).got)


def test_big_endian_reads_equal(tmp_path: Path) -> None:
    def big(ds: Dataset, k: int) -> None:
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        ds.set_original_encoding(False, False)
        ds.PixelData = PIXELS[k].astype(">u2").tobytes()
        ds["PixelData"].VR = "OW"

    def big_bytes(ds: Dataset, k: int) -> None:
        big(ds, k)
        setting(BitsAllocated=8, BitsStored=8, HighBit=7)(ds, k)
        ds.PixelData = (PIXELS[k] % 251).astype(np.uint8).reshape(-1).view(np.uint16).byteswap().tobytes()

    make(tmp_path / "a", big)
    np.testing.assert_array_equal(open_volume(tmp_path / "a").array[0], PIXELS.transpose(INDEX_ORDER))
    make(tmp_path / "b", big_bytes)
    np.testing.assert_array_equal(open_volume(tmp_path / "b").array[0], PIXELS.transpose(INDEX_ORDER) % 251)


def test_implicit_and_values_beyond_float32(tmp_path: Path) -> None:
    make(tmp_path / "a", lambda ds, k: setattr(ds.file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian))
    np.testing.assert_array_equal(open_volume(tmp_path / "a").array[0], PIXELS.transpose(INDEX_ORDER))
    make(tmp_path / "b", setting(RescaleSlope="0.1234567", RescaleIntercept="-1000.7"))
    exact = PIXELS.transpose(INDEX_ORDER).astype(np.float64) * 0.1234567 - 1000.7
    np.testing.assert_array_equal(open_volume(tmp_path / "b").array[0], exact.astype(np.float32))


def test_modality_lut(tmp_path: Path) -> None:
    table = np.random.default_rng(3).integers(0, 60000, 4096).astype(np.uint16)

    def change(ds: Dataset, k: int) -> None:
        item = Dataset()
        item.LUTDescriptor, item.ModalityLUTType, item.LUTData = [4096, 0, 16], "US", table.tobytes()
        item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
        ds.ModalityLUTSequence = [item]

    make(tmp_path / "plain", change)
    np.testing.assert_array_equal(open_volume(tmp_path / "plain").array[0], table[PIXELS.transpose(INDEX_ORDER)])

    make(tmp_path / "inverted", lambda ds, k: (change(ds, k), setting(PhotometricInterpretation="MONOCHROME1")(ds, k)))
    inverted = table[4095 - PIXELS.transpose(INDEX_ORDER)]
    np.testing.assert_array_equal(open_volume(tmp_path / "inverted").array[0], inverted)


RAMPS = (np.arange(24)[:, None] * 30 + np.arange(32) * 70 + np.arange(SLICES)[:, None, None] * 11).astype(np.uint16)
"""(slice, row, column): smooth, as codecs want it."""


def compressed(folder: Path, syntax: str, **options: object) -> None:
    for path in make(folder, lambda ds, k: setting(Rows=24, Columns=32, PixelData=RAMPS[k].tobytes())(ds, k)):
        ds = pydicom.dcmread(path)
        ds.compress(syntax, **options)
        ds.save_as(path)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_compressed_without_loss_reads_equal(tmp_path: Path, syntax: str) -> None:
    compressed(tmp_path, syntax)
    volume = open_volume(tmp_path)
    np.testing.assert_array_equal(volume.array[0], RAMPS.transpose(INDEX_ORDER))
    assert volume.notes == ()


def test_lossy_compression_is_noted(tmp_path: Path) -> None:
    compressed(tmp_path / "a", JPEGLSNearLossless, jls_error=3)
    volume = open_volume(tmp_path / "a")
    assert np.abs(volume.array[0] - RAMPS.transpose(INDEX_ORDER)).max() <= 3
    assert volume.notes == ("lossy compression: JPEG-LS Lossy (Near-Lossless) Image Compression",)
    make(tmp_path / "b", setting(LossyImageCompression="01"))
    assert open_volume(tmp_path / "b").notes == ("lossy compression",)
    assert assess(files.scan(tmp_path / "b").slices).notes == ("lossy compression",)


@pytest.mark.parametrize(
    ("syntax", "name", "package"),
    [
        (JPEGLosslessSV1, "JPEG Lossless", "'medseg[codecs]'"),
        (JPEGExtended12Bit, "JPEG Extended", "'medseg[codecs]'"),
        (JPEG2000Lossless, "JPEG 2000", "'medseg[codecs]'"),
        (JPEGLSLossless, "JPEG-LS", "pyjpegls"),
        (HTJ2K, "High-Throughput JPEG 2000", "pylibjpeg pylibjpeg-openjpeg"),
    ],
)
def test_missing_codec_names_syntax_and_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: str, name: str, package: str
) -> None:
    for path in make(tmp_path):
        ds = pydicom.dcmread(path)
        ds.compress(RLELossless)
        ds.file_meta.TransferSyntaxUID = syntax
        ds.save_as(path)
    kept = {p: f for p, f in get_decoder(syntax)._available.items() if p == "pillow" and syntax == JPEGExtended12Bit}
    monkeypatch.setattr(get_decoder(syntax), "_available", kept)  # Pillow decodes 8 bits of extended JPEG, not 12
    error = refused(tmp_path, Code.CODEC)
    assert name in str(error.got) and str(syntax) in str(error.got)
    assert error.remedy == f"pip install {package}"
    problem = assess(files.scan(tmp_path).slices).problem
    assert problem is not None and problem.code is Code.CODEC


def coloured(ds: Dataset, k: int) -> None:
    setting(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=k % 2)(ds, k)
    setting(BitsAllocated=8, BitsStored=8, HighBit=7)(ds, k)
    colours = COLOURS[k] if k % 2 == 0 else np.moveaxis(COLOURS[k], -1, 0)
    ds.PixelData = np.ascontiguousarray(colours).tobytes()


COLOURS = np.random.default_rng(5).integers(0, 256, (SLICES, ROWS, COLUMNS, 3)).astype(np.uint8)


def test_colours_are_channels_where_asked_for(tmp_path: Path) -> None:
    make(tmp_path / "a", coloured)
    refused(tmp_path / "a", Code.PHOTOMETRIC)
    assert assess(files.scan(tmp_path / "a").slices).problem.code is Code.PHOTOMETRIC  # type: ignore[union-attr]
    volume = open_volume(tmp_path / "a", Reading(channels=True))
    assert volume.array.shape == (3, COLUMNS, ROWS, SLICES)
    np.testing.assert_array_equal(volume.array, COLOURS.transpose(3, 2, 1, 0))
    make(tmp_path / "b", lambda ds, k: coloured(ds, k) if k == 2 else None)
    refused(tmp_path / "b", Code.MIXED, Reading(channels=True))


def test_palettes_are_colours(tmp_path: Path) -> None:
    table = np.random.default_rng(6).integers(0, 256, (3, 256)).astype(np.uint8)
    indices = (PIXELS % 256).astype(np.uint8)

    def change(ds: Dataset, k: int) -> None:
        setting(PhotometricInterpretation="PALETTE COLOR", BitsAllocated=8, BitsStored=8, HighBit=7)(ds, k)
        for name, values in zip(("Red", "Green", "Blue"), table, strict=True):
            setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 8])
            setattr(ds, f"{name}PaletteColorLookupTableData", values.tobytes())
            ds[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        ds.PixelData = indices[k].tobytes()

    make(tmp_path, change)
    refused(tmp_path, Code.PHOTOMETRIC)
    volume = open_volume(tmp_path, Reading(channels=True))
    np.testing.assert_array_equal(volume.array, table[:, indices].transpose(0, 3, 2, 1))


def padded(**tags: object) -> Callable[[Dataset, int], None]:
    """Two pixels of the first slice hold -2000."""

    def change(ds: Dataset, k: int) -> None:
        values = PIXELS[k].astype(np.int16) - 1000
        if k == 0:
            values[0, 1] = values[2, 3] = -2000
        setting(PixelRepresentation=1, BitsStored=16, HighBit=15, PixelData=values.tobytes())(ds, k)
        setting(RescaleSlope=1, RescaleIntercept=-24, RescaleType="HU", **tags)(ds, k)

    return change


def test_padding_becomes_air_in_ct(tmp_path: Path) -> None:
    make(tmp_path / "a", padded(PixelPaddingValue=-2000))
    volume = open_volume(tmp_path / "a")
    expected = PIXELS.transpose(INDEX_ORDER).astype(float) - 1024
    expected[1, 0, 0] = expected[3, 2, 0] = -1024
    np.testing.assert_array_equal(volume.array[0], expected)
    assert len(volume.notes) == 1 and "PixelPaddingValue" in volume.notes[0]
    make(tmp_path / "b", padded(PixelPaddingValue=-1990, PixelPaddingRangeLimit=-2010))
    np.testing.assert_array_equal(open_volume(tmp_path / "b").array[0], expected)
    make(tmp_path / "c", padded(PixelPaddingValue=-1999))
    assert open_volume(tmp_path / "c").array.min() == -2024 and open_volume(tmp_path / "c").notes == ()


def test_padding_of_other_modalities_and_units_keeps_its_value(tmp_path: Path) -> None:
    for name, tags in (("a", {"Modality": "MR"}), ("b", {"RescaleType": "US"})):
        change = padded(PixelPaddingValue=-2000)
        make(tmp_path / name, lambda ds, k, c=change, t=tags: (c(ds, k), setting(**t)(ds, k)))
        volume = open_volume(tmp_path / name)
        assert volume.array.min() == -2024 and volume.notes == ()


def test_padding_outside_the_stored_bits(tmp_path: Path) -> None:
    def change(ds: Dataset, k: int) -> None:
        values = PIXELS[k].copy()
        values[1, 1] = 63536  # -2000 in 16 bits, of which 12 are stored
        setting(PixelPaddingValue=63536, PixelData=values.tobytes(), RescaleSlope=1, RescaleIntercept=-1024)(ds, k)

    make(tmp_path, change)
    assert (open_volume(tmp_path).array[0, 1, 1] == -1024).all()


def x_ray(**tags: object) -> Callable[[Dataset, int], None]:
    def change(ds: Dataset, k: int) -> None:
        only(0)(ds, k)
        for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
            delattr(ds, tag)
        setting(SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1", Modality="DX", **tags)(ds, k)

    return change


@pytest.mark.parametrize(
    ("tags", "spacing", "frame"),
    [
        ({"ImagerPixelSpacing": [0.2, 0.3]}, (0.2, 0.3), PLANE_FRAME),
        ({"ImagerPixelSpacing": [0.2, 0.3], "PixelSpacing": [0.1, 0.15]}, (0.1, 0.15), PLANE_FRAME),
        ({}, (1, 1), PIXEL_FRAME),
    ],
)
def test_an_image_without_a_position_is_a_picture(
    tmp_path: Path, tags: dict[str, object], spacing: tuple[float, float], frame: str
) -> None:
    (path,) = make(tmp_path, x_ray(**tags))
    for source in (path, tmp_path, find_series(tmp_path)[0]):
        volume = open_volume(source)
        np.testing.assert_array_equal(volume.array, PIXELS[:1])
        assert volume.grid.shape == (ROWS, COLUMNS) and volume.grid.is_picture and volume.grid.frame == frame
        np.testing.assert_allclose(volume.grid.spacing_mm, spacing)
        assert volume.modality == "DX"
        assert read_grid(source).difference(volume.grid) is None
        np.testing.assert_array_equal(open_label(source).array, PIXELS[0])


def test_several_pictures_are_no_volume(tmp_path: Path) -> None:
    make(tmp_path, x_ray(), name="a")
    make(tmp_path, x_ray(), name="b")
    assert "by itself" in str(refused(tmp_path, Code.NO_GEOMETRY).remedy)


def test_a_coloured_picture(tmp_path: Path) -> None:
    make(tmp_path, lambda ds, k: (x_ray()(ds, k), coloured(ds, k)))
    refused(tmp_path, Code.PHOTOMETRIC)
    np.testing.assert_array_equal(open_volume(tmp_path, Reading(channels=True)).array, np.moveaxis(COLOURS[0], -1, 0))
    with pytest.raises(Exception, match="one value per voxel"):
        open_label(tmp_path, Reading(channels=True))
