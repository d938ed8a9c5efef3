"""The forms in which label maps are written, and the one call that writes a SEG or an RTSTRUCT."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from medseg.errors import Code, MedsegError, nearest
from medseg.formats.dicom.structures import Algorithm
from medseg.volume import Volume


class Form(StrEnum):
    """What `--format` takes."""

    NIFTI = "nifti"
    """NIfTI; PNG for pictures."""
    DICOM_SEG = "dicom-seg"
    RTSTRUCT = "rtstruct"


ENDINGS = {Form.NIFTI: ".nii.gz", Form.DICOM_SEG: ".seg.dcm", Form.RTSTRUCT: ".rtstruct.dcm"}
"""Of the files that medseg names itself."""
IDENTIFIERS_REMARK = (
    "SEG and RTSTRUCT files belong to their patient: they carry the name and the identifiers of the scans"
)


def form_named(name: str) -> Form:
    """The form of a name.

    Raises:
        MedsegError: E_NAME for an unknown one.
    """
    known = [str(form) for form in Form]
    folded = name.strip().lower()
    if folded not in known:
        raise MedsegError(
            Code.NAME,
            "there is no such format",
            where="--format",
            expected=", ".join(known),
            got=repr(name.strip()),
            remedy=nearest(folded, known),
        )
    return Form(folded)


def forms_of(text: str) -> tuple[Form, ...]:
    """The forms of a list with commas ("nifti,dicom-seg"), each once, NIfTI first.

    Raises:
        MedsegError: E_NAME for an unknown one.
    """
    named = {form_named(name) for name in text.split(",")}
    return tuple(form for form in Form if form in named)


def write_annotation(
    path: Path,
    form: Form,
    label: Volume,
    names: Sequence[str],
    source: Sequence[Path],
    algorithm: Algorithm,
    *,
    parts: Sequence[Sequence[int]] | None = None,
) -> None:
    """Write a label map as SEG or RTSTRUCT, whole or not at all.

    Args:
        path: final name.
        form: DICOM_SEG or RTSTRUCT.
        label: uint8 class indices (i, j, k), 0 the background.
        names: of the structures: the classes 1, 2, …, or regions of `parts`.
        source: the image files of the series, in slice order; the result refers to them and carries their
            identifiers.
        algorithm: who drew it.
        parts: for each name the classes that make it up, where structures may overlap; None: the classes in turn.
    Raises:
        MedsegError: as the writers.
    """
    from medseg.formats.dicom.codes import structures_of

    structures = structures_of(names)
    if parts is not None:
        structures = tuple(replace(s, values=tuple(part)) for s, part in zip(structures, parts, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # highdicom and pydicom quote values, among them the patient's name
        if form is Form.DICOM_SEG:
            from medseg.formats.dicom.seg_writer import write_seg

            write_seg(path, label, structures, source, algorithm=algorithm)
        else:
            from medseg.formats.dicom.rtstruct_writer import write_rtstruct

            write_rtstruct(path, label, structures, source, algorithm=algorithm)
