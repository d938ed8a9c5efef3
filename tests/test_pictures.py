from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medseg.errors import Code, MedsegError
from medseg.formats import is_image_file, open_label, open_volume, read_grid, write_image, write_label
from medseg.volume import PIXEL_FRAME, Grid, Volume

GREY = np.arange(15, dtype=np.uint8).reshape(3, 5) * 17
COLOUR = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)


def refused(path: Path, code: Code, read=open_volume) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        read(path)
    assert caught.value.code is code, caught.value
    return caught.value


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("a.png", GREY),
        ("a.gif", GREY),
        ("a.tif", GREY),
        ("b.png", GREY.astype(np.uint16) * 200),
        ("b.tif", GREY.astype(np.uint16) * 200),
        ("c.tif", GREY.astype(np.int32) * 20000 - 7),
        ("d.tif", GREY.astype(np.float32) / 7),
    ],
)
def test_grey_of_every_depth(tmp_path: Path, name: str, array: np.ndarray) -> None:
    Image.fromarray(array).save(tmp_path / name)
    image, label = open_volume(tmp_path / name), open_label(tmp_path / name)
    assert image.array.shape == (1, 3, 5) and image.array.dtype == np.float32
    assert (image.grid.shape, image.grid.frame) == ((3, 5), PIXEL_FRAME)
    np.testing.assert_array_equal(image.array[0], array.astype(np.float32))
    np.testing.assert_array_equal(label.array, array)
    assert label.is_label and label.array.dtype == array.dtype
    assert read_grid(tmp_path / name).difference(image.grid) is None


def test_bilevel(tmp_path: Path) -> None:
    Image.fromarray(GREY > 100).save(tmp_path / "a.png")
    label = open_label(tmp_path / "a.png")
    assert label.array.dtype == np.uint8
    np.testing.assert_array_equal(label.array, GREY > 100)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_colour_becomes_channels(tmp_path: Path, name: str) -> None:
    Image.fromarray(COLOUR).save(tmp_path / name)
    np.testing.assert_array_equal(open_volume(tmp_path / name).array, np.moveaxis(COLOUR, -1, 0))


def test_jpeg_is_read_and_content_beats_the_name(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.png")
    assert open_volume(tmp_path / "a.png").array.shape == (3, 3, 5)
    (tmp_path / "a.png").rename(tmp_path / "picture")
    assert is_image_file(tmp_path / "picture")


def test_alpha_is_dropped_only_where_it_says_nothing(tmp_path: Path) -> None:
    rgba = np.dstack([COLOUR, np.full((3, 5), 255, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(open_volume(tmp_path / "a.png").array, np.moveaxis(COLOUR, -1, 0))
    rgba[1, 2, 3] = 254
    Image.fromarray(rgba).save(tmp_path / "b.png")
    assert "1 pixels" in str(refused(tmp_path / "b.png", Code.CHANNELS).got)
    Image.fromarray(np.dstack([GREY, np.full((3, 5), 255, np.uint8)])).save(tmp_path / "c.png")
    np.testing.assert_array_equal(open_label(tmp_path / "c.png").array, GREY)


def test_palette_labels_give_indices(tmp_path: Path) -> None:
    indices = np.arange(15, dtype=np.uint8).reshape(3, 5) % 3
    picture = Image.frombytes("P", (5, 3), indices.tobytes())
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(open_label(tmp_path / "a.png").array, indices)
    image = open_volume(tmp_path / "a.png").array
    np.testing.assert_array_equal(image[0], (indices == 1) * 255)
    np.testing.assert_array_equal(image[1], (indices == 2) * 255)
    picture.putpalette([v for grey in (0, 100, 200) for v in (grey, grey, grey)])
    picture.save(tmp_path / "b.png")
    np.testing.assert_array_equal(open_volume(tmp_path / "b.png").array, indices[None] * 100)


def test_coloured_labels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", Code.LABEL, open_label)
    Image.fromarray(np.dstack([GREY] * 3)).save(tmp_path / "b.png")
    np.testing.assert_array_equal(open_label(tmp_path / "b.png").array, GREY)


def test_colours_of_a_gif_are_no_ids(tmp_path: Path) -> None:
    picture = Image.frombytes("P", (5, 3), bytes([0, 1, 2] * 5))
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "a.gif")
    refused(tmp_path / "a.gif", Code.LABEL, open_label)


@pytest.mark.parametrize("name", ["a.tif", "a.gif"])
def test_pages_are_refused(tmp_path: Path, name: str) -> None:
    pages = [Image.fromarray(GREY), Image.fromarray(GREY.T.copy().reshape(3, 5))]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    error = refused(tmp_path / name, Code.FOUR_D)
    assert "2 pages" in str(error.got) and "NIfTI" in str(error.remedy)


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_is_not_read_as_eight(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, 2, b"\0" + bytes(range(12))))
    assert "RGB;16B" in str(refused(tmp_path / "a.png", Code.UNSUPPORTED).got)


@pytest.mark.parametrize("size", [(60000, 60000), (12000, 12000)])
def test_bombs(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(png(*size, 8, 0, b""))
    refused(tmp_path / "a.png", Code.LIMIT)
    refused(tmp_path / "a.png", Code.LIMIT, read_grid)


def test_cmyk_is_unsupported(tmp_path: Path) -> None:
    Image.new("CMYK", (5, 3)).save(tmp_path / "a.tif")
    refused(tmp_path / "a.tif", Code.UNSUPPORTED)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.gif"])
def test_cut_files(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for keep in (12, 30, len(data) // 2):
        (tmp_path / name).write_bytes(data[:keep])
        refused(tmp_path / name, Code.TRUNCATED)


def test_nonfinite_pixels(tmp_path: Path) -> None:
    array = GREY.astype(np.float32)
    array[0, 0] = np.nan
    Image.fromarray(array).save(tmp_path / "a.tif")
    assert str(refused(tmp_path / "a.tif", Code.NONFINITE).got).startswith("1 of 15")


@pytest.mark.parametrize(
    ("name", "low", "high", "dtype"),
    [
        ("a.png", 0, 255, "uint8"),
        ("a.png", 0, 65535, "uint16"),
        ("a.tif", 0, 4, "uint8"),
        ("a.tiff", 0, 300, "uint16"),
        ("a.tif", -5, 70000, "int32"),
    ],
)
def test_label_round_trip(tmp_path: Path, name: str, low: int, high: int, dtype: str) -> None:
    array = np.full((3, 5), low, dtype=np.int64)
    array[2, 1] = high
    write_label(tmp_path / name, Volume(array, Grid.of_picture((3, 5))))
    back = open_label(tmp_path / name)
    assert back.array.dtype == dtype
    np.testing.assert_array_equal(back.array, array)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("name", "value"), [("a.png", -1), ("a.png", 65536), ("a.tif", 2**31), ("a.tif", 2**40)])
def test_ids_that_a_picture_cannot_hold(tmp_path: Path, name: str, value: int) -> None:
    array = np.full((3, 5), value, dtype=np.int64)
    with pytest.raises(MedsegError) as caught:
        write_label(tmp_path / name, Volume(array, Grid.of_picture((3, 5))))
    assert caught.value.code is Code.OUTPUT and not list(tmp_path.iterdir())


def test_image_round_trip(tmp_path: Path) -> None:
    for name, array in (
        ("a.png", np.moveaxis(COLOUR, -1, 0)),
        ("b.png", GREY[None] * 100.0),
        ("c.tif", GREY[None] / np.float32(7)),
    ):
        write_image(tmp_path / name, Volume(array.astype(np.float32), Grid.of_picture((3, 5))))
        np.testing.assert_array_equal(open_volume(tmp_path / name).array, array.astype(np.float32))
    with pytest.raises(MedsegError) as caught:
        write_image(tmp_path / "d.png", Volume(GREY[None] / 7, Grid.of_picture((3, 5))))
    assert caught.value.code is Code.OUTPUT


@pytest.mark.data
def test_real_pictures(real_data: Path) -> None:
    root = real_data / "segmentation"
    for folder, ending, shape in (
        ("drive/training/images", "*.tif", (3, 584, 565)),
        ("isbi2012_em/image", "*.png", (1, 512, 512)),
        ("chasedb1", "*.jpg", (3, 960, 999)),
    ):
        assert open_volume(sorted((root / folder).glob(ending))[0]).array.shape == shape
    for folder, ending, found in (
        ("drive/training/mask", "*.gif", [0, 255]),
        ("chasedb1", "*_1stHO.png", [0, 1]),
        ("cxr_lungs/labels", "*.png", [0, 1, 2]),
    ):
        assert np.unique(open_label(sorted((root / folder).glob(ending))[0]).array).tolist() == found
    nuclei = open_label(sorted((root / "dsb2018" / "labels").glob("*.png"))[0])
    assert nuclei.array.dtype == np.uint16
