"""Where a NIfTI file lies: its sform or its qform, and what is done where these fail.

Source: NIfTI-1 standard (nifti1.h), "3D image (volume) orientation and location in space": method 3 is the sform,
method 2 the qform, method 1 the voxel sizes alone. The standard does not say which counts where two disagree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats.reading import Reading
from medseg.volume import SHEAR_TOLERANCE, Grid

FORM_TOLERANCE_VOXELS = 0.5
"""sform and qform agree if no corner of the volume moves by more than this part of the smallest voxel side. Less never
puts a voxel's centre into another voxel, and float32 quaternions of rotations near 180 degrees are off by up to
7e-4 rad: 0.3 mm at 400 mm. Files in use stay below 0.01 mm; real conflicts are millimetres."""
SHEAR_TOLERANCE_VOXELS = 0.5
"""Axes that are not perpendicular are made so if no corner moves by more than this part of the smallest voxel side, for
the same reason; what registrations leave behind stays below it. A real shear needs resampling, and is refused."""
SMALLEST_VOLUME = 1e-12
"""A voxel of less mm³ is none: the matrix is singular."""
MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""NIfTI's codes of the spatial unit (low three bits of xyzt_units): unknown is read as mm, as everybody does."""

_CORNERS = np.stack(np.meshgrid(*[(0, 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
_OTHER_FORM = "; or read it by its other form: --form qform, in training data.form=qform"

Affine = NDArray[np.float64]


def placed_by(header: Any, shape: tuple[int, ...], path: Path, reading: Reading) -> tuple[Grid, tuple[str, ...]]:
    """The grid that a header gives a volume, and what whoever uses it should know of how it came to be.

    Args:
        header: nibabel's header object.
        shape: voxels along i, j and k.
        path: the file, for messages.
        reading: `form` chooses where both are coded; `without_form` allows neither.
    Returns:
        The grid in RAS mm, and notes: which form was taken of two that disagree, that there is none, what a shear cost.
    Raises:
        MedsegError: E_NO_GEOMETRY, E_FORM, E_AFFINE, E_SHEAR.
    """
    coded = [form for form in ("sform", "qform") if int(header[f"{form}_code"]) > 0]
    if coded:
        affine, notes = _of_forms(header, shape, path, reading.form, coded)
    elif reading.without_form:
        affine, notes = _of_voxel_sizes(header), ("neither sform nor qform is set: placed by its voxel sizes alone",)
    else:
        raise MedsegError(
            Code.NO_GEOMETRY,
            "neither sform nor qform is set: the file does not say where its voxels lie",
            where=path.name,
            expected="sform_code or qform_code above 0",
            got="both 0",
            remedy="convert the original DICOM files again, set the affine if you know it, or take right, anterior and "
            "superior for granted: --without-form, in training data.without_form=true",
        )
    _refuse_singular(affine, coded, path)
    affine, repairs = _perpendicular(affine, shape, coded, path)
    return Grid(shape, affine), (*notes, *repairs)


def disagreement_mm(header: Any, shape: tuple[int, ...]) -> float:
    """Largest distance between the corners that sform and qform give, in the header's unit."""
    return _distance(header.get_sform(), header.get_qform(), shape)


def _of_forms(
    header: Any, shape: tuple[int, ...], path: Path, wanted: str | None, coded: list[str]
) -> tuple[Affine, tuple[str, ...]]:
    """The affine of the form that was asked for if it is coded, else of the one that is; of two, the sform."""
    form = wanted if wanted in coded else coded[0]
    affine = _affine_of(header, form, path)
    if len(coded) == 1:
        return affine, ()
    other = "qform" if form == "sform" else "sform"
    if wanted is None:
        _refuse_singular(affine, coded, path)
    try:
        distance = _distance(affine, _affine_of(header, other, path), shape)
    except MedsegError:
        if wanted is None:
            raise
        distance = np.inf  # the one that was not asked for makes no sense
    side = float(np.linalg.norm(affine[:3, :3], axis=0).min())
    if distance <= FORM_TOLERANCE_VOXELS * side:
        return affine, ()
    if wanted is not None:
        return affine, (f"sform and qform disagree by {distance:.4g} mm: the {form} was taken",)
    raise MedsegError(
        Code.FORM,
        "sform and qform are both set and disagree",
        where=path.name,
        expected=f"corners at most {FORM_TOLERANCE_VOXELS} voxels apart ({FORM_TOLERANCE_VOXELS * side:.3g} mm)",
        got=f"corners up to {distance:.4g} mm apart",
        remedy="find out which one is right, and copy it over the other or choose it: --form sform or --form qform, in "
        "training data.form=sform",
    )


def _affine_of(header: Any, form: str, path: Path) -> Affine:
    """Index → mm by one of the forms.

    Raises:
        MedsegError: E_AFFINE for a qform that is no rotation.
    """
    try:
        affine = header.get_sform() if form == "sform" else _whole(header).get_qform()
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        quaternion = ", ".join(f"{float(header[f'quatern_{letter}']):.4g}" for letter in "bcd")
        sizes = ", ".join(f"{float(size):.4g}" for size in header["pixdim"][1:4])
        raise MedsegError(
            Code.AFFINE,
            "the qform is no rotation of voxels with a size",
            where=path.name,
            expected="a quaternion (b, c, d) no longer than 1, and voxel sizes above 0",
            got=f"({quaternion}), voxels of ({sizes})",
            remedy="repair the header, or read the file by its sform where it has one: --form sform, in training "
            "data.form=sform",
        ) from error
    return _mm(header) @ np.asarray(affine, dtype=np.float64)


def _whole(header: Any) -> Any:
    """The header with a handedness: pixdim[0] (qfac) of 0 means 1 (nifti1.h, "method 2")."""
    if float(header["pixdim"][0]) != 0:
        return header
    header = header.copy()
    header["pixdim"][0] = 1.0
    return header


def _of_voxel_sizes(header: Any) -> Affine:
    """Method 1 of the standard: x = pixdim[1] · i, and so on; a picture without a third size is 1 mm thick."""
    sizes = [abs(float(size)) for size in header["pixdim"][1:4]]
    if int(header["dim"][0]) < 3 and not sizes[2] > 0:
        sizes[2] = 1.0
    return _mm(header) @ np.diag([*sizes, 1.0])


def _mm(header: Any) -> Affine:
    return np.diag([MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)] * 3 + [1.0])


def _refuse_singular(affine: Affine, coded: list[str], path: Path) -> None:
    if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) >= SMALLEST_VOLUME:
        return
    raise MedsegError(
        Code.AFFINE,
        "the affine is singular or not finite",
        where=path.name,
        expected="three axes that span a volume, in finite numbers",
        got=np.array2string(affine[:3], precision=4).replace("\n", ""),
        remedy="convert the original DICOM files again, or set the affine if you know it"
        + (_OTHER_FORM if len(coded) > 1 else ""),
    )


def _perpendicular(
    affine: Affine, shape: tuple[int, ...], coded: list[str], path: Path
) -> tuple[Affine, tuple[str, ...]]:
    """The affine with perpendicular axes about the same centre, and what that cost.

    The directions are the nearest perpendicular ones in the sense of least squares, which is the orthogonal factor of
    their polar decomposition; voxel sizes stay.

    Source: Higham, Computing the polar decomposition, SIAM J. Sci. Stat. Comput. 7, 1986.
    Raises:
        MedsegError: E_SHEAR if a corner would move by more than `SHEAR_TOLERANCE_VOXELS`.
    """
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / sizes
    cosine = float(np.abs(directions.T @ directions - np.eye(3)).max())
    if cosine <= SHEAR_TOLERANCE:
        return affine, ()
    left, _, right = np.linalg.svd(directions)
    mended = affine.copy()
    mended[:3, :3] = (left @ right) * sizes
    centre = (np.asarray(shape, dtype=np.float64) - 1) / 2
    mended[:3, 3] += (affine[:3, :3] - mended[:3, :3]) @ centre
    moved = _distance(affine, mended, shape)
    allowed = SHEAR_TOLERANCE_VOXELS * float(sizes.min())
    if moved <= allowed:
        return mended, (f"sheared axes (cosine {cosine:.2g}) were made perpendicular: corners moved by {moved:.3g} mm",)
    raise MedsegError(
        Code.SHEAR,
        "the axes of the volume are not perpendicular",
        where=path.name,
        expected=f"|cosine| at most {SHEAR_TOLERANCE}, or corners that move by at most {allowed:.3g} mm when the axes "
        "are made perpendicular",
        got=f"|cosine| {cosine:.4f}, corners {moved:.4g} mm",
        remedy="resample the volume to a rectangular grid first" + (_OTHER_FORM if len(coded) > 1 else ""),
    )


def _distance(one: Affine, other: Affine, shape: tuple[int, ...]) -> float:
    """Largest distance between the corners of a volume that two affines place; inf where one is not finite."""
    corners = _CORNERS * (np.asarray(shape) - 1)
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    distance = float(np.linalg.norm(corners @ difference[:3, :3].T + difference[:3, 3], axis=1).max())
    return distance if np.isfinite(distance) else np.inf
