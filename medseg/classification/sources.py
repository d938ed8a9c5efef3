"""Which files, folders and DICOM series below a folder are images to classify, and whose the DICOM files are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.classification.images import ImageCase, NpzImage
from medseg.data.layouts import visible
from medseg.errors import MedsegError
from medseg.formats import Source, is_dicom, is_image_file, strip_suffix

if TYPE_CHECKING:
    from medseg.formats.dicom.header import Slice

MASK_NAME = re.compile(r"(?:^|[ _.\-])masks?(?:[ _.\-]\d+)?$", re.IGNORECASE)
"""Names of drawn masks beside images ("benign (1)_mask", "benign (1)_mask_1"): they are no images to classify."""
DICOM_SUFFIX = ".dcm"
"""Files of such names are looked at as DICOM even without its preamble."""


def images_below(folder: Path, *, each_file: bool = False) -> tuple[dict[Path, Source], list[str]]:
    """The images of a folder and of all that is below it.

    A folder with the slices of one DICOM series is one image. Of a folder with files of several series each series of
    slices is one, and each file without a position (an X-ray) is one, however many of them share a series.

    Args:
        folder: where to look.
        each_file: whether each file that lies in it directly is an image of its own, whatever its series.
    Returns:
        Place, which the case is named after, → what is read; and the names of masks that were left out.
    """
    inside = visible(folder)
    folders = [path for path in inside if path.is_dir()]
    looked_at = [] if each_file else [path for path in inside if _may_be_dicom(path)]
    stacks, alone, unread = _series_of(looked_at) if looked_at else ([], [], [])
    images: dict[Path, Source] = {}
    masks: list[str] = []
    # A file that cannot be read may be one of the slices: reading the whole folder says so
    if len(stacks) == 1 and not alone and not (folders and unread):
        images[folder] = _described(stacks[0]) if folders else folder
    else:
        for stack in stacks:
            info = _described(stack)
            images[folder / info.name] = info
        others = [path for path in inside if path not in looked_at and (is_image_file(path) or is_dicom(path))]
        for path in (*alone, *unread, *others):
            if MASK_NAME.search(strip_suffix(path.name)):
                masks.append(path.name)
            else:
                images[path] = path
    for path in folders:
        below, left = images_below(path)
        images |= below
        masks += left
    return images, masks


def with_patients(cases: Sequence[ImageCase]) -> list[ImageCase]:
    """Cases with the patients that the headers of DICOM files tell, where nothing else says who they are of.

    They are called p001, p002, … in the order of the cases; a PatientID is never kept. Where another image of the same
    PatientID has a stated patient, it is that one.
    """
    if all(case.patient is not None for case in cases):
        return list(cases)
    keys = [_patient_key(case.source) for case in cases]
    stated = {case.patient for case in cases if case.patient is not None}
    names = {key: case.patient for key, case in zip(keys, cases, strict=True) if key and case.patient is not None}
    number = 0
    for _, key in sorted((case.case_id, key) for case, key in zip(cases, keys, strict=True)):
        if key and key not in names:
            number += 1
            while f"p{number:03}" in stated:
                number += 1
            names[key] = f"p{number:03}"
    return [
        case if case.patient is not None else replace(case, patient=names.get(key))
        for case, key in zip(cases, keys, strict=True)
    ]


def _may_be_dicom(path: Path) -> bool:
    return path.is_file() and (path.suffix.lower() == DICOM_SUFFIX or is_dicom(path))


def _series_of(files: Sequence[Path]) -> tuple[list[list[Slice]], list[Path], list[Path]]:
    """Series of several slices, images by themselves, and files that cannot be read; other DICOM objects are left."""
    slices, unread = _headers(files)
    by_uid: dict[str, list[Slice]] = defaultdict(list)
    for item in slices:
        by_uid[item.uid].append(item)
    stacks, alone = [], []
    for uid, members in sorted(by_uid.items()):
        if uid and len(members) > 1 and any(item.position is not None for item in members):
            stacks.append(members)
        else:
            alone += [item.path for item in members]
    return stacks, alone, unread


def _headers(files: Sequence[Path]) -> tuple[list[Slice], list[Path]]:
    """The headers of images, and the files that cannot be read."""
    from medseg.formats.dicom.files import read_slices, scan

    try:
        return read_slices(files, without_preamble=True), []
    except MedsegError:  # of one of them: it is looked for
        found = [(file, scan(file, without_preamble=True)) for file in files]
    return [item for _, one in found for item in one.slices], [file for file, one in found if one.refusals]


def _described(stack: Sequence[Slice]) -> Source:
    from medseg.formats.dicom.files import describe

    return describe(stack)[0]


def _patient_key(source: Source | NpzImage) -> str:
    """A digest of the PatientID, the same within this process only; "" where nothing tells."""
    if isinstance(source, NpzImage):
        return ""
    try:
        if not isinstance(source, Path):
            files = list(source.files[:1])
        elif source.is_dir():
            files = sorted(path for path in source.rglob("*") if path.is_file())
        elif source.suffix.lower() == ".zip":
            from medseg.formats.dicom.archive import unpacked

            files = sorted(path for path in unpacked(source).rglob("*") if path.is_file())
        else:
            files = [source]
        for file in files:
            if _may_be_dicom(file) and (found := _headers([file])[0]):
                return found[0].patient_key
    except (MedsegError, OSError):  # reading the case says why
        pass
    return ""
