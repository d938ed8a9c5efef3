"""What a user asks of a conversion, and the rules of its outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from medseg.errors import Code, MedsegError
from medseg.formats import NIFTI_SUFFIXES, PICTURE_SUFFIXES, Reading
from medseg.formats.dicom.export import ENDINGS, Form
from medseg.formats.remarks import remarks
from medseg.volume import PIXEL_FRAME, Volume

IMAGE_ENDINGS = NIFTI_SUFFIXES + PICTURE_SUFFIXES
"""Endings that make OUT a file; other names are folders."""
OTHER_ENDINGS = (
    ".nrrd",
    ".mha",
    ".mhd",
    ".hdr",
    ".img",
    ".jpg",
    ".jpeg",
    ".gif",
    ".npy",
    ".npz",
    ".mgz",
    ".zip",
    ".gz",
)
"""Endings of files that are not written; none of them is a name for a folder."""


@dataclass(frozen=True)
class Options:
    """How to convert."""

    reading: Reading
    """As the scans are read."""
    image: Path | None = None
    """The DICOM series (or NIfTI image) on whose grid a label lies."""
    form: Form | None = None
    """What to write, where the ending of the output does not tell."""
    labels: str | None = None
    """A table as the user wrote it: {name: structures} or {name: value}."""
    separate: bool = False
    """One file for each structure."""
    overwrite: bool = False
    orientation: str | None = None
    """Where the axes of the files ran to that a model of nnU-Net was trained on."""


def form_of(target: Path, form: Form | None) -> Form:
    """What is to be written: what was asked for, else what the ending says.

    Raises:
        MedsegError: E_OUTPUT if neither tells, or they disagree.
    """
    name = target.name.lower()
    told = next((f for f, ending in ENDINGS.items() if name.endswith(ending)), None)
    if told is None and name.endswith(IMAGE_ENDINGS):
        told = Form.NIFTI
    is_dicom_name = name.endswith(".dcm")
    if told is None and name.endswith(OTHER_ENDINGS):
        raise MedsegError(
            Code.OUTPUT,
            "files with this ending are not written",
            where=target.name,
            expected=" | ".join([*IMAGE_ENDINGS, *(ending for ending in ENDINGS.values() if ending.endswith(".dcm"))]),
        )
    if form is None:
        if told is None and is_dicom_name:
            raise MedsegError(
                Code.OUTPUT,
                "the output is DICOM, but of which kind?",
                where=target.name,
                remedy="add --format dicom-seg or --format rtstruct, or end the name in .seg.dcm or .rtstruct.dcm",
            )
        return told or Form.NIFTI
    wrong_ending = (form is Form.NIFTI) if is_dicom_name else (form is not Form.NIFTI)
    if wrong_ending or (told is not None and told is not form):
        raise MedsegError(
            Code.OUTPUT,
            f"the ending of the output does not fit --format {form}",
            where=target.name,
            expected=f"a name that ends in {ENDINGS[form]}",
        )
    return form


def is_file_name(target: Path) -> bool:
    """True where OUT names one image file; else it is a folder."""
    return target.name.lower().endswith(IMAGE_ENDINGS) and not target.is_dir()


def check_targets(targets: Iterable[Path], sources: Iterable[Path], *, overwrite: bool) -> None:
    """Make the outputs' folder; refuse to replace anything unless told, and under no circumstances a source.

    Raises:
        MedsegError: E_OUTPUT.
    """
    existing = [path for path in targets if path.exists()]
    if {path.resolve() for path in existing} & {path.resolve() for path in sources}:
        raise MedsegError(
            Code.OUTPUT,
            "the output would replace what it is made from",
            where=existing[0].name,
            remedy="choose another name or folder",
        )
    if existing and not overwrite:
        raise MedsegError(
            Code.OUTPUT,
            "the output exists already" if len(existing) == 1 else f"{len(existing)} outputs exist already",
            where=existing[0].name,
            remedy="choose another name or folder, or replace with --overwrite",
        )


def say_written(console: Console, path: Path, volume: Volume | None, warnings: Iterable[str], more: str = "") -> None:
    """One line for a file, and below it what is to be known of it."""
    size = "" if volume is None else "  " + describe(volume)
    console.print(f"{path}{size}{'  ' + more if more else ''}", highlight=False, soft_wrap=True, markup=False)
    for remark in remarks(() if volume is None else volume.notes, warnings):
        console.print(f"note: {remark}", style="yellow", highlight=False, soft_wrap=True, markup=False)


def describe(volume: Volume) -> str:
    """Shape and spacing of a volume, for a line on the console."""
    grid = volume.grid
    unit = "px" if grid.frame == PIXEL_FRAME else "mm"
    channels = "" if volume.is_label or len(volume.array) == 1 else f", {len(volume.array)} channels"
    spacing = "×".join(f"{s:.3g}" for s in grid.spacing_mm)
    return f"{'×'.join(map(str, grid.shape))} at {spacing} {unit}{channels}"
