"""The scans that are to be segmented, in files, folders, and trees or zips of DICOM files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.data.layouts import (
    CHANNEL_SUFFIX,
    IMAGE_FOLDERS,
    Case,
    add_entry,
    folder_named,
    image_entries,
    is_annotation,
    is_series,
    name_some,
    split_off_labels,
    visible,
)
from medseg.data.manifest import exists
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading, Source, find_series, is_dicom, is_image_file, strip_suffix
from medseg.formats.content import content_in_words, kind_of
from medseg.formats.dicom.archive import ZIP_REMEDY, is_zip, unpacked

if TYPE_CHECKING:
    from medseg.formats.dicom.catalog import CatalogSeries

logger = logging.getLogger(__name__)

Entries = dict[str, tuple[Source, ...]]
"""Id → the files or series of one case."""
Refused = list[tuple[Source, MedsegError]]
"""An image of a case that cannot be used, and why."""


def find_inputs(
    paths: Sequence[Path],
    *,
    num_channels: int | None = None,
    channels: Sequence[str] | None = None,
    modality: str | None = None,
    reading: Reading = STRICT,
    refused: Refused | None = None,
) -> tuple[Case, ...]:
    """The scans that are to be segmented; labels and annotations among them are left out.

    A folder with one DICOM series is one case of the folder's name. Of other trees of DICOM files each series is a
    case, under the pseudonym that `medseg.formats.dicom.catalog` gives it.

    Args:
        paths: files, folders of DICOM series however deep, zips of any of these, or folders of many cases: files,
            channel files (`case_0000`), a folder per case, or an `images` folder inside.
        num_channels: how many channels the model takes. It settles whether `_0000` numbers channels or belongs to
            the id; without it, numbers are channels where all ids have the same ones, counted from 0000.
        channels: the names of these channels instead. Files that are named by them (`flair.nii.gz`, `x_flair.nii.gz`)
            are taken in this order, and a folder that holds just these files is one case.
        modality: the model's. Where there are several DICOM series, those of other modalities are left out, with a
            warning.
        reading: `series` takes one DICOM series and leaves the others out.
        refused: where given, a case that cannot be used, though others can, is noted here and among the cases all the
            same; else it is refused.
    Returns:
        Cases without labels, sorted by id.
    Raises:
        MedsegError: E_MISSING, E_UNSUPPORTED, E_NO_CASES, E_DUPLICATE_ID if two inputs have the same id, or
            E_CHANNELS if a case has some of the named channels, but not all.
    """
    num_channels = len(channels) if channels else num_channels
    entries: dict[Path, Entries] = {}
    for given in paths:
        if not exists(given):
            raise MedsegError(
                Code.MISSING,
                "the input is not there",
                where=given,
                expected="a file or a folder",
                got="nothing",
                remedy="check the path",
            )
        path = unpacked(given) if is_zip(given) else given
        if path.is_file():
            if is_annotation(path) or not (is_image_file(path) or is_dicom(path) or reading.without_preamble):
                raise MedsegError(
                    Code.UNSUPPORTED,
                    "not an image that can be read",
                    where=path.name,
                    expected="NIfTI, DICOM, PNG, TIFF, JPEG or GIF",
                    got=content_in_words(path) or "another kind of file",
                    remedy="name the scan itself, or convert it",
                )
            add_entry(entries.setdefault(path.resolve().parent, {}), strip_suffix(path.name), (path,))
        elif channels and (files := _whole_case(path, channels)):
            entries.setdefault(path.resolve(), {})[path.resolve().name] = files
        else:
            inside = _inputs_of_folder(path, num_channels, modality, reading, refused)
            entries.setdefault(path.resolve(), {}).update(inside)
    cases: list[Case] = []
    for group in entries.values():
        for case_id, sources in _join_channels(group, num_channels, incomplete=refused is not None).items():
            try:
                cases.append(Case(case_id, _in_order(sources, channels, case_id), None))
            except MedsegError as error:
                if refused is None:
                    raise
                refused.append((sources[0], error))
                cases.append(Case(case_id, sources, None))
    cases = _told_apart(cases)
    refuse_same_ids(cases)
    return tuple(sorted(cases, key=lambda c: c.case_id))


def _told_apart(cases: Sequence[Case]) -> list[Case]:
    """The cases, with DICOM series of equal ids (patient7/CT, patient8/CT) under their pseudonyms."""
    count = Counter(case.case_id.casefold() for case in cases)
    return [
        replace(case, case_id=_pseudonym(case.images[0]) or case.case_id)
        if count[case.case_id.casefold()] > 1 and len(case.images) == 1
        else case
        for case in cases
    ]


def _pseudonym(source: Source) -> str | None:
    """What a DICOM series is called that names nobody; None for other images."""
    if not isinstance(source, Path):
        return source.name
    infos = find_series(source) if source.is_dir() or is_dicom(source) else []
    return infos[0].name if len(infos) == 1 else None


def _inputs_of_folder(
    folder: Path, num_channels: int | None, modality: str | None, reading: Reading, refused: Refused | None
) -> Entries:
    inside = folder_named(folder, IMAGE_FOLDERS) or folder
    entries: Entries = {}
    if not is_series(inside):
        found = image_entries(inside)
        images, _ = split_off_labels({name: files[0] for name, files in found.items()})
        entries = {name: found[name] for name in images}
    slices = {name for name, files in entries.items() if reading.without_preamble and any(map(_is_unknown, files))}
    entries = {name: files for name, files in entries.items() if name not in slices}
    dicom = {name for name, files in entries.items() if all(isinstance(f, Path) and f.is_dir() for f in files)}
    joined = {name for name in dicom if len(entries[name]) > 1 and len(entries[name]) == num_channels}
    if not entries or slices or dicom - joined:
        kept = {name: files for name, files in entries.items() if name not in dicom - joined}
        entries = kept | _series_of_tree(inside, [inside / name for name in joined], modality, reading, refused)
    if not entries:
        raise MedsegError(
            Code.NO_CASES,
            "no images were found here",
            where=folder.resolve().name,
            expected="image files, DICOM series, or a folder of them per case",
            got="the folder holds " + (name_some(p.name + "/" * p.is_dir() for p in visible(folder)) or "nothing"),
            remedy=ZIP_REMEDY if any(map(is_zip, visible(folder))) else "name the folder that holds them",
        )
    return entries


def _is_unknown(source: Source) -> bool:
    """A file whose content tells nothing: without a preamble, each slice of a series is one."""
    return isinstance(source, Path) and source.is_file() and kind_of(source) is None


def _series_of_tree(
    folder: Path, without: Sequence[Path], modality: str | None, reading: Reading, refused: Refused | None
) -> Entries:
    """The DICOM series of a folder, however deep: under their folder's name where that lies in `folder` (or is it) and
    holds one series, else under their pseudonyms."""
    from medseg.data.dicom_tree import damage
    from medseg.formats.dicom.catalog import read_catalog

    catalog = read_catalog(folder, without_preamble=reading.without_preamble)
    found = [s for s in catalog.series if not any(s.info.files[0].is_relative_to(path) for path in without)]
    homes = {s.case_id: {file.parent for file in s.info.files} for s in found}
    entries: Entries = {}
    wanted = _wanted(found, modality, reading)
    beside = {home for series in wanted for home in homes[series.case_id]}
    damaged = [(path, why) for path, why in catalog.damaged if path.parent in beside]
    remedy = "export or copy them again, or move them away if they belong to no series"
    if damaged and refused is None:
        raise damage(damaged, remedy)
    if catalog.damaged:
        logger.warning("%d files that cannot be read as DICOM were left out", len(catalog.damaged))
    for series in wanted:
        home = next(iter(homes[series.case_id])) if len(homes[series.case_id]) == 1 else None
        alone = home is not None and sum(home in parents for parents in homes.values()) == 1
        if home is not None and alone and ((len(found) == 1 and home == catalog.root) or home.parent == catalog.root):
            source: Source = home
            entries[home.resolve().name] = (source,)
        else:
            source = series.info
            entries[series.case_id] = (source,)
        its = [(path, why) for path, why in damaged if path.parent in homes[series.case_id]]
        if its and refused is not None:
            refused.append((source, damage(its, remedy)))
    return entries


def _wanted(found: Sequence[CatalogSeries], modality: str | None, reading: Reading) -> Sequence[CatalogSeries]:
    """The series that was asked for, or those of the model's modality."""
    from medseg.data.dicom_tree import count_modalities, of_modality

    if reading.series is not None:
        chosen = [s for s in found if reading.series in (s.info.uid, s.case_id)]
        if not chosen:
            listing = "; ".join(str(s.info) for s in found)
            raise MedsegError(
                Code.MISSING,
                "there is no such series",
                where="--series",
                expected=listing,
                got=reading.series,
                remedy="give the name or the UID of one of them",
            )
        return chosen
    if modality is None or len(found) < 2:
        return found
    chosen = of_modality(found, modality)
    others = [s for s in found if s not in chosen]
    if not chosen:
        raise MedsegError(
            Code.NO_CASES,
            "no series has the modality that the model was trained on",
            where="the inputs",
            expected=modality,
            got=count_modalities(others),
            remedy="give the folder of one series to segment it all the same",
        )
    if others:
        logger.warning("left out, since the model was trained on %s: %s", modality, count_modalities(others))
    return chosen


def _whole_case(folder: Path, channels: Sequence[str]) -> tuple[Path, ...] | None:
    """The files of a folder that holds one case: one file for each of several named channels, and no other image."""
    files = [path for path in visible(folder) if is_image_file(path)]
    named = [[f for f in files if _is_named_by(f, channel)] for channel in channels]
    if len(channels) < 2 or len(files) != len(channels) or any(len(found) != 1 for found in named):
        return None
    return tuple(found[0] for found in named)


def _in_order(files: tuple[Source, ...], channels: Sequence[str] | None, case_id: str) -> tuple[Source, ...]:
    """Files of a case in the order of the channels that they are named by; as they are where none is named so."""
    named = [[f for f in files if _is_named_by(f, channel)] for channel in channels or ()]
    if len(files) < 2 or not any(named):
        return files
    if any(len(found) != 1 for found in named) or len(files) != len(named):
        raise MedsegError(
            Code.CHANNELS,
            "the files of the case do not match the model's channels",
            where=case_id,
            expected=", ".join(channels or ()),
            got=", ".join(f.name for f in files),
            remedy="name one file by each channel, or number them _0000, _0001 in this order",
        )
    return tuple(found[0] for found in named)


def _is_named_by(file: Source, channel: str) -> bool:
    stem = strip_suffix(file.name).lower()
    return stem == channel.lower() or stem.endswith(("_" + channel.lower(), "-" + channel.lower()))


def _join_channels(entries: Mapping[str, tuple[Source, ...]], num_channels: int | None, *, incomplete: bool) -> Entries:
    """Join `case_0000`, `case_0001` where these numbers are channels (see `find_inputs`).

    With `incomplete`, one case that has all channels settles it: those with fewer are refused when they are opened.
    """
    matches = {name: CHANNEL_SUFFIX.fullmatch(name) for name in entries}
    numbers: dict[str, list[str]] = {}
    for match in matches.values():
        if match is None:
            return dict(entries)
        numbers.setdefault(match["id"], []).append(match["channel"])
    kinds = {tuple(sorted(channels)) for channels in numbers.values()}
    if incomplete and num_channels not in (None, 1) and tuple(f"{c:04d}" for c in range(num_channels or 0)) in kinds:
        return {
            case_id: tuple(path for channel in sorted(channels) for path in entries[f"{case_id}_{channel}"])
            for case_id, channels in numbers.items()
        }
    kind = kinds.pop() if kinds else ()
    counted = kind == tuple(f"{channel:04d}" for channel in range(len(kind)))
    if kinds or not counted or (num_channels is not None and len(kind) not in (1, num_channels)):
        return dict(entries)
    return {case_id: tuple(path for channel in kind for path in entries[f"{case_id}_{channel}"]) for case_id in numbers}


def refuse_same_ids(cases: Iterable[Case]) -> None:
    """Refuse cases whose results would overwrite each other.

    Raises:
        MedsegError: E_DUPLICATE_ID for ids that are equal or differ only in case.
    """
    for _, _, error in same_ids(cases):
        raise error


def same_ids(cases: Iterable[Case]) -> Iterator[tuple[Case, Case, MedsegError]]:
    """Each two cases with ids that are equal or differ only in case, and the refusal of both."""
    seen: dict[str, Case] = {}
    for case in cases:
        other = seen.setdefault(case.case_id.casefold(), case)
        if other is not case:
            yield (
                other,
                case,
                MedsegError(
                    Code.DUPLICATE_ID,
                    "two cases have the same id"
                    + ("" if other.case_id == case.case_id else " but for upper and lower case"),
                    where=f"{other.case_id}, {case.case_id}",
                    expected="ids that differ on every file system",
                    got=", ".join(_place(c.images[0]) if c.images else c.case_id for c in (other, case)),
                    remedy="results are written under the id: rename one of them",
                ),
            )


def _place(source: Source) -> str:
    return f"{source.parent.name}/{source.name}" if isinstance(source, Path) else source.name
