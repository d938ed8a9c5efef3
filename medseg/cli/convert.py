"""medseg convert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.reading import reading_options

if TYPE_CHECKING:
    from medseg.formats import Reading


@click.command("convert", short_help="Convert DICOM, SEG and RTSTRUCT to NIfTI, labels to DICOM, nnU-Net models.")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--image", metavar="SERIES", type=click.Path(path_type=Path),
              help="The scan that a SEG, an RTSTRUCT or a label belongs to.")  # fmt: skip
@click.option("--format", "written_form", metavar="FORMAT",
              help="nifti, dicom-seg or rtstruct; else what the ending of OUT says.")  # fmt: skip
@click.option("--labels", metavar="TABLE",
              help="Which structures become which classes, or which value has which name (see above).")  # fmt: skip
@click.option("--separate", is_flag=True, help="One NIfTI file for each structure, in the folder OUT.")
@click.option("--orientation", metavar="LETTERS",
              help="Where the axes of an nnU-Net model's training files ran to; RAS if not given.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace files that exist already.")
@reading_options
def convert(
    source: Path,
    target: Path,
    image: Path | None,
    written_form: str | None,
    labels: str | None,
    separate: bool,
    orientation: str | None,
    overwrite: bool,
    reading: Reading,
) -> None:
    """Convert IN to OUT, without moving a voxel. What IN is, is decided by its content.

    A DICOM series (a folder, a zip, a file) becomes one NIfTI file; a tree of series becomes a folder: one file for
    each series, and a label file (..._seg.nii.gz) of what was drawn on it. What cannot be converted is listed, all else
    is written.

    \b
      medseg convert SERIES scan.nii.gz
      medseg convert EXPORT nifti_folder
      medseg convert export.zip nifti_folder --labels "{tumour: [GTV-1, gtv]}"

    A SEG or RTSTRUCT file becomes a label file on the grid of its images, which are --image, or found beside it; a SEG
    without --image keeps its own grid. All structures are taken in the order of their numbers, or those that --labels
    names; where they overlap, the later one in --labels takes the voxel.

    \b
      medseg convert seg.dcm label.nii.gz --image SERIES
      medseg convert rtstruct.dcm label.nii.gz --labels "{tumour: [GTV-1, gtv], lung: Lung}"
      medseg convert rtstruct.dcm folder --separate

    A label file becomes a SEG or RTSTRUCT on the DICOM series that it lies on. Names come from --labels, from
    label.json or predictions.json beside it, else structure_1 and so on.

    \b
      medseg convert label.nii.gz label.seg.dcm --image SERIES --labels "{liver: 1, spleen: 2}"
      medseg convert label.nii.gz label.rtstruct.dcm --image SERIES

    A model that nnU-Net v2 trained (the folder with plans.json, or a checkpoint in it) becomes a run for medseg
    predict. nnU-Net does not write down how its training files lay in the patient: --orientation does, as RAS or LPS.

    \b
      medseg convert nnUNetTrainer__nnUNetPlans__3d_fullres/fold_0 RUN --orientation LPS
    """
    from rich.console import Console

    from medseg.conversion import Options
    from medseg.conversion import convert as convert_path
    from medseg.formats.dicom.export import form_named

    options = Options(
        replace(reading, channels=True),
        image,
        None if written_form is None else form_named(written_form),
        labels,
        separate,
        overwrite,
        orientation,
    )
    convert_path(source, target, Console(), options)
