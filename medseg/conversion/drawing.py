"""Label files as SEG and RTSTRUCT on the series that they were drawn on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from medseg import __version__
from medseg.conversion.options import Options, check_targets, say_written
from medseg.errors import Code, MedsegError
from medseg.formats import open_label, read_grid
from medseg.formats.atomic import make_folder
from medseg.formats.content import content_in_words
from medseg.formats.dicom.export import ENDINGS, IDENTIFIERS_REMARK, Form, write_annotation
from medseg.formats.dicom.structures import Algorithm
from medseg.formats.label_table import labels_for, table_of
from medseg.formats.remarks import gathered_warnings
from medseg.label_values import integer_values
from medseg.labels import IGNORE_INDEX, Labels
from medseg.volume import Volume

MANUAL = Algorithm("manual", __version__, automatic=False)
"""Nobody says who drew a label file: it may as well be a person."""


def draw(source: Path, target: Path, console: Console, options: Options, form: Form) -> list[Path]:
    """A label file as SEG or RTSTRUCT.

    Raises:
        MedsegError: E_OUTPUT for another output, E_GRID if the label does not lie on the series, E_LABEL for values
            without a name, and what reading and writing refuse.
    """
    image = options.image
    if form is Form.NIFTI or image is None:
        content = content_in_words(source)
        kinds = " or ".join(str(f) for f in ENDINGS if f is not Form.NIFTI)
        raise MedsegError(
            Code.OUTPUT,
            f"a label becomes {form} on the DICOM series that it was drawn on"
            if form is not Form.NIFTI
            else "this file is not DICOM: there is nothing to convert to NIfTI",
            where=source.name,
            got=f"its content is {content}" if form is Form.NIFTI and content is not None else None,
            expected=f"medseg convert label.nii.gz out{ENDINGS[Form.DICOM_SEG]} --image SERIES",
            remedy="name the series with --image" if form is not Form.NIFTI else f"choose --format {kinds}",
        )
    with console.status("reading"), gathered_warnings() as warnings:
        from medseg.formats.dicom.series import series_files

        label, labels = _read_label(source, options)
        files = series_files(image, options.reading)
        check_targets([target], [source, *files], overwrite=options.overwrite)
        label = _onto_series(label, source, image, options)
        make_folder(target.parent)
        parts = labels.parts if labels.regions else None
        write_annotation(target, form, label, labels.foreground, files, MANUAL, parts=parts)
    console.print(f"note: {IDENTIFIERS_REMARK}", style="yellow", highlight=False, soft_wrap=True)
    say_written(console, target, label, warnings, ", ".join(labels.foreground))
    return [target]


def _read_label(source: Path, options: Options) -> tuple[Volume, Labels]:
    """Class indices and the classes: of --labels, of a table beside the file, else one for each value. Voxels that the
    table ignores are not drawn."""
    label = open_label(source, options.reading)
    values = integer_values(label.array, where=source.name)
    labels = Labels.from_mapping(table_of(options.labels)) if options.labels is not None else labels_for(source)
    if labels is None:
        found = [int(v) for v in np.unique(values) if v]
        expected = "0 for the background and a positive whole number for each structure"
        if not found:
            raise MedsegError(
                Code.LABEL,
                "nothing is drawn in the file",
                where=source.name,
                expected=expected,
                got="nothing but 0",
                remedy='check that it is the right file; or name what it would hold: --labels "{liver: 1}"',
            )
        if found[0] < 0 or len(found) >= IGNORE_INDEX:
            raise MedsegError(
                Code.LABEL,
                "this looks like a scan, not a label map",
                where=source.name,
                expected=expected,
                got=f"{len(found)} values from {found[0]} to {found[-1]}",
                remedy="give the label file here; the scan that it lies on goes behind --image",
            )
        labels = Labels.from_mapping({f"structure_{value}": value for value in found})
    try:
        indices = labels.to_index(values, where=source.name)
        indices[indices == IGNORE_INDEX] = 0
    except MedsegError as error:
        raise MedsegError(
            error.code, error.message, where=source.name, expected=error.expected, got=error.got,
            remedy='name every value: --labels "{liver: 1, background: [0, 2]}" leaves 2 out',
        ) from error  # fmt: skip
    return Volume(indices, label.grid), labels


def _onto_series(label: Volume, source: Path, image: Path, options: Options) -> Volume:
    """The label in the series' order of axes; E_GRID where it lies elsewhere."""
    grid = read_grid(image, options.reading)
    if not grid.is_picture and not label.grid.is_picture:
        label = label.reoriented(grid.orientation)
    difference = grid.difference(label.grid)
    if difference is None:
        return Volume(label.array, grid)
    raise MedsegError(
        Code.GRID,
        f"the label does not lie on the grid of the series: {difference}",
        where=source.name,
        expected=f"shape {grid.shape}",
        got=f"shape {label.grid.shape}",
        remedy="check that it belongs to this series; a label that was resampled must be brought back to its scan",
    )
