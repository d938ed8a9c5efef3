"""What lies in a tree of DICOM files, from headers alone: series of images, annotations, and which belong together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg.errors import Code, MedsegError
from medseg.formats.dicom import files
from medseg.formats.dicom.annotations import read_annotation
from medseg.formats.dicom.archive import is_zip, unpacked
from medseg.formats.dicom.files import SeriesInfo
from medseg.formats.dicom.header import Slice
from medseg.formats.dicom.series import assess
from medseg.formats.dicom.structures import Annotation
from medseg.volume import Grid


@dataclass(frozen=True)
class CatalogSeries:
    """One series of images in a tree."""

    case_id: str
    """What medseg calls it everywhere: "CT_3f9a2c", modality and a digest of its SeriesInstanceUID. It is the same
    wherever the files lie and tells nothing about the patient."""
    info: SeriesInfo
    """UID and files."""
    patient: str
    """A name for the patient that tells nothing about them ("p_81bc2d"): a digest of the smallest StudyInstanceUID of
    all series that share a PatientID or a study."""
    study_uid: str
    frame_of_reference: str | None
    grid: Grid | None
    """None where the series cannot be read as one volume."""
    annotations: tuple[Annotation, ...]
    """Those that refer to this series."""
    problem: MedsegError | None
    """Why it cannot be read as one volume."""
    warnings: tuple[str, ...]
    """What a reader would warn of: duplicates, a localizer left out, lossy compression."""


@dataclass(frozen=True)
class Catalog:
    """What lies in a tree."""

    root: Path
    series: tuple[CatalogSeries, ...]
    """Sorted by case_id."""
    orphans: tuple[tuple[Annotation, str], ...]
    """Annotations that belong to no series here, and why."""
    others: dict[str, int]
    """Other DICOM objects by kind ("SR", "DICOMDIR", …) and how many."""
    damaged: tuple[tuple[Path, str], ...]
    """Files that cannot be read as DICOM though they should, and why."""


def read_catalog(
    root: Path, progress: Callable[[int, int], None] | None = None, *, without_preamble: bool = False
) -> Catalog:
    """Look at every file of a tree (or a zip), headers only.

    Args:
        root: folder, zip or single file.
        progress: called with (files done, all files).
        without_preamble: try DICOM on files without "DICM" at byte 128 too.
    Raises:
        MedsegError: E_MISSING, E_LIMIT; whatever is wrong with single series is in the catalog.
    """
    root = Path(root)
    folder = unpacked(root) if is_zip(root) else root
    scan = files.scan(folder, without_preamble=without_preamble, progress=progress)
    by_uid: dict[str, list[Slice]] = defaultdict(list)
    damaged = list(scan.damaged)
    for item in scan.slices:
        if item.uid:
            by_uid[item.uid].append(item)
        else:
            damaged.append((item.path, f"{Code.MALFORMED}: an image without a SeriesInstanceUID"))
    annotations, unread = _read_annotations(scan.annotations)
    damaged += unread
    homes, orphans = _homes(annotations, by_uid)
    names = files.series_names({uid: items[0].modality for uid, items in by_uid.items()})
    patients = _patients(by_uid)
    series = [_entry(uid, items, names[uid], patients[uid], homes.get(uid, [])) for uid, items in by_uid.items()]
    return Catalog(
        folder,
        tuple(sorted(series, key=lambda s: s.case_id)),
        tuple(orphans),
        dict(sorted(scan.others.items())),
        tuple(sorted(damaged)),
    )


def _entry(
    uid: str, items: list[Slice], case_id: str, patient: str, homes: list[tuple[Annotation, str]]
) -> CatalogSeries:
    """Assess one series; `homes`: its annotations, each with a note."""
    assessment = assess(items)
    (info,) = files.describe(items)
    return CatalogSeries(
        case_id,
        info,
        patient,
        _study(items),
        _frame(items),
        None if assessment.problem else assessment.grid,
        tuple(annotation for annotation, _ in homes),
        assessment.problem,
        (*assessment.notes, *(f"{annotation.kind}: {note}" for annotation, note in homes if note)),
    )


def _study(items: list[Slice]) -> str:
    return min((s.study_uid for s in items if s.study_uid), default="")


def _frame(items: list[Slice]) -> str | None:
    return next((s.frame_of_reference for s in items if s.frame_of_reference), None)


def _patients(by_uid: Mapping[str, list[Slice]]) -> dict[str, str]:
    """For each SeriesInstanceUID the pseudonym of its patient: series that share a PatientID or a study, directly or
    over others, are of one."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for uid, items in by_uid.items():
        keys = {("patient", s.patient_key) for s in items} | {("study", s.study_uid) for s in items}
        for kind, value in keys:
            if value:
                parent[find(f"{kind} {value}")] = find(f"series {uid}")
    members: dict[str, list[str]] = defaultdict(list)
    for uid in by_uid:
        members[find(f"series {uid}")].append(uid)
    smallest = {
        group: min((study for uid in uids if (study := _study(by_uid[uid]))), default=min(uids))
        for group, uids in members.items()
    }
    digests = files.digests(smallest.values())
    return {uid: f"p_{digests[smallest[group]]}" for group, uids in members.items() for uid in uids}


def _read_annotations(paths: Sequence[Path]) -> tuple[list[Annotation], list[tuple[Path, str]]]:
    """The headers of annotation files, each object once, and the files that cannot be read, with the reason."""
    found: dict[str, Annotation] = {}
    unread = []
    for path in sorted(paths):
        try:
            annotation = read_annotation(path)
        except MedsegError as error:
            unread.append((path, f"{error.code}: {error.message}"))
        else:
            found.setdefault(annotation.uid, annotation)
    return list(found.values()), unread


def _homes(
    annotations: Sequence[Annotation], by_uid: Mapping[str, list[Slice]]
) -> tuple[dict[str, list[tuple[Annotation, str]]], list[tuple[Annotation, str]]]:
    """SeriesInstanceUID → its annotations, each with a note; and those that belong nowhere, with the reason."""
    frames = {uid: _frame(items) for uid, items in by_uid.items()}
    owners = {s.sop_uid: uid for uid, items in by_uid.items() for s in items if s.sop_uid}
    homes: dict[str, list[tuple[Annotation, str]]] = defaultdict(list)
    orphans = []
    for annotation in annotations:
        try:
            uids, note = _referenced(annotation, frames, owners)
        except MedsegError as error:
            orphans.append((annotation, f"{error.code}: {error.message}"))
            continue
        for uid in uids:
            homes[uid].append((annotation, note))
    return homes, orphans


def _referenced(
    annotation: Annotation, frames: Mapping[str, str | None], owners: Mapping[str, str]
) -> tuple[list[str], str]:
    """The series that an annotation refers to, and a note.

    Its images count for more than the series that it names, but they must all be there, in one series. Where it names
    a series and none of its images, as after cropping or pseudonymising, one frame of reference must join them.

    Args:
        annotation: with what it refers to.
        frames: SeriesInstanceUID → FrameOfReferenceUID of what is here.
        owners: SOPInstanceUID → SeriesInstanceUID of what is here.
    Raises:
        MedsegError: E_REFERENCE.
    """
    named = [uid for uid in annotation.series if uid in frames]
    found = [owners[image] for image in annotation.images if image in owners]
    lacking = len(annotation.images) - len(found)
    note = f"{lacking} of the {len(annotation.images)} images that it refers to are not here" if lacking else ""
    frame = annotation.frame_of_reference
    if not found:
        uids = named
        if not named:
            raise MedsegError(Code.REFERENCE, "it refers to images that are not here")
        if annotation.images:
            uids = [uid for uid in named if frame is not None and frames[uid] == frame]
            note = "it refers to other images of this series, in the same frame of reference"
    elif not annotation.series or set(named) & set(found):
        uids = sorted(set(found) & set(named)) if annotation.series else sorted(set(found))
    elif len(set(found)) == 1 and not lacking:
        uids, note = found[:1], "it names another series than the one that holds its images; the images count"
    else:
        raise MedsegError(
            Code.REFERENCE, "the series that it names is not here, and its images do not all lie in one other series"
        )
    uids = [uid for uid in uids if frame is None or frames[uid] in (None, frame)]
    if not uids:
        raise MedsegError(Code.REFERENCE, "it was drawn in another frame of reference than its images lie in")
    return uids, note
