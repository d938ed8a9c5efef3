"""Images and their labels, brought together by names alone: the layouts of folders, and what is wrong in them.

A layout refuses what it finds wrong, or, where it is given a list for it, notes it under the name of the case and goes
on with the others.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from medseg.data.layouts import (
    CHANNEL_SUFFIX,
    IMAGE_FOLDERS,
    LABEL_FOLDERS,
    LABEL_NAME,
    Bad,
    Case,
    folder_named,
    image_entries,
    image_paths,
    is_annotation,
    is_label_name,
    is_series,
    name_some,
    split_off_labels,
    visible,
)
from medseg.errors import Code, MedsegError
from medseg.formats import strip_suffix

T = TypeVar("T")


class Found(NamedTuple):
    """Cases that a layout explains."""

    layout: str
    cases: list[Case]
    channels: tuple[str, ...] | None


def refuse_or_note(bad: Bad | None, ids: Sequence[str], error: Callable[[Sequence[str]], MedsegError]) -> None:
    """Refuse cases in one error that names all of them, or note an error of its own for each.

    Args:
        bad: takes the notes; None refuses.
        ids: of the cases; nothing happens where there is none.
        error: makes the error of some ids.
    """
    if not ids:
        return
    if bad is None:
        raise error(ids)
    bad.extend((case_id, error([case_id])) for case_id in ids)


def paired_folders(root: Path, *, require_labels: bool, bad: Bad | None = None) -> Found | None:
    """Layout 2: a folder of images beside a folder of labels."""
    images, labels = folder_named(root, IMAGE_FOLDERS), folder_named(root, LABEL_FOLDERS)
    if images is None or (labels is None and require_labels):
        return None
    cases, channels = match_labels(
        image_entries(images, bad), image_paths(labels, bad) if labels else {}, require_labels=require_labels, bad=bad
    )
    return Found(f"folders {images.name} and {labels.name}" if labels else f"folder {images.name}", cases, channels)


def folder_per_case(root: Path, *, require_labels: bool, bad: Bad | None = None) -> Found | None:
    """Layout 3: in each folder the channels of a case and one file named as its label."""
    images: dict[str, tuple[Path, ...]] = {}
    labels: dict[str, Path] = {}
    several: dict[str, list[Path]] = {}
    for folder in (p for p in visible(root) if p.is_dir()):
        inside = image_paths(folder, bad)
        of_label = [path for name, path in inside.items() if is_label_name(name) and not is_annotation(path)]
        of_image = tuple(path for name, path in inside.items() if not is_label_name(name))
        if is_series(folder):
            of_image = (folder,)
        if len(of_label) > 1:
            several[folder.name] = of_label
            continue
        if of_image:
            images[folder.name] = of_image
            labels.update(dict.fromkeys([folder.name], of_label[0]) if of_label else {})
    if not labels and not (several and bad is None):
        return None
    refuse_or_note(
        bad,
        list(several),
        lambda ids: MedsegError(
            Code.DUPLICATE_ID,
            "two files of a case are named as labels",
            where=name_some(ids),
            expected="one file named seg, mask, label or …_seg, …_mask, …_label",
            got=name_some(p.name for case_id in ids for p in several[case_id]),
            remedy="list the cases in a manifest (case,image,label)",
        ),
    )
    return Found("one folder per case", *match_labels(images, labels, require_labels=require_labels, bad=bad))


def labels_beside_images(root: Path, *, require_labels: bool, bad: Bad | None = None) -> Found | None:
    """Layout 4: images and labels in one folder."""
    images, labels = split_off_labels(image_paths(root, bad))
    if not labels:
        return None
    entries = {name: (path,) for name, path in images.items()}
    return Found("labels beside images", *match_labels(entries, labels, require_labels=require_labels, bad=bad))


def match_labels(
    images: Mapping[str, tuple[Path, ...]], labels: Mapping[str, Path], *, require_labels: bool, bad: Bad | None = None
) -> tuple[list[Case], tuple[str, ...] | None]:
    """Bring images and labels together by their names.

    Args:
        images: as `image_entries` gives them.
        labels: as `image_paths` gives them.
        require_labels: whether an image without a label is refused.
        bad: takes what is wrong with single cases, which are then no cases, if any remain; None refuses it.
    Returns:
        The cases sorted by id, and the names of the channels where files are named by them.
    Raises:
        MedsegError: E_MISSING for an image without a label or a label without an image; E_DUPLICATE_ID for two
            labels of one image; E_CHANNELS if cases have other channel files.
    """
    label_of, files_of, twice = _group(images, labels)
    if not label_of.keys() & files_of.keys() and images and labels:
        # "21_training.tif" and "21_manual1.gif": what all files of a folder end in is not part of the id
        again = _group(_without_common_tail(images), _without_common_tail(labels))
        if again[0].keys() & again[1].keys():
            label_of, files_of, twice = again
    if not label_of.keys() & files_of.keys():
        bad = None  # nothing fits together: one error says more than one for each file
    _refuse_two_labels(twice, bad)
    _refuse_missing(files_of, label_of, bad, require_labels=require_labels)
    if require_labels:
        files_of = {case_id: files for case_id, files in files_of.items() if case_id in label_of}
    channels, others = _channel_names(files_of, bad)
    cases = [
        Case(case_id, tuple(files_of[case_id][key] for key in sorted(files_of[case_id])), label_of.get(case_id))
        for case_id in sorted(files_of.keys() - others)
    ]
    return cases, channels


def _group(
    images: Mapping[str, tuple[Path, ...]], labels: Mapping[str, Path]
) -> tuple[dict[str, Path], dict[str, dict[str, Path]], dict[str, list[Path]]]:
    """Labels by id, for each id its files by channel ("" where there is one), and the labels of ids with several."""
    numbered = {name: match for name in images if (match := CHANNEL_SUFFIX.fullmatch(name))}
    known = set(images) | {match["id"] for match in numbered.values()}
    label_of: dict[str, Path] = {}
    twice: dict[str, list[Path]] = {}
    for name, path in labels.items():
        case_id = _id_of_label(name, known)
        if case_id in label_of:
            twice.setdefault(case_id, [label_of[case_id]]).append(path)
        label_of[case_id] = path
    files_of: dict[str, dict[str, Path]] = {}
    for name, paths in images.items():
        match = numbered.get(name)
        if match and match["id"] in label_of and name not in label_of:
            files_of.setdefault(match["id"], {})[match["channel"]] = paths[0]
        elif len(paths) == 1:
            files_of.setdefault(name, {})[""] = paths[0]
        else:
            files_of.setdefault(name, {}).update({channel_of_file(path, name): path for path in paths})
    return label_of, files_of, twice


def _refuse_two_labels(twice: Mapping[str, list[Path]], bad: Bad | None) -> None:
    refuse_or_note(
        bad,
        list(twice),
        lambda ids: MedsegError(
            Code.DUPLICATE_ID,
            "two labels belong to one image",
            where=name_some(ids),
            expected="one label for each image",
            got=name_some(path.name for case_id in ids for path in twice[case_id]),
            remedy="keep one of them, or name the right one in a manifest",
        ),
    )


def channel_of_file(path: Path, case_id: str) -> str:
    """The channel that a file in a case's own folder is named by: "flair" of `case7/case7_flair.nii.gz`."""
    return strip_suffix(path.name).removeprefix(case_id).lstrip("_-. ")


def _channel_names(
    files_of: Mapping[str, Mapping[str, Path]], bad: Bad | None
) -> tuple[tuple[str, ...] | None, set[str]]:
    """The names that files give to the channels, None where they only number them; and the cases that have others.

    Raises:
        MedsegError: E_CHANNELS naming the cases whose files differ from the other cases'.
    """
    kinds: dict[tuple[str, ...], list[str]] = {}
    for case_id, files in files_of.items():
        kinds.setdefault(() if set(files) <= {"", "0000"} else tuple(sorted(files)), []).append(case_id)
    usual = max(kinds, key=lambda kind: len(kinds[kind]), default=())
    others = [case_id for kind, ids in kinds.items() if kind != usual for case_id in ids]
    refuse_or_note(
        bad,
        others,
        lambda ids: MedsegError(
            Code.CHANNELS,
            f"{len(ids)} cases have other channel files than the rest"
            if len(ids) > 1
            else "other channel files than the rest",
            where=name_some(ids),
            expected="one file" if not usual else "the channels " + ", ".join(usual),
            got=f"{ids[0]}: " + (", ".join(sorted(files_of[ids[0]])).strip() or "one file"),
            remedy="every case needs the same channels under the same names: add the missing files, or leave cases out",
        ),
    )
    names = usual if usual and not all(re.fullmatch(r"\d*", name) for name in usual) else None
    return names, set(others)


def _id_of_label(name: str, known: set[str]) -> str:
    match = None if name in known else LABEL_NAME.fullmatch(name)
    return match["id"] if match and match["id"] in known else name


def _without_common_tail(names: Mapping[str, T]) -> dict[str, T]:
    """The same entries without the `_word` that all names end in; unchanged if there is none."""
    tails = {name[name.rfind("_") :] if "_" in name[1:] else "" for name in names}
    tail = tails.pop() if len(tails) == 1 and len(names) > 1 else ""
    return {name.removesuffix(tail): value for name, value in names.items()}


def _refuse_missing(
    images: Iterable[str], labels: Mapping[str, Path], bad: Bad | None, *, require_labels: bool
) -> None:
    alone = sorted(set(images) - labels.keys())
    extra = sorted(labels.keys() - set(images))
    refuse_or_note(
        bad,
        alone if require_labels else [],
        lambda ids: MedsegError(
            Code.MISSING,
            f"{len(ids)} of {len(set(images))} images have no label" if bad is None else "the image has no label",
            where=name_some(ids),
            expected="a label with the image's name, or with _seg, _mask or _label behind it",
            got=_most_similar(ids[0], extra, "label"),
            remedy="add the labels, take the images away, or list the cases to use in a manifest (case,image,label)",
        ),
    )
    refuse_or_note(
        bad,
        extra,
        lambda ids: MedsegError(
            Code.MISSING,
            f"{len(ids)} labels have no image" if bad is None else "the label has no image",
            where=name_some(ids),
            expected="an image with the label's name",
            got=_most_similar(ids[0], alone, "image"),
            remedy="add the images, take the labels away, or list the cases to use in a manifest (case,image,label)",
        ),
    )


def _most_similar(name: str, candidates: Iterable[str], kind: str) -> str:
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.0)
    return f"the nearest {kind} left over for {name!r} is {close[0]!r}" if close else f"no other {kind} is left over"
