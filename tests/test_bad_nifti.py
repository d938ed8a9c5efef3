"""NIfTI files whose headers contradict themselves: what is refused, what is mended, and what the user may choose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from peak import IMPORT
from test_nifti import patch, refused, rotation, save, values

from medseg.errors import Code
from medseg.formats import STRICT, Reading, open_label, open_volume, read_grid
from medseg.formats.nifti_form import FORM_TOLERANCE_VOXELS, SHEAR_TOLERANCE_VOXELS

SFORM, QFORM, NO_FORM = Reading(form="sform"), Reading(form="qform"), Reading(without_form=True)
SHAPE = (4, 6, 5)


def moved(path: Path, mm: float = 3.0) -> Path:
    """The qform's origin moved along x."""
    patch(path, qoffset_x=float(nib.load(path).header["qoffset_x"]) + mm)
    return path


def sheared(path: Path, cosine: float) -> Path:
    """Only an sform, whose second axis leans towards the first."""
    first, second = (rotation()[:3, k] / np.linalg.norm(rotation()[:3, k]) for k in (0, 1))
    affine = rotation()
    affine[:3, 1] = (cosine * first + np.sqrt(1 - cosine**2) * second) * 1.3
    save(path, values(), qform=0)
    patch(path, **{f"srow_{axis}": affine[k].astype(np.float32) for k, axis in enumerate("xyz")})
    return path


@pytest.mark.parametrize(("reading", "shift"), [(SFORM, 0.0), (QFORM, 3.0)], ids=["sform", "qform"])
def test_the_form_that_is_asked_for_places_the_file(tmp_path: Path, reading: Reading, shift: float) -> None:
    path = moved(save(tmp_path / "a.nii.gz", values()))
    assert refused(path).code is Code.FORM
    expected = rotation()
    expected[0, 3] += shift
    for volume in (open_volume(path, reading), open_label(path, reading)):
        np.testing.assert_allclose(volume.grid.affine, expected, atol=1e-3)
        assert volume.notes == (f"sform and qform disagree by 3 mm: the {reading.form} was taken",)
    np.testing.assert_array_equal(open_volume(path, reading).array[0], values())
    np.testing.assert_allclose(read_grid(path, reading).affine, expected, atol=1e-3)


def test_a_form_that_is_not_coded_cannot_be_chosen(tmp_path: Path) -> None:
    only_sform = save(tmp_path / "a.nii", values(), qform=0)
    only_qform = save(tmp_path / "b.nii", values(), sform=0)
    for path in (only_sform, only_qform):
        for reading in (STRICT, SFORM, QFORM, NO_FORM):
            volume = open_volume(path, reading)
            np.testing.assert_allclose(volume.grid.affine, rotation(), atol=1e-3)
            assert volume.notes == ()


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_forms_may_differ_by_less_than_half_a_voxel(tmp_path: Path, share: float) -> None:
    path = moved(save(tmp_path / "a.nii", values()), share * FORM_TOLERANCE_VOXELS * 0.7)
    if share < 1:
        assert open_volume(path).notes == ()
    else:
        assert refused(path).code is Code.FORM


def test_a_qform_that_is_no_rotation(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", values())
    patch(path, quatern_b=0.9, quatern_c=0.9)
    error = refused(path)
    assert error.code is Code.AFFINE and "0.9" in str(error.got) and "--form sform" in str(error.remedy)
    (note,) = open_volume(path, SFORM).notes
    assert "sform was taken" in note
    np.testing.assert_allclose(open_volume(path, SFORM).grid.affine, rotation(), atol=1e-5)


def test_not_a_number_in_either_form_is_never_agreement(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", values())
    patch(path, qoffset_x=np.nan)
    assert refused(path).code is Code.FORM
    np.testing.assert_allclose(open_volume(path, SFORM).grid.affine, rotation(), atol=1e-5)
    assert refused(path, open_volume, reading=QFORM).code is Code.AFFINE
    patch(path, srow_x=[np.nan, 0, 0, 1], qoffset_x=1)
    error = refused(path)
    assert error.code is Code.AFFINE and "nan" in str(error.got) and "--form qform" in str(error.remedy)


def test_a_handedness_of_zero_means_right(tmp_path: Path) -> None:
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    nib.save(nib.Nifti1Image(values(), affine), tmp_path / "a.nii")
    patch(tmp_path / "a.nii", pixdim=[0, 2, 3, 4, 1, 1, 1, 1], sform_code=0, qform_code=1)
    np.testing.assert_allclose(open_volume(tmp_path / "a.nii").grid.affine, affine, atol=1e-6)


def test_a_file_without_any_form_is_read_where_that_is_allowed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", values(), sform=0, qform=0, qoffset_x=500)
    error = refused(path)
    assert error.code is Code.NO_GEOMETRY and "--without-form" in str(error.remedy)
    volume = open_volume(path, NO_FORM)
    np.testing.assert_allclose(volume.grid.affine, np.diag([0.7, 1.3, 4.1, 1.0]), atol=1e-6)
    assert volume.grid.orientation == "RAS"
    assert volume.notes == ("neither sform nor qform is set: placed by its voxel sizes alone",)
    patch(path, pixdim=[1, 0, 1.3, 4.1, 1, 1, 1, 1])
    assert refused(path, open_volume, reading=NO_FORM).code is Code.AFFINE


def test_a_picture_without_a_third_size_is_a_millimetre_thick(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", values((4, 6)), sform=0, qform=0)
    patch(path, pixdim=[1, 0.5, 0.6, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(read_grid(path, NO_FORM).spacing_mm, (0.5, 0.6, 1.0), atol=1e-6)


def test_a_slight_shear_is_made_perpendicular_about_the_centre(tmp_path: Path) -> None:
    path = sheared(tmp_path / "a.nii", 0.02)
    before = nib.load(path).affine
    volume = open_volume(path)
    (note,) = volume.notes
    assert "made perpendicular" in note and "0.02" in note
    grid = volume.grid
    np.testing.assert_allclose(grid.direction.T @ grid.direction, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(grid.spacing_mm, np.linalg.norm(before[:3, :3], axis=0), atol=1e-5)
    centre = (np.array(SHAPE) - 1) / 2
    np.testing.assert_allclose(grid.to_world(centre), before[:3, :3] @ centre + before[:3, 3], atol=1e-4)
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in SHAPE], indexing="ij"), axis=-1).reshape(-1, 3)
    off = np.linalg.norm(grid.to_world(corners) - (corners @ before[:3, :3].T + before[:3, 3]), axis=1)
    assert 1e-3 < off.max() <= SHEAR_TOLERANCE_VOXELS * 0.7
    np.testing.assert_array_equal(open_label(path).grid.affine, grid.affine)  # an image and its label stay one grid


def test_a_handedness_survives_the_repair(tmp_path: Path) -> None:
    path = sheared(tmp_path / "a.nii", 0.02)
    assert np.sign(np.linalg.det(open_volume(path).grid.affine[:3, :3])) == np.sign(np.linalg.det(rotation()[:3, :3]))


def test_a_real_shear_is_refused_with_what_it_would_cost(tmp_path: Path) -> None:
    error = refused(sheared(tmp_path / "a.nii", 0.3))
    assert error.code is Code.SHEAR and error.where == "a.nii"
    assert "0.3000" in str(error.got) and "mm" in str(error.got) and "resample" in str(error.remedy)


def test_the_same_shear_is_refused_where_it_moves_a_large_volume_further(tmp_path: Path) -> None:
    path = sheared(tmp_path / "a.nii", 0.02)
    patch(path, dim=[3, 512, 512, 1, 1, 1, 1, 1])
    with path.open("r+b") as stream:
        stream.truncate(352 + 512 * 512 * 2)
    assert refused(path, read_grid).code is Code.SHEAR


def test_every_refusal_of_a_header_says_all_four_things(tmp_path: Path) -> None:
    def bad(name: str, **fields: object) -> Path:
        return save(tmp_path / name, values(), **{"qform": 0, **fields})  # type: ignore[arg-type]

    zero = {f"srow_{axis}": [0, 0, 0, 1] for axis in "xyz"}
    paths = [
        moved(save(tmp_path / "form.nii", values())),
        save(tmp_path / "none.nii", values(), sform=0, qform=0),
        sheared(tmp_path / "shear.nii", 0.3),
        bad("zero.nii", **zero),
        bad("colour.nii", datatype=128),
        bad("bits.nii", datatype=1792),
        bad("dims.nii", dim=[6, 4, 6, 5, 2, 2, 2, 1]),
        bad("huge.nii", dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]),
        bad("offset.nii", vox_offset=1e12),
        bad("empty.nii", dim=[3, 4, 0, 5, 1, 1, 1, 1]),
    ]
    packed = save(tmp_path / "cut.nii.gz", values())
    packed.write_bytes(packed.read_bytes()[:-9])
    for path in (*paths, packed):
        error = refused(path)
        assert None not in (error.where, error.expected, error.got, error.remedy), error
        assert error.where == path.name


def test_a_whole_body_of_doubles_stays_within_its_result(tmp_path: Path) -> None:
    """float64 on disk: memory holds the float32 result and one chunk, never the file."""
    shape = (384, 384, 325)
    voxels = int(np.prod(shape))
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float64)
    header.set_data_shape(shape)
    header.set_sform(np.eye(4), code=1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    with (tmp_path / "body.nii").open("wb") as stream:  # zeros that take no room on the disk
        stream.write(header.binaryblock)
        stream.truncate(352 + 8 * voxels)
    program = (
        IMPORT + "from pathlib import Path\n"
        "import medseg.formats.nifti\n"
        "from medseg.formats import open_volume\n"
        "before = peak_bytes()\n"
        f"volume = open_volume(Path({str(tmp_path / 'body.nii')!r}))\n"
        f"assert volume.array.shape == (1, *{shape}) and volume.array.dtype == 'float32'\n"
        "print(peak_bytes() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * voxels + 150 * 2**20, (
        "as much as the file, and no more than a chunk beside the result"
    )
