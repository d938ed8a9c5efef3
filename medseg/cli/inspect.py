"""medseg inspect."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.inspect_model import OfDataOrModel
from medseg.cli.reading import reading_options

if TYPE_CHECKING:
    from medseg.formats import Reading

EXIT_BAD_CASES = 3
"""All cases were read, and some cannot be used."""
MAX_THREADS = 4
"""Cases that are read at a time: memory holds as many."""


@click.command(
    "inspect", cls=OfDataOrModel, short_help="Show what lies in a folder of scans, or what a network is made of."
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of tables.")
@click.option("--cases/--no-cases", default=None,
              help="Read every case with its label, as a training would; or only list the images. By default, cases "
                   "where there are label files.")  # fmt: skip
@click.option("--labels", metavar="TABLE", help='What data.labels of the training will be: "{liver: 1, spleen: 2}".')
@click.option("--modality", metavar="CT|MR|...", help="What data.modality of the training will be.")
@click.option("--pictures", metavar="FOLDER", type=click.Path(path_type=Path),
              help="Also save a picture (PNG) of each scan: three planes, with what was drawn on them. This reads the "
                   "voxels, and finds more that is wrong than the headers tell.")  # fmt: skip
@click.option("--paths", is_flag=True, help="Show in which folder each series lies (names of folders may be names).")
@reading_options
def inspect(
    path: Path,
    as_json: bool,
    cases: bool | None,
    labels: str | None,
    modality: str | None,
    pictures: Path | None,
    paths: bool,
    reading: Reading,
) -> None:
    """Show what lies at PATH, without changing anything.

    PATH with images and label files (any layout that medseg train takes): the preflight of a training. Every case is
    read once, and all that is wrong is listed with its code, however much it is. --labels and --modality say what the
    training will be told. Exit status: 0 nothing is wrong, 3 some cases cannot be used, 2 there is nothing to read.

    PATH with scans alone (a tree or zip of DICOM files, a NIfTI file, a picture, a folder of these): which scans, who
    drew on them, what is wrong with them, from their headers. Series are named by modality and a digest of their UID,
    patients by a digest: nothing about the patient is shown. The exit status is 0 also where scans are broken; --json
    says which. --cases reads a tree of DICOM files with SEG or RTSTRUCT as training data.

    In place of PATH a run, a plan or model=NAME: the network's layers, what they see and cost, and what they have
    learnt; medseg inspect model=unet --help says more.

    \b
      medseg inspect DATA                           look before you train: all bad cases at once
      medseg inspect EXPORT --cases --labels "{tumour: [GTV-1, gtv]}"
      medseg inspect EXPORT
      medseg inspect EXPORT --pictures pictures
      medseg inspect EXPORT --paths                 where each series lies
      medseg inspect EXPORT --json > inventory.json
      medseg inspect model=unet_2015 --size 572x572 the layers of a network
      medseg inspect RUN --image SCAN -o FOLDER     what it has learnt: filters, feature maps, saliency
    """
    from rich.console import Console

    from medseg.data.cases import is_labelled

    if cases is None:
        cases = pictures is None and not paths and reading.series is None and is_labelled(path)
    if cases:
        from medseg.formats.label_table import table_of
        from medseg.reports.inventory_cases import inspect_cases

        problems = inspect_cases(
            path,
            Console(),
            as_json=as_json,
            labels=None if labels is None else table_of(labels),
            modality=modality,
            reading=replace(reading, channels=False),
            num_threads=min(MAX_THREADS, os.cpu_count() or 1),
        )
        if problems:
            sys.exit(EXIT_BAD_CASES)
        return
    from medseg.reports.inventory import inspect_path

    inspect_path(path, Console(), as_json=as_json, pictures=pictures, paths=paths, reading=reading)
