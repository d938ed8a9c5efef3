"""Files that are damaged, forged, unreadable or in odd places: a clear refusal, in bounded time and memory."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_images import CANARY, COLUMNS, PIXELS, ROWS, SLICES, make, only, refused, setting
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from medseg.errors import Code, MedsegError
from medseg.formats import Reading, find_series, is_dicom, open_volume
from medseg.formats.dicom import files, seg
from medseg.formats.dicom.archive import is_zip
from medseg.formats.dicom.series import assess

ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
MIB = 2**20


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


def test_a_kind_of_value_that_nobody_knows(tmp_path: Path) -> None:
    """Found by fuzzing: pydicom converts a value when it is asked for, and knows no VR of this name."""
    whole = make(tmp_path)[0]
    data = whole.read_bytes()
    sop_class = b"\x08\x00\x16\x00"
    assert data.count(sop_class + b"UI") == 1
    whole.write_bytes(data.replace(sop_class + b"UI", sop_class + b"UY"))
    with pytest.raises(MedsegError) as caught:
        seg.is_mine(whole)
    assert caught.value.code is Code.TRUNCATED


def test_absurd_sizes(tmp_path: Path) -> None:
    make(tmp_path, setting(Rows=65535, Columns=65535))
    refused(tmp_path, Code.LIMIT)
    make(tmp_path, setting(Rows=12000, Columns=12000))
    refused(tmp_path, Code.LIMIT)


def without_preamble(folder: Path) -> None:
    """Bare data sets, without the file meta information either."""
    for path in make(folder, lambda ds, k: setattr(ds.file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian)):
        ds = pydicom.dcmread(path)
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, Dataset(ds), implicit_vr=True, little_endian=True)
        path.write_bytes(buffer.getvalue())


def test_files_without_preamble_are_read_when_asked_for(tmp_path: Path) -> None:
    without_preamble(tmp_path)
    (tmp_path / "notes.txt").write_text("no DICOM either")
    (tmp_path / "noise.bin").write_bytes(np.random.default_rng(0).bytes(3000))
    assert "--without-preamble" in str(refused(tmp_path, Code.NOT_DICOM).remedy)
    refused(tmp_path / "s00.dcm", Code.NOT_DICOM)
    reading = Reading(without_preamble=True)
    np.testing.assert_array_equal(open_volume(tmp_path, reading).array[0], PIXELS.transpose(2, 1, 0))
    assert open_volume(tmp_path / "s00.dcm", reading).grid.shape[2] == 1
    assert files.scan(tmp_path, without_preamble=True).damaged == []
    refused(tmp_path / "notes.txt", Code.NOT_DICOM, reading)


def test_damaged_neighbours_refuse_a_series_but_not_a_tree(tmp_path: Path) -> None:
    path = make(tmp_path / "a")[0]
    make(tmp_path / "b", uid="4")
    (tmp_path / "b" / "cut.dcm").write_bytes(path.read_bytes()[:400])
    volume = open_volume(tmp_path, Reading(series="1.2.3"))
    assert volume.notes == ("left out 1 damaged files in other folders",)
    refused(tmp_path, Code.TRUNCATED, Reading(series="4"))


def test_compressed_files_that_are_cut(tmp_path: Path) -> None:
    for path in make(tmp_path):
        ds = pydicom.dcmread(path)
        ds.compress(RLELossless)
        ds.save_as(path)
    data = path.read_bytes()
    for keep in (len(data) - 10, len(data) - 30):
        path.write_bytes(data[:keep])
        refused(tmp_path, Code.TRUNCATED)


def test_absurd_frames(tmp_path: Path) -> None:
    make(tmp_path / "a", lambda ds, k: (only(0)(ds, k), setting(NumberOfFrames=2**30, SOPClassUID=ENHANCED_CT)(ds, k)))
    refused(tmp_path / "a", Code.LIMIT)
    make(tmp_path / "b", lambda ds, k: (only(0)(ds, k), setting(NumberOfFrames=90, SOPClassUID=ENHANCED_CT)(ds, k)))
    refused(tmp_path / "b", Code.TRUNCATED)


def deflated(folder: Path) -> list[Path]:
    return make(folder, lambda ds, k: setattr(ds.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian))


def bomb(path: Path, before: bool) -> None:
    """200 MiB of zeros in a private element before the matrix, or after all else of the pixels."""
    ds = pydicom.dcmread(path)
    meta_end = 144 + ds.file_meta.FileMetaInformationGroupLength
    content = zlib.decompress(path.read_bytes()[meta_end:], -zlib.MAX_WBITS)
    filling = bytes(200 * MIB)
    if before:
        content = struct.pack("<HH2sHI", 0x0009, 0x1001, b"OB", 0, len(filling)) + filling + content
    else:
        place = content.rindex(struct.pack("<HH", 0x7FE0, 0x0010))
        length = len(filling) + ROWS * COLUMNS * 2
        content = content[: place + 8] + struct.pack("<I", length) + content[place + 12 :] + filling
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    path.write_bytes(path.read_bytes()[:meta_end] + packer.compress(content) + packer.flush())


def test_deflated_files_read_equal(tmp_path: Path) -> None:
    deflated(tmp_path / "a")
    np.testing.assert_array_equal(open_volume(tmp_path / "a").array[0], PIXELS.transpose(2, 1, 0))
    path = deflated(tmp_path / "b")[3]
    path.write_bytes(path.read_bytes()[:-40])
    refused(tmp_path / "b", Code.TRUNCATED)


@pytest.mark.parametrize("before", [True, False])
def test_deflate_bomb(tmp_path: Path, before: bool) -> None:
    bomb(deflated(tmp_path)[2], before)
    assert (tmp_path / "s02.dcm").stat().st_size < MIB
    tracemalloc.start()
    try:
        refused(tmp_path, Code.LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()


def nest(path: Path, levels: int) -> None:
    """Put sequences of undefined length before the matrix, one in the other."""
    tag = struct.pack("<HH2sHI", 0x0008, 0x1032, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    end = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    data = path.read_bytes()
    place = data.index(struct.pack("<HH2s", 0x0010, 0x0010, b"PN"))
    path.write_bytes(data[:place] + tag * levels + end * levels + data[place:])


def test_sequences_without_end(tmp_path: Path) -> None:
    path = make(tmp_path)[2]
    data = path.read_bytes()
    nest(path, 10)
    np.testing.assert_array_equal(open_volume(tmp_path).array[0], PIXELS.transpose(2, 1, 0))
    for levels in (300, 3000):
        path.write_bytes(data)
        nest(path, levels)
        refused(tmp_path, Code.MALFORMED)


def test_unreadable_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = make(tmp_path / "a")[0]
    (tmp_path / "a" / "locked").mkdir()
    opened, listed = Path.open, os.scandir

    def open_file(self: Path, *args: object, **kwargs: object) -> object:
        if self == closed:
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **kwargs)  # type: ignore[arg-type]

    def list_folder(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", list_folder)
    refused(tmp_path, Code.UNSUPPORTED)
    monkeypatch.setattr(Path, "open", open_file)
    assert {path.name: reason for path, reason in files.scan(tmp_path).damaged} == {
        closed.name: "E_UNSUPPORTED: the file cannot be opened",
        "locked": "E_UNSUPPORTED: the folder cannot be opened",
    }


def test_special_files_are_left_out(tmp_path: Path) -> None:
    make(tmp_path)
    os.mkfifo(tmp_path / "pipe.dcm")
    assert open_volume(tmp_path).grid.shape[2] == SLICES
    deep = tmp_path / "/".join("d" * 60)
    make(deep, uid="4")
    assert len(find_series(tmp_path)) == 2


def test_only_other_objects(tmp_path: Path) -> None:
    make(tmp_path, lambda ds, k: (only(0)(ds, k), setting(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33")(ds, k)))
    error = refused(tmp_path, Code.UNSUPPORTED)
    assert error.got == "1 SR"
    refused(tmp_path / "s00.dcm", Code.UNSUPPORTED)
    refused(tmp_path / "nowhere", Code.MISSING)


def test_zip(tmp_path: Path) -> None:
    archive = tmp_path / "series.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        for path in make(tmp_path / "s"):
            writer.write(path, f"{CANARY}/{path.name}")
    np.testing.assert_array_equal(open_volume(archive).array[0], PIXELS.transpose(2, 1, 0))
    assert [info.num_slices for info in find_series(archive)] == [SLICES]
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as writer:
        writer.writestr("a.txt", "hello")
    refused(tmp_path / "other.zip", Code.NOT_DICOM)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("valid")
    plain, packed, coded = make(folder / "a")[0], deflated(folder / "b")[0], make(folder / "c")[0]
    ds = pydicom.dcmread(coded)
    ds.compress(RLELossless)
    ds.save_as(coded)
    return {"plain": plain.read_bytes(), "deflated": packed.read_bytes(), "coded": coded.read_bytes()}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["plain", "deflated", "coded"]),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=0, max_size=6), st.integers(0, 6)), max_size=4),
    keep=st.floats(0.1, 1.2),
)
def test_damage_is_refused_and_nothing_else_happens(
    valid: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    changes: list[tuple[float, bytes, int]],
    keep: float,
) -> None:
    data = valid[kind]
    for share, new, drop in changes:
        place = int(share * len(data))
        data = data[:place] + new + data[place + drop :]
    path = tmp_path_factory.mktemp("fuzz") / "a.dcm"
    path.write_bytes(data[: int(keep * len(data))])
    try:
        scan = files.scan(path)  # itself refuses damaged zips, and "PK" may come first
        if scan.slices:
            assess(scan.slices)
    except MedsegError:
        assert is_zip(path)
    try:
        volume = open_volume(path)
    except MedsegError:
        return
    assert volume.array.dtype == np.float32


def test_a_preamble_may_hold_anything(tmp_path: Path) -> None:
    for path in make(tmp_path):
        path.write_bytes(b"PK\3\4" + path.read_bytes()[4:])
    assert len(files.scan(path).slices) == 1
    assert open_volume(path).grid.shape[2] == 1


def test_a_pipe_alone_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MedsegError) as caught:
        files.scan(tmp_path / "pipe")
    assert caught.value.code is Code.UNSUPPORTED


def test_links_alone_are_named(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for path in make(tmp_path / "s"):
        (tmp_path / "links" / path.name).symlink_to(path)
    error = refused(tmp_path / "links", Code.NOT_DICOM)
    assert error.got == "6 link" and "links are not followed" in str(error.remedy)


def test_empty_files_without_an_ending_are_noted(tmp_path: Path) -> None:
    for path in make(tmp_path, only(0, 1, 2, 3, 4)):
        path.rename(path.with_suffix(""))
    (tmp_path / "s05").touch()
    (tmp_path / ".marker").touch()
    (note,) = open_volume(tmp_path).notes
    assert note == "slices may be missing: 1 empty files lie beside the images"


def test_many_frames_are_refused_before_one_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, lambda ds, k: (only(0)(ds, k), setting(NumberOfFrames=100_000)(ds, k)))
    monkeypatch.setattr("medseg.formats.dicom.series.expanded", lambda item: pytest.fail("frames were made"))
    refused(tmp_path, Code.TRUNCATED)


@pytest.mark.parametrize("size", [(COLUMNS, ROWS - 1), (ROWS, COLUMNS), (3000, 3000)], ids=["cut", "turned", "bomb"])
@pytest.mark.parametrize(("form", "syntax"), [("JPEG", JPEGBaseline8Bit), ("JPEG2000", JPEG2000Lossless)])
def test_compressed_images_of_another_size(tmp_path: Path, size: tuple[int, int], form: str, syntax: str) -> None:
    code = io.BytesIO()
    Image.new("L", size).save(code, form)

    def change(ds: Dataset, k: int) -> None:
        only(0)(ds, k)
        ds.file_meta.TransferSyntaxUID = syntax
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        ds.PixelData = encapsulate([code.getvalue()])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True

    make(tmp_path, change)
    error = refused(tmp_path, Code.MALFORMED)
    assert error.got == "{} × {}".format(*size)
