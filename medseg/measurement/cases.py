"""Which label belongs to which image: files, folders of files, and trees of DICOM files with SEG or RTSTRUCT."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from medseg.data.inputs import find_inputs
from medseg.data.layouts import Case, is_annotation, name_some
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading, is_dicom, open_volume
from medseg.formats.dicom.annotations import read_annotation
from medseg.formats.dicom.catalog import CatalogSeries, read_catalog
from medseg.formats.dicom.structures import Annotation
from medseg.reports.belonging import patients_by_case
from medseg.reports.pairs import by_case, case_id
from medseg.volume import Volume

logger = logging.getLogger(__name__)

LOOKED_AT = 50
"""Files of a folder that tell whether it is one of DICOM files."""


@dataclass(frozen=True)
class MeasuredCase:
    """An image and what is drawn on it.

    Args:
        case: the image's files.
        label: a file with the values of structures; None of a DICOM image, or where the image alone is wanted.
        annotations: SEG and RTSTRUCT files drawn on the image.
        patient: whose it is, where something tells.
    """

    case: Case
    label: Path | None = None
    annotations: tuple[Annotation, ...] = ()
    patient: str | None = None

    @property
    def case_id(self) -> str:
        """What tables and messages call it."""
        return self.case.case_id


def find_cases(
    images: Path, labels: Path | None, *, patients: Path | None = None, reading: Reading = STRICT
) -> list[MeasuredCase]:
    """The images of a file or folder with their labels, sorted by case id.

    Args:
        images: a file, a DICOM series, or a folder of these.
        labels: a label file or a folder of label files named by case; a SEG or RTSTRUCT file, or a folder of these
            (which may be `images` itself); None for the images alone.
        patients: table of the patient of each case; by default what lies beside the labels tells (`patients_by_case`).
        reading: what is asked of the readers.
    Raises:
        MedsegError: E_MISSING for a label without an image, E_REFERENCE for an annotation whose images are not there,
            E_MULTI_SERIES where one label file stands for several images, E_NO_CASES, E_DUPLICATE_ID, and what reading
            headers refuses.
    """
    for path in (images, labels):
        if path is not None and not path.exists():
            raise MedsegError(Code.MISSING, "there is no such file or folder", where=path.name)
    if labels is None:
        found = [MeasuredCase(case) for case in find_inputs([images], reading=reading)]
    elif _is_of_dicom(labels):
        found = _annotated(images, labels, reading)
    else:
        found = _labelled(images, labels, reading)
    known = patients_by_case([c.case_id for c in found], labels or images, patients)
    return [replace(c, patient=known.get(c.case_id, c.patient)) for c in found]


def open_channel(case: Case, channel: int | None, reading: Reading = STRICT) -> Volume:
    """One channel of an image, float32 (1, *grid.shape).

    Args:
        case: the image.
        channel: which one, from 0 on; None where there is only one.
        reading: what is asked of the readers.
    Raises:
        MedsegError: E_CHANNELS where there are several and none was chosen, or too few; what the readers refuse.
    """
    number = 0
    opened: Volume | None = None
    for source in case.images:
        if channel is None and len(case.images) > 1:
            number = len(case.images)
            break
        opened = open_volume(source, replace(reading, channels=True))
        here = 0 if channel is None else channel - number
        number += len(opened.array)
        if here < len(opened.array) and (channel is not None or len(opened.array) == 1):
            return replace(opened, array=opened.array[here : here + 1])
    raise MedsegError(
        Code.CHANNELS,
        "features are of one channel" if channel is None else "the image has fewer channels",
        where=case.case_id,
        expected="one channel" if channel is None else f"more than {channel}",
        got=f"{number} channels",
        remedy=f"choose one: --channel 0 … {number - 1}",
    )


def _is_of_dicom(labels: Path) -> bool:
    """Whether labels are SEG or RTSTRUCT files, or a folder of DICOM files."""
    if labels.is_file():
        return is_annotation(labels)
    files = (path for path in sorted(labels.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return any(is_dicom(path) for path, _ in zip(files, range(LOOKED_AT), strict=False))


def _labelled(images: Path, labels: Path, reading: Reading) -> list[MeasuredCase]:
    cases = find_inputs([images], reading=reading)
    if labels.is_file():
        if len(cases) != 1:
            raise MedsegError(
                Code.MULTI_SERIES,
                "one label file belongs to one image",
                where=images.name,
                expected="one image",
                got=f"{len(cases)}: {name_some([case.case_id for case in cases])}",
                remedy="name one of them, with --series where it is a DICOM series; or give a folder of labels",
            )
        return [MeasuredCase(cases[0], labels)]
    drawn = by_case(labels)
    named = {_id(case): case for case in cases}
    alone = sorted(set(drawn) - set(named))
    if alone:
        raise MedsegError(
            Code.MISSING,
            f"{len(alone)} × label without an image in {images.name}",
            where=labels.name,
            expected=f"an image of the same name, as {name_some(sorted(named))}",
            got=name_some(alone),
            remedy="remove them, or add their images; files with other names can be given one by one: IMAGE LABEL",
        )
    unlabelled = sorted(set(named) - set(drawn))
    if unlabelled:
        logger.warning("%d images have no label and are not measured: %s", len(unlabelled), name_some(unlabelled))
    return [MeasuredCase(named[name], drawn[name]) for name in sorted(drawn)]


def _id(case: Case) -> str:
    """A case's id as labels are named by it."""
    return case_id(Path(case.case_id))


def _annotated(images: Path, labels: Path, reading: Reading) -> list[MeasuredCase]:
    """Images with the SEG and RTSTRUCT files that refer to them."""
    if images.is_file() and not is_dicom(images) and labels.is_file():
        (case,) = find_inputs([images], reading=reading)
        return [MeasuredCase(case, annotations=(read_annotation(labels),))]  # the grid must fit
    catalog = read_catalog(images, without_preamble=reading.without_preamble)
    if catalog.damaged:
        logger.warning("%d files that cannot be read as DICOM were left out", len(catalog.damaged))
    series = [s for s in catalog.series if reading.series in (None, s.info.uid, s.case_id)]
    if images.resolve() == labels.resolve():
        homes = {s.case_id: list(s.annotations) for s in series}
        orphans = [(annotation, why) for annotation, why in catalog.orphans]
    else:
        homes, orphans = _matched(series, _annotations(labels, reading))
    if orphans and (labels.is_file() or not any(homes.values())):
        annotation, why = orphans[0]
        raise MedsegError(
            Code.REFERENCE,
            "the images that this was drawn on are not there",
            where=annotation.pseudonym,
            expected="a series that it refers to",
            got=why,
            remedy="give the folder with its series as IMAGE",
        )
    for annotation, why in orphans:
        logger.warning("%s is not measured: %s", annotation.pseudonym, why)
    found = [s for s in series if homes[s.case_id]]
    if not found:
        raise MedsegError(
            Code.NO_CASES, "nothing is drawn on these images", where=images.name, expected="SEG or RTSTRUCT files",
            got=f"{len(series)} series", remedy="name the file or folder with the annotations as LABEL",
        )  # fmt: skip
    return [
        MeasuredCase(Case(s.case_id, (s.info,), None), None, tuple(homes[s.case_id]), s.patient)
        for s in sorted(found, key=lambda s: s.case_id)
    ]


def _annotations(labels: Path, reading: Reading) -> list[Annotation]:
    if labels.is_file():
        return [read_annotation(labels)]
    catalog = read_catalog(labels, without_preamble=reading.without_preamble)
    return [a for s in catalog.series for a in s.annotations] + [a for a, _ in catalog.orphans]


def _matched(
    series: list[CatalogSeries], annotations: list[Annotation]
) -> tuple[dict[str, list[Annotation]], list[tuple[Annotation, str]]]:
    """Case id → its annotations, and the annotations without a series: by the UID that they name, else by the only
    series in their frame of reference."""
    homes: dict[str, list[Annotation]] = {s.case_id: [] for s in series}
    orphans = []
    for annotation in annotations:
        named = [s for s in series if s.info.uid in annotation.series]
        space = annotation.frame_of_reference
        same = [s for s in series if space is not None and s.frame_of_reference == space]
        candidates = named or (same if not annotation.series else [])
        if len(candidates) == 1:
            homes[candidates[0].case_id].append(annotation)
        elif candidates:
            orphans.append((annotation, f"{len(candidates)} series lie in its frame of reference"))
        else:
            orphans.append((annotation, "no series here is one that it refers to"))
    return homes, orphans
