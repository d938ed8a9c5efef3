"""Cases: what lies in a folder, and the arrays of one case.

`find_cases` for training (images with labels), `find_inputs` for prediction (`medseg.data.inputs`), `load_image` and
`load_label` to open what they found. The layouts that are recognised stand in `medseg.data.layouts`, the tables in
`medseg.data.manifest`, trees of DICOM files in `medseg.data.dicom_tree`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.data.inputs import find_inputs, same_ids
from medseg.data.layouts import (
    CHANNEL_SUFFIX,
    IMAGE_FOLDERS,
    Bad,
    Case,
    DataFolder,
    folder_named,
    has_label_files,
    image_entries,
    name_some,
    visible,
)
from medseg.data.manifest import absent_files, exists, is_manifest, read_dataset_json, read_manifest
from medseg.data.pairing import Found, folder_per_case, labels_beside_images, paired_folders, refuse_or_note
from medseg.errors import Code, MedsegError
from medseg.formats import IMAGE_SUFFIXES, STRICT, Reading, open_label, open_volume
from medseg.formats.dicom.annotations import read_label
from medseg.formats.dicom.archive import ZIP_REMEDY, is_zip, unpacked
from medseg.formats.label_table import read_labels
from medseg.labels import TABLE_FILE, Labels
from medseg.volume import Grid, Volume

__all__ = ["Case", "DataFolder", "find_cases", "find_inputs", "is_labelled", "load_image", "load_label"]

LOOKED_FOR = (
    "a manifest.csv or manifest.json; dataset.json with imagesTr and labelsTr; folders such as images and labels; "
    "one folder per case with a label named seg or …_seg; labels beside the images, named …_seg, …_mask or …_label; "
    "DICOM series with SEG or RTSTRUCT files"
)
"""What `find_cases` knows, for the message of a folder in which it finds nothing."""


def find_cases(
    root: Path,
    *,
    manifest: Path | None = None,
    require_labels: bool = True,
    labels: Mapping[str, Any] | None = None,
    modality: str | None = None,
    reading: Reading = STRICT,
    progress: Callable[[int, int], None] | None = None,
    strict: bool = True,
) -> DataFolder:
    """Find the cases of a data set.

    Args:
        root: a data folder, a zip of one, or a manifest file itself.
        manifest: CSV or JSON table of the cases; its paths are then relative to `root`.
        require_labels: refuse images without labels; otherwise they are cases without one.
        labels: of a tree of DICOM files: which structures mean a class (see `medseg.data.structure_table`).
        modality: of a tree of DICOM files: take the series of this modality only.
        reading: what is asked of the readers beyond their strict defaults.
        progress: called with (files looked at, all files) where a tree of DICOM files is searched.
        strict: refuse what is wrong with single cases. Else it is noted in `DataFolder.problems`, and the others are
            found.
    Raises:
        MedsegError: E_NO_CASES if no layout fits, E_MISSING for an image without a label or the reverse,
            E_DUPLICATE_ID for ids that are equal or differ only in case, E_CHANNELS if cases have other channels,
            E_CONFIG for a modality where the data are no tree, and what `read_tree` refuses.
    """
    root, manifest = _located(root, manifest)
    bad: Bad | None = None if strict else []
    if manifest is not None:
        folder = read_manifest(manifest, root)
    elif (root / "dataset.json").is_file():
        folder = _from_dataset_json(root, bad, require_labels=require_labels)
    else:
        folder = _from_files(root, bad, require_labels, labels, modality, reading, progress)
    if modality is not None and folder.structures is None:
        raise MedsegError(
            Code.CONFIG,
            "a modality chooses among the annotated series of a tree of DICOM files, and these data are none",
            where="data.modality",
            got=f"{modality}; the data are: {folder.layout}",
            remedy="leave data.modality out",
        )
    _check(folder, bad, require_labels=require_labels)
    refused = {case_id for case_id, _ in bad or ()}
    cases = tuple(sorted((c for c in folder.cases if c.case_id not in refused), key=lambda c: c.case_id))
    if bad and not cases:
        raise bad[0][1]
    return replace(folder, root=root, cases=cases, problems=(*folder.problems, *(bad or ())))


def is_labelled(root: Path) -> bool:
    """Whether a path is a data set by its names: a table of cases, or a folder with files that are named as labels."""
    if not exists(root):
        return False
    if not (root.is_dir() or is_zip(root)):
        return is_manifest(root) or root.name == "dataset.json"
    root, manifest = _located(root, None)
    return manifest is not None or (root / "dataset.json").is_file() or has_label_files(root)


def _located(root: Path, manifest: Path | None) -> tuple[Path, Path | None]:
    """The data folder and the table of its cases, where there is one."""
    if not exists(root):
        raise MedsegError(
            Code.MISSING,
            "the data folder is not there",
            where=root,
            expected="a folder, a zip, *.csv or *.json",
            got="nothing",
            remedy="check data.root",
        )
    if is_zip(root):
        root = unpacked(root)
        inside = visible(root)
        root = inside[0] if len(inside) == 1 and inside[0].is_dir() else root
    if manifest is None and is_manifest(root):
        root, manifest = root.parent, root
    elif root.name == "dataset.json":
        root = root.parent
    elif not root.is_dir():
        raise MedsegError(
            Code.NO_CASES,
            "neither a folder nor a manifest",
            where=root.resolve().name,
            expected="a folder, a zip, *.csv or *.json",
            got="another kind of file",
            remedy="name the folder that holds the images and labels",
        )
    if manifest is None:
        manifest = next((root / name for name in ("manifest.csv", "manifest.json") if (root / name).is_file()), None)
    return root, manifest


def _from_files(
    root: Path,
    bad: Bad | None,
    require_labels: bool,
    labels: Mapping[str, Any] | None,
    modality: str | None,
    reading: Reading,
    progress: Callable[[int, int], None] | None,
) -> DataFolder:
    """A tree of DICOM files if it holds annotations, and no label files; else what the names tell."""
    if not has_label_files(root):
        from medseg.data.dicom_tree import read_tree

        tree = read_tree(
            root,
            labels=labels,
            modality=modality,
            require_labels=require_labels,
            without_preamble=reading.without_preamble,
            progress=progress,
        )
        if tree is not None:
            return tree
    found = _from_names(root, bad, require_labels=require_labels)
    names = read_labels(root / TABLE_FILE)  # `medseg convert` of a tree writes it
    return DataFolder(
        root, found.layout, tuple(found.cases), None if names is None else names.to_json(), found.channels
    )


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
    for source in case.images:
        volume = open_volume(source, replace(reading, channels=as_channels))
        volumes.append(_onto(volume, volumes[0].grid, case, f"channel file {source.name}") if volumes else volume)
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
    told = {volume.modality for volume in volumes}
    modality = (told.pop() if len(told) == 1 else None) or (
        "CT" if {name.upper() for name in channels or ()} == {"CT"} else None
    )
    notes = tuple(dict.fromkeys(note for volume in volumes for note in volume.notes))
    return Volume(np.ascontiguousarray(array, dtype=np.float32), first.grid, modality or None, notes)


def blank_label(grid: Grid) -> Volume:
    """The label of a case that is learnt from without one (`medseg.labels.UNLABELLED`): background alone."""
    return Volume(np.zeros(grid.shape, dtype=np.uint8), grid)


def load_label(case: Case, labels: Labels, image_grid: Grid, reading: Reading = STRICT) -> Volume:
    """Open a case's label as class indices on the image's grid.

    Returns:
        uint8 class indices, shape image_grid.shape.
    Raises:
        MedsegError: E_MISSING if the case has none, E_GRID if it lies elsewhere, E_LABEL for undeclared values.
    """
    volume = load_label_values(case, image_grid, reading)
    return replace(volume, array=labels.to_index(volume.array, where=case.case_id))


def load_label_values(case: Case, image_grid: Grid, reading: Reading = STRICT) -> Volume:
    """Like `load_label`, with the values of the file; what is drawn has the values 0, 1, 2, … of its classes."""
    if case.label is None:
        raise MedsegError(
            Code.MISSING,
            "the case has no label",
            where=case.case_id,
            expected="a label file or annotations",
            got="an image alone",
            remedy="add the label, or leave the case out",
        )
    if isinstance(case.label, Path):
        return _onto(open_label(case.label, reading), image_grid, case, "label")
    return read_label(case.label, image_grid)


def _onto(volume: Volume, grid: Grid, case: Case, what: str) -> Volume:
    """A volume in the axis order of `grid`: stored as RAS or LPS, the same voxels are the same grid."""
    if volume.grid.ndim == grid.ndim == 3 and not (volume.grid.is_picture or grid.is_picture):
        volume = volume.reoriented(grid.orientation)
    difference = grid.difference(volume.grid)
    if difference is None:
        return replace(volume, array=np.ascontiguousarray(volume.array), grid=grid)
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


def _from_names(root: Path, bad: Bad | None, *, require_labels: bool) -> Found:
    for layout in (paired_folders, folder_per_case, labels_beside_images):
        its: Bad | None = None if bad is None else []
        found = layout(root, require_labels=require_labels, bad=its)
        if found is not None and found.cases:
            if bad is not None:
                bad += its or ()
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
        else ZIP_REMEDY
        if any(map(is_zip, inside))
        else "write a manifest.csv with the columns case,image,label (patient, split) beside the data",
    )


def _from_dataset_json(root: Path, bad: Bad | None, *, require_labels: bool) -> DataFolder:
    description = read_dataset_json(root / "dataset.json")
    if description.file_ending is not None and not description.file_ending.lower().endswith(IMAGE_SUFFIXES):
        raise MedsegError(
            Code.UNSUPPORTED,
            "files with this ending are not read",
            where="dataset.json",
            expected=" | ".join(IMAGE_SUFFIXES),
            got=description.file_ending,
            remedy="convert the images, for example to .nii.gz, and correct file_ending",
        )
    if description.cases is not None:
        return DataFolder(root, description.layout, description.cases, description.labels, description.channels)
    found = _from_names(root, bad, require_labels=require_labels)
    known = {case.case_id for case in found.cases} | {case_id for case_id, _ in bad or ()}
    numbered = {name: match["id"] for name in description.listed if (match := CHANNEL_SUFFIX.fullmatch(name))}
    refuse_or_note(
        bad,
        sorted(name for name in description.listed if name not in known and numbered.get(name) not in known),
        lambda ids: MedsegError(
            Code.MISSING,
            f"{len(ids)} training cases of dataset.json are not in the folder"
            if bad is None
            else "the case is in dataset.json, but not in the folder",
            where=name_some(ids),
            expected=f"its files in imagesTr and labelsTr, as {len(known)} cases have them",
            remedy="complete the folder, or correct the list in dataset.json",
        ),
    )
    return DataFolder(
        root, description.layout, tuple(found.cases), description.labels, description.channels or found.channels
    )


def _check(folder: DataFolder, bad: Bad | None, *, require_labels: bool) -> None:
    """Refuse, or note, what names tell of single cases."""
    if not folder.cases:
        raise MedsegError(
            Code.NO_CASES,
            "there is no case",
            where=folder.root.resolve().name,
            expected=LOOKED_FOR,
            got=f"{folder.layout} without any",
            remedy="check data.root",
        )
    for one, other, error in same_ids(folder.cases):
        if bad is None:
            raise error
        bad += [(one.case_id, error), (other.case_id, error)]
    by_id = {case.case_id: case for case in folder.cases}
    absent = {case.case_id: names for case in folder.cases if (names := absent_files(case))}
    refuse_or_note(
        bad,
        list(absent),
        lambda ids: MedsegError(
            Code.MISSING,
            f"{sum(len(absent[i]) for i in ids)} files of the table of cases are not there",
            where=name_some(f"{i}: {name}" for i in ids for name in absent[i]),
            expected=f"paths below {folder.root.resolve().name}",
            remedy="paths are relative to the table's folder (to data.root where both are given)",
        ),
    )
    refuse_or_note(
        bad,
        [case.case_id for case in folder.cases if require_labels and case.label is None and case.split != "test"],
        lambda ids: MedsegError(
            Code.MISSING,
            f"{len(ids)} case(s) have no label" if len(ids) > 1 else "the case has no label",
            where=name_some(ids),
            expected="a label for each case that is not for test",
            remedy="add their labels, leave them out, or mark them as test in the manifest's split column",
        ),
    )
    counts = Counter(len(case.images) for case in folder.cases)
    usual = counts.most_common(1)[0][0]
    refuse_or_note(
        bad,
        [case.case_id for case in folder.cases if len(case.images) != usual],
        lambda ids: MedsegError(
            Code.CHANNELS,
            f"{len(ids)} cases have another number of image files than the rest"
            if len(ids) > 1
            else "another number of image files than the rest",
            where=name_some(ids),
            expected=f"{usual} files",
            got=f"{ids[0]}: {len(by_id[ids[0]].images)}",
            remedy="give every case the same channels, or leave these out",
        ),
    )
