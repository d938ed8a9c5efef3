from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.errors import Code, MedsegError
from medseg.formats import (
    Reading,
    is_image_file,
    open_label,
    open_volume,
    read_grid,
    strip_suffix,
    write_image,
    write_label,
)
from medseg.formats import content as content_module
from medseg.formats import nifti as nifti_module
from medseg.volume import Grid, Volume

AFFINE = np.array([[-0.6, 0.1, 0.9, 12.5], [0.2, 1.25, 0.3, -30.0], [-0.31, 0.2, -2.4, 77.0], [0, 0, 0, 1.0]])
SHAPE = (4, 6, 5)


def rotation() -> np.ndarray:
    """AFFINE with its axes made perpendicular: left-handed, three spacings, oblique."""
    direction, _ = np.linalg.qr(AFFINE[:3, :3])
    affine = AFFINE.copy()
    affine[:3, :3] = direction * (0.7, 1.3, 4.1)
    return affine


def values(shape: tuple[int, ...] = SHAPE, dtype: str = "int16") -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def save(path: Path, array: np.ndarray, *, sform: int = 1, qform: int = 1, **fields: object) -> Path:
    image = nib.Nifti1Image(array, rotation(), dtype=array.dtype)
    image.set_sform(rotation(), code=sform)
    image.set_qform(rotation(), code=qform)
    nib.save(image, path)
    if fields:
        patch(path, **fields)
    return path


def patch(path: Path, **fields: object) -> None:
    """Change fields of the header in place, as no well-behaved writer would."""
    compressed = path.read_bytes()[:2] == b"\x1f\x8b"
    data = gzip.decompress(path.read_bytes()) if compressed else path.read_bytes()
    header = nib.Nifti1Header(data[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    data = header.binaryblock + data[348:]
    path.write_bytes(gzip.compress(data) if compressed else data)


def refused(path: Path, read=open_volume, **options: object) -> MedsegError:
    with pytest.raises(MedsegError) as caught:
        read(path, **options)
    assert str(path.parent) not in str(caught.value), "messages name files without their folders"
    return caught.value


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_image_comes_in_the_files_own_order(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, values())
    volume = open_volume(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array[0], values())
    np.testing.assert_allclose(volume.grid.affine, rotation(), atol=1e-5)
    assert read_grid(path).difference(volume.grid, tolerance_mm=0) is None


def test_big_endian(tmp_path: Path) -> None:
    image = nib.Nifti1Image(values(), rotation(), nib.Nifti1Header(endianness=">"))
    nib.save(image, tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == (348).to_bytes(4, "big")
    np.testing.assert_array_equal(open_volume(tmp_path / "a.nii").array[0], values())
    assert open_label(tmp_path / "a.nii").array.dtype.isnative


def test_nifti_2_is_read(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(values(), rotation()), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(open_volume(tmp_path / "a.nii.gz").array[0], values())


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    packed, plain = save(tmp_path / "p.nii.gz", values()), save(tmp_path / "q.nii", values())
    packed, plain = packed.rename(tmp_path / "a.nii"), plain.rename(tmp_path / "b.nii.gz")
    for path in (packed, plain):
        np.testing.assert_array_equal(open_volume(path).array[0], values())


def test_several_chunks_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti_module, "CHUNK_VOXELS", 7)
    np.testing.assert_array_equal(open_volume(save(tmp_path / "a.nii.gz", values())).array[0], values())


def test_slope_and_intercept_and_what_is_not_one(tmp_path: Path) -> None:
    scaled = save(tmp_path / "a.nii", values(), scl_slope=2.5, scl_inter=-1024)
    np.testing.assert_array_equal(open_volume(scaled).array[0], values() * 2.5 - 1024)
    for slope in (0.0, np.nan):
        unset = save(tmp_path / "b.nii", values(), scl_slope=slope, scl_inter=99)
        np.testing.assert_array_equal(open_volume(unset).array[0], values())


def test_labels_keep_their_type(tmp_path: Path) -> None:
    for dtype in ("uint8", "float32", "int32"):
        label = open_label(save(tmp_path / "a.nii.gz", values(dtype=dtype)))
        assert label.is_label and label.array.dtype == dtype
        np.testing.assert_array_equal(label.array, values())


def test_only_the_coded_form_counts(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", values(), sform=0, qform=1, srow_x=[9, 0, 0, 0])
    np.testing.assert_allclose(open_volume(path).grid.affine, rotation(), atol=1e-4)
    path = save(tmp_path / "b.nii", values(), sform=2, qform=0, qoffset_x=500)
    np.testing.assert_allclose(open_volume(path).grid.affine, rotation(), atol=1e-4)


def test_forms_that_disagree_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", values())
    x = float(nib.load(path).header["qoffset_x"])
    patch(path, qoffset_x=x + 0.05)
    open_volume(path)  # far less than a voxel
    patch(path, qoffset_x=x + 3)
    error = refused(path)
    assert error.code is Code.FORM and "3 mm" in str(error.got)


def test_no_form_is_no_geometry(tmp_path: Path) -> None:
    assert refused(save(tmp_path / "a.nii", values(), sform=0, qform=0)).code is Code.NO_GEOMETRY


def test_shear_and_singular_affines_are_refused(tmp_path: Path) -> None:
    sheared = rotation()[0].astype(np.float32)
    sheared[2] += 1
    assert refused(save(tmp_path / "a.nii", values(), qform=0, srow_x=sheared)).code is Code.SHEAR
    zero = {f"srow_{axis}": [0, 0, 0, 1] for axis in "xyz"}
    assert refused(save(tmp_path / "b.nii", values(), qform=0, **zero)).code is Code.AFFINE


def test_units_are_converted_to_mm(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", values(), xyzt_units=3)  # micrometres
    np.testing.assert_allclose(open_volume(path).grid.spacing_mm, np.array([0.7, 1.3, 4.1]) / 1000, rtol=1e-5)


def test_fourth_dimension(tmp_path: Path) -> None:
    single = save(tmp_path / "a.nii.gz", values((*SHAPE, 1)))
    assert open_volume(single).array.shape == (1, *SHAPE)
    assert open_label(single).array.shape == SHAPE
    four = save(tmp_path / "b.nii.gz", values((*SHAPE, 3)))
    assert refused(four).code is Code.FOUR_D
    assert refused(four, open_label).code is Code.FOUR_D
    np.testing.assert_array_equal(
        open_volume(four, Reading(channels=True)).array, np.moveaxis(values((*SHAPE, 3)), -1, 0)
    )
    flat = save(tmp_path / "c.nii.gz", values((4, 6)))
    assert open_volume(flat).array.shape == (1, 4, 6, 1)


def test_nonfinite_voxels_are_counted(tmp_path: Path) -> None:
    array = values(dtype="float32")
    array[1, 2, 3], array[0, 0, 0] = np.nan, np.inf
    error = refused(save(tmp_path / "a.nii.gz", array))
    assert error.code is Code.NONFINITE and str(error.got).startswith("2 of 120")


def test_cut_and_corrupted_files(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 30000, SHAPE).astype("int16")
    packed, plain = save(tmp_path / "a.nii.gz", noise).read_bytes(), save(tmp_path / "b.nii", noise).read_bytes()
    for keep in (0, 3, 40, len(packed) // 2, len(packed) - 9, len(packed) - 1):
        (tmp_path / "cut.nii.gz").write_bytes(packed[:keep])
        assert refused(tmp_path / "cut.nii.gz").code is Code.TRUNCATED, keep
    for keep in (0, 200, 350, len(plain) - 1):
        (tmp_path / "cut.nii").write_bytes(plain[:keep])
        assert refused(tmp_path / "cut.nii").code is Code.TRUNCATED, keep
        assert refused(tmp_path / "cut.nii", read_grid).code is Code.TRUNCATED, "the header alone tells"
    wrong_crc = bytearray(packed)
    wrong_crc[-6] ^= 0xFF
    (tmp_path / "crc.nii.gz").write_bytes(wrong_crc)
    assert refused(tmp_path / "crc.nii.gz").code is Code.TRUNCATED
    assert refused(tmp_path / "crc.nii.gz", open_label).code is Code.TRUNCATED


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_absurd_headers_allocate_nothing(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / name, values())
    patch(path, dim=[3, 2000, 2000, 1000, 1, 1, 1, 1])
    monkeypatch.setattr(np, "empty", lambda *a, **k: pytest.fail("allocated"))
    assert refused(path).code is Code.LIMIT


def test_gzip_bomb_behind_a_small_header(tmp_path: Path) -> None:
    plain = save(tmp_path / "a.nii", values()).read_bytes()
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(plain + bytes(4 * nifti_module.MAX_TRAILING_BYTES)))
    assert refused(tmp_path / "bomb.nii.gz").code is Code.LIMIT


def test_colour_is_unsupported(tmp_path: Path) -> None:
    rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(rgb, rotation()), tmp_path / "a.nii")
    assert refused(tmp_path / "a.nii").code is Code.UNSUPPORTED


def test_pairs_and_halves(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(values(), rotation()), tmp_path / "a.img")
    for name in ("a.img", "a.hdr"):
        np.testing.assert_array_equal(open_volume(tmp_path / name).array[0], values())
    data = (tmp_path / "a.img").read_bytes()
    (tmp_path / "a.img").unlink()
    error = refused(tmp_path / "a.hdr")
    assert error.code is Code.MISSING and error.expected == "a.img"
    (tmp_path / "a.hdr").unlink()
    (tmp_path / "a.img").write_bytes(data)
    error = refused(tmp_path / "a.img")
    assert error.code is Code.MISSING and error.expected == "a.hdr"


def test_analyze_has_no_geometry(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(values(), np.eye(4)), tmp_path / "a.img")
    assert refused(tmp_path / "a.hdr").code is Code.NO_GEOMETRY


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.nii.gz").code is Code.MISSING
    (tmp_path / "notes.txt").write_text("not an image, whatever it says")
    assert refused(tmp_path / "notes.txt").code is Code.UNSUPPORTED


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 4, "uint8"), (0, 300, "uint16"), (-3, 4, "int8"), (0, 70000, "uint32"), (0, 2**40, "int64")],
)
@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
def test_label_round_trip(tmp_path: Path, low: int, high: int, dtype: str, name: str) -> None:
    label = np.full(SHAPE, low, dtype=np.int64)
    label[1, 2, 3], label[3, 0, 1] = high, 1
    grid = Grid(SHAPE, rotation())
    write_label(tmp_path / name, Volume(label, grid))
    back = open_label(tmp_path / name)
    assert back.array.dtype == dtype
    np.testing.assert_array_equal(back.array, label)
    np.testing.assert_array_equal(back.grid.affine.astype(np.float32), grid.affine.astype(np.float32))
    header = nib.load(tmp_path / name).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_qform(), rotation(), atol=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_float_and_bool_labels_are_written_as_integers(tmp_path: Path) -> None:
    grid = Grid(SHAPE, rotation())
    write_label(tmp_path / "a.nii.gz", Volume((values() % 3).astype(np.float32), grid))
    np.testing.assert_array_equal(open_label(tmp_path / "a.nii.gz").array, values() % 3)
    write_label(tmp_path / "b.nii.gz", Volume(values() > 7, grid))
    np.testing.assert_array_equal(open_label(tmp_path / "b.nii.gz").array, values() > 7)
    with pytest.raises(MedsegError) as caught:
        write_label(tmp_path / "c.nii.gz", Volume(values() / 2, grid))
    assert caught.value.code is Code.LABEL and not (tmp_path / "c.nii.gz").exists()


def test_rotations_near_180_degrees_survive(tmp_path: Path) -> None:
    """float32 quaternions cannot hold these; what is written must still be readable and exact."""
    for degrees in (179.9, 179.97, 179.99, 180.0):
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        affine = np.array([[c, -s, 0, 5], [s, c, 0, -3], [0, 0, 1, 2], [0, 0, 0, 1.0]]) @ np.diag([0.25, 0.25, 1, 1])
        grid = Grid((900, 900, 1), affine)
        write_label(tmp_path / "a.nii.gz", Volume(np.zeros(grid.shape, np.uint8), grid))
        assert open_label(tmp_path / "a.nii.gz").grid.difference(grid, tolerance_mm=1e-3) is None


def test_image_round_trip_with_channels(tmp_path: Path) -> None:
    array = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    write_image(tmp_path / "a.nii.gz", Volume(array, Grid(SHAPE, rotation())))
    np.testing.assert_array_equal(open_volume(tmp_path / "a.nii.gz", Reading(channels=True)).array, array)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(SHAPE, rotation())
    path = tmp_path / "a.nii.gz"
    write_label(path, Volume(np.ones(SHAPE, np.uint8), grid))
    before = path.read_bytes()

    def disk_full(image: object, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", disk_full)
    with pytest.raises(MedsegError, match="No space left") as caught:
        write_label(path, Volume(np.zeros(SHAPE, np.uint8), grid))
    assert caught.value.code is Code.OUTPUT
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


def test_nowhere_to_write(tmp_path: Path) -> None:
    volume = Volume(np.zeros(SHAPE, np.uint8), Grid(SHAPE, rotation()))
    for name, code in (("none/a.nii.gz", Code.OUTPUT), ("a.mha", Code.OUTPUT), ("a.png", Code.OUTPUT)):
        with pytest.raises(MedsegError) as caught:
            write_label(tmp_path / name, volume)
        assert caught.value.code is code
    with pytest.raises(MedsegError) as caught:
        write_label(tmp_path / "a.nii", Volume(np.zeros((2, 3), np.uint8), Grid.of_picture((2, 3))))
    assert caught.value.code is Code.NO_GEOMETRY


def test_names(tmp_path: Path) -> None:
    for name, stem in (
        ("a.nii.gz", "a"),
        ("B.b.NII", "B.b"),
        ("x.tiff", "x"),
        ("1.2.840", "1.2.840"),
        (".png", ".png"),
    ):
        assert strip_suffix(name) == stem
    save(tmp_path / "a.nii.gz", values())
    (tmp_path / "a.nii.gz").rename(tmp_path / "scan")
    (tmp_path / "readme").write_text("text")
    save(tmp_path / "b.nii.gz", values())
    found = sorted(p.name for p in tmp_path.iterdir() if is_image_file(p))
    assert found == ["b.nii.gz", "scan"]


@pytest.mark.data
def test_real_files_are_all_read(real_data: Path) -> None:
    files = sorted((real_data / "segmentation").rglob("*.nii.gz"))
    files = [f for f in files if "hippocampus" not in f.parts][:12] + [f for f in files if "hippocampus" in f.parts][:8]
    for path in files:
        array, reference = open_label(path), nib.load(path)
        np.testing.assert_array_equal(array.array, np.asanyarray(reference.dataobj))
        np.testing.assert_allclose(array.grid.affine, reference.affine, atol=1e-6)


@pytest.mark.parametrize("has_isal", [True, False])
def test_gzip_streams_with_and_without_the_faster_library(
    has_isal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_isal:
        monkeypatch.setitem(sys.modules, "isal", None)
    spec = importlib.util.spec_from_file_location("content_again", content_module.__file__)
    assert spec is not None and spec.loader is not None
    content = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(content)
    assert content.GzipFile.__module__.startswith("isal") is has_isal
    plain = np.random.default_rng(0).integers(0, 4, 300_000).astype(np.uint8).tobytes()
    packed, path = gzip.compress(plain), tmp_path / "a"
    for stored in (plain, packed):
        path.write_bytes(stored)
        with content.open_stream(path) as stream:
            assert stream.read(1000) + stream.read() == plain and content.is_inflating(stream) is (stored is packed)
    middle = len(packed) // 2
    flipped = bytes([packed[middle] ^ 16])
    for damaged in (packed[:middle], packed[:middle] + flipped + packed[middle + 1 :], packed[:-8] + bytes(8)):
        path.write_bytes(damaged)
        with pytest.raises(content.DAMAGED), content.open_stream(path) as stream:
            stream.read()
    path.write_bytes(b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 5000 + b"\0" + gzip.compress(bytes([92, 1, 0, 0]))[10:])
    assert content.kind_of(path) is content.Kind.NIFTI, "a name longer than what is looked at first"
