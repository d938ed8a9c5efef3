"""Cases: what lies in a folder, and the arrays of one case.

`find_cases` for training (images with labels), `find_inputs` for prediction, `load_image` and `load_label` to open
what they found. The layouts that are recognised stand in `medseg.data.layouts`, the tables in `medseg.data.manifest`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medseg.data.layouts import (
    CHANNEL_SUFFIX,
    IMAGE_FOLDERS,
    Case,
    DataFolder,
    Found,
    add_entry,
    folder_named,
    folder_per_case,
    image_entries,
    is_series,
    labels_beside_images,
    name_some,
    paired_folders,
    split_off_labels,
    visible,
)
from medseg.data.manifest import is_manifest, read_dataset_json, read_manifest
from medseg.errors import Code, MedsegError
from medseg.formats import (
    IMAGE_SUFFIXES,
    STRICT,
    Reading,
    is_dicom,
    is_image_file,
    open_label,
    open_volume,
    strip_suffix,
)
from medseg.labels import Labels
from medseg.volume import Grid, Volume

__all__ = ["Case", "DataFolder", "find_cases", "find_inputs", "load_image", "load_label"]

LOOKED_FOR = (
    "a manifest.csv or manifest.json; dataset.json with imagesTr and labelsTr; folders such as images and labels; "
    "one folder per case with a label named seg or …_seg; labels beside the images, named …_seg, …_mask or …_label"
)
"""What `find_cases` knows, for the message of a folder in which it finds nothing."""


def find_cases(root: Path, *, manifest: Path | None = None, require_labels: bool = True) -> DataFolder:
    """Find the cases of a data set.

    Args:
        root: a data folder, or a manifest file itself.
        manifest: CSV or JSON table of the cases; its paths are then relative to `root`.
        require_labels: refuse images without labels; otherwise they are cases without one.
    Raises:
        MedsegError: E_NO_CASES if no layout fits, E_MISSING for an image without a label or the reverse,
            E_DUPLICATE_ID for ids that are equal or differ only in case, E_CHANNELS if cases have other channels.
    """
    if not root.exists():
        raise MedsegError(Code.MISSING, "the data folder is not there", where=root, remedy="check data.root")
    if manifest is None and is_manifest(root):
        root, manifest = root.parent, root
    elif root.name == "dataset.json":
        root = root.parent
    elif not root.is_dir():
        raise MedsegError(
            Code.NO_CASES, "neither a folder nor a manifest", where=root.resolve().name, expected="*.csv or *.json"
        )
    if manifest is None:
        manifest = next((root / name for name in ("manifest.csv", "manifest.json") if (root / name).is_file()), None)
    if manifest is not None:
        folder = read_manifest(manifest, root)
    elif (root / "dataset.json").is_file():
        folder = _from_dataset_json(root, require_labels=require_labels)
    else:
        found = _from_names(root, require_labels=require_labels)
        folder = DataFolder(root, found.layout, tuple(found.cases), channels=found.channels)
    _check(folder, require_labels=require_labels)
    return DataFolder(
        root, folder.layout, tuple(sorted(folder.cases, key=lambda c: c.case_id)), folder.labels, folder.channels
    )


def find_inputs(
    paths: Sequence[Path], *, num_channels: int | None = None, channels: Sequence[str] | None = None
) -> tuple[Case, ...]:
    """The scans that are to be segmented; labels among them are left out.

    Args:
        paths: files, folders of a DICOM series, or folders of many cases: files, channel files (`case_0000`),
            a folder per case, or an `images` folder inside.
        num_channels: how many channels the model takes. It settles whether `_0000` numbers channels or belongs to
            the id; without it, numbers are channels where all ids have the same ones, counted from 0000.
        channels: the names of these channels instead. Files that are named by them (`flair.nii.gz`, `x_flair.nii.gz`)
            are taken in this order, and a folder that holds just these files is one case.
    Returns:
        Cases without labels, sorted by id.
    Raises:
        MedsegError: E_MISSING, E_UNSUPPORTED, E_NO_CASES, E_DUPLICATE_ID if two inputs have the same id, or
            E_CHANNELS if a case has some of the named channels, but not all.
    """
    num_channels = len(channels) if channels else num_channels
    entries: dict[Path, dict[str, tuple[Path, ...]]] = {}
    for path in paths:
        if not path.exists():
            raise MedsegError(Code.MISSING, "the input is not there", where=path, remedy="check the path")
        if path.is_file():
            if not (is_image_file(path) or is_dicom(path)):
                raise MedsegError(Code.UNSUPPORTED, "not an image that can be read", where=path.name)
            add_entry(entries.setdefault(path.resolve().parent, {}), strip_suffix(path.name), (path,))
        elif is_series(path):
            entries.setdefault(path.resolve(), {})[path.resolve().name] = (path,)
        elif channels and (files := _whole_case(path, channels)):
            entries.setdefault(path.resolve(), {})[path.resolve().name] = files
        else:
            entries[path.resolve()] = _inputs_of_folder(path)
    cases = [
        Case(case_id, _in_order(files, channels, case_id), None)
        for group in entries.values()
        for case_id, files in _join_channels(group, num_channels).items()
    ]
    _refuse_same_ids(cases)
    return tuple(sorted(cases, key=lambda c: c.case_id))


def load_image(
    case: Case, *, num_channels: int | None = None, channels: Sequence[str] | None = None, reading: Reading = STRICT
) -> Volume:
    """Open all channels of a case.

    Args:
        case: as found.
        num_channels: how many channels there must be; where it is more than the files, 4D files hold channels.
        channels: their names instead: where all are "CT" (nnU-Net's convention) and the files do not tell a modality,
            as NIfTI does not, it is CT.
        reading: what is asked of the readers beyond their strict defaults.
    Returns:
        float32, shape (C, *grid.shape), on the grid of the first file.
    Raises:
        MedsegError: E_GRID if the files lie on different grids, E_CHANNELS for another number of channels, or what
            the reader refuses.
    """
    num_channels = len(channels) if channels else num_channels
    as_channels = num_channels is not None and num_channels > len(case.images)
    volumes: list[Volume] = []
    for path in case.images:
        volume = open_volume(path, replace(reading, channels=as_channels))
        volumes.append(_onto(volume, volumes[0].grid, case, f"channel file {path.name}") if volumes else volume)
    first = volumes[0]
    array = first.array if len(volumes) == 1 else np.concatenate([v.array for v in volumes])
    if num_channels is not None and len(array) != num_channels:
        raise MedsegError(
            Code.CHANNELS,
            "another number of channels than expected",
            where=case.case_id,
            expected=num_channels,
            got=f"{len(array)} from {len(case.images)} file(s)",
            remedy="give the case all its channels, in the order of the training data",
        )
    modality = first.modality or ("CT" if {name.upper() for name in channels or ()} == {"CT"} else None)
    return Volume(np.ascontiguousarray(array, dtype=np.float32), first.grid, modality)


def load_label(case: Case, labels: Labels, image_grid: Grid) -> Volume:
    """Open a case's label as class indices on the image's grid.

    Returns:
        uint8 class indices, shape image_grid.shape.
    Raises:
        MedsegError: E_MISSING if the case has none, E_GRID if it lies elsewhere, E_LABEL for undeclared values.
    """
    volume = load_label_values(case, image_grid)
    return Volume(labels.to_index(volume.array, where=case.case_id), image_grid, volume.modality)


def load_label_values(case: Case, image_grid: Grid) -> Volume:
    """Like `load_label`, with the values of the file."""
    if case.label is None:
        raise MedsegError(Code.MISSING, "the case has no label", where=case.case_id)
    return _onto(open_label(case.label), image_grid, case, "label")


def _onto(volume: Volume, grid: Grid, case: Case, what: str) -> Volume:
    """A volume in the axis order of `grid`: stored as RAS or LPS, the same voxels are the same grid."""
    if volume.grid.ndim == grid.ndim == 3 and not (volume.grid.is_picture or grid.is_picture):
        volume = volume.reoriented(grid.orientation)
    difference = grid.difference(volume.grid)
    if difference is None:
        return Volume(np.ascontiguousarray(volume.array), grid, volume.modality)
    raise MedsegError(
        Code.GRID,
        f"the {what} does not lie on the image's grid: {difference}",
        where=case.case_id,
        expected=_describe(grid),
        got=_describe(volume.grid),
        remedy="resample it to the image's grid, or check that it belongs to this image",
    )


def _describe(grid: Grid) -> str:
    if grid.is_picture:
        return f"shape {grid.shape}"
    spacing = ", ".join(f"{s:.4g}" for s in grid.spacing_mm)
    origin = ", ".join(f"{o:.4g}" for o in grid.affine[:-1, -1])
    return f"shape {grid.shape}, spacing ({spacing}) mm, origin ({origin}) mm, orientation {grid.orientation}"


def _from_names(root: Path, *, require_labels: bool) -> Found:
    for layout in (paired_folders, folder_per_case, labels_beside_images):
        found = layout(root, require_labels=require_labels)
        if found is not None and found.cases:
            return found
    entries = {} if require_labels else image_entries(root)
    if entries:
        return Found("images without labels", [Case(name, files, None) for name, files in entries.items()], None)
    inside = visible(root)
    better = [p.name for p in inside if p.is_dir() and folder_named(p, IMAGE_FOLDERS) is not None]
    raise MedsegError(
        Code.NO_CASES,
        "no cases were found here",
        where=root.resolve().name,
        expected=LOOKED_FOR,
        got="the folder holds " + (name_some(p.name + "/" * p.is_dir() for p in inside) or "nothing"),
        remedy=f"did you mean its folder {better[0]}?"
        if better
        else "write a manifest.csv with the columns case,image,label (patient, split) beside the data",
    )


def _from_dataset_json(root: Path, *, require_labels: bool) -> DataFolder:
    description = read_dataset_json(root / "dataset.json")
    if description.file_ending is not None and not description.file_ending.lower().endswith(IMAGE_SUFFIXES):
        raise MedsegError(
            Code.UNSUPPORTED, "files with this ending are not read", where="dataset.json", got=description.file_ending
        )
    if description.cases is not None:
        return DataFolder(root, description.layout, description.cases, description.labels, description.channels)
    found = _from_names(root, require_labels=require_labels)
    known = {case.case_id for case in found.cases}
    numbered = {name: match["id"] for name in description.listed if (match := CHANNEL_SUFFIX.fullmatch(name))}
    absent = sorted(name for name in description.listed if name not in known and numbered.get(name) not in known)
    if absent:
        raise MedsegError(
            Code.MISSING,
            f"{len(absent)} training cases of dataset.json are not in the folder",
            where=name_some(absent),
            remedy="complete the folder, or correct the list in dataset.json",
        )
    return DataFolder(
        root, description.layout, tuple(found.cases), description.labels, description.channels or found.channels
    )


def _inputs_of_folder(folder: Path) -> dict[str, tuple[Path, ...]]:
    inside = folder_named(folder, IMAGE_FOLDERS) or folder
    entries = image_entries(inside)
    images, _ = split_off_labels({name: files[0] for name, files in entries.items()})
    if not images:
        raise MedsegError(
            Code.NO_CASES,
            "no images were found here",
            where=folder.resolve().name,
            expected="image files, DICOM series, or a folder of them per case",
            got="the folder holds " + (name_some(p.name + "/" * p.is_dir() for p in visible(folder)) or "nothing"),
        )
    return {name: entries[name] for name in images}


def _whole_case(folder: Path, channels: Sequence[str]) -> tuple[Path, ...] | None:
    """The files of a folder that holds one case: one file for each of several named channels, and no other image."""
    files = [path for path in visible(folder) if is_image_file(path)]
    named = [[f for f in files if _is_named_by(f, channel)] for channel in channels]
    if len(channels) < 2 or len(files) != len(channels) or any(len(found) != 1 for found in named):
        return None
    return tuple(found[0] for found in named)


def _in_order(files: tuple[Path, ...], channels: Sequence[str] | None, case_id: str) -> tuple[Path, ...]:
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


def _is_named_by(file: Path, channel: str) -> bool:
    stem = strip_suffix(file.name).lower()
    return stem == channel.lower() or stem.endswith(("_" + channel.lower(), "-" + channel.lower()))


def _join_channels(entries: Mapping[str, tuple[Path, ...]], num_channels: int | None) -> dict[str, tuple[Path, ...]]:
    """Join `case_0000`, `case_0001` where these numbers are channels (see `find_inputs`)."""
    matches = {name: CHANNEL_SUFFIX.fullmatch(name) for name in entries}
    numbers: dict[str, list[str]] = {}
    for match in matches.values():
        if match is None:
            return dict(entries)
        numbers.setdefault(match["id"], []).append(match["channel"])
    kinds = {tuple(sorted(channels)) for channels in numbers.values()}
    kind = kinds.pop() if kinds else ()
    counted = kind == tuple(f"{channel:04d}" for channel in range(len(kind)))
    if kinds or not counted or (num_channels is not None and len(kind) not in (1, num_channels)):
        return dict(entries)
    return {case_id: tuple(path for channel in kind for path in entries[f"{case_id}_{channel}"]) for case_id in numbers}


def _check(folder: DataFolder, *, require_labels: bool) -> None:
    if not folder.cases:
        raise MedsegError(Code.NO_CASES, "there is no case", where=folder.root.resolve().name, expected=LOOKED_FOR)
    _refuse_same_ids(folder.cases)
    alone = [case.case_id for case in folder.cases if case.label is None and case.split != "test"]
    if alone and require_labels:
        raise MedsegError(
            Code.MISSING,
            f"{len(alone)} case(s) have no label",
            where=name_some(alone),
            remedy="add their labels, leave them out, or mark them as test in the manifest's split column",
        )
    counts = Counter(len(case.images) for case in folder.cases)
    usual = counts.most_common(1)[0][0]
    others = [case for case in folder.cases if len(case.images) != usual]
    if others:
        raise MedsegError(
            Code.CHANNELS,
            f"{len(others)} cases have another number of image files than the rest",
            where=name_some(case.case_id for case in others),
            expected=f"{usual} files",
            got=f"{others[0].case_id}: {len(others[0].images)}",
        )


def _refuse_same_ids(cases: Iterable[Case]) -> None:
    seen: dict[str, Case] = {}
    for case in cases:
        other = seen.setdefault(case.case_id.casefold(), case)
        if other is not case:
            raise MedsegError(
                Code.DUPLICATE_ID,
                "two cases have the same id"
                + ("" if other.case_id == case.case_id else " but for upper and lower case"),
                where=f"{other.case_id}, {case.case_id}",
                got=", ".join(f"{c.images[0].parent.name}/{c.images[0].name}" for c in (other, case)),
                remedy="results are written under the id: rename one of them",
            )
