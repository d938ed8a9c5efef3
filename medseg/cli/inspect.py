"""medseg inspect."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("inspect", short_help="Show what lies in a folder of DICOM or images.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of tables.")
@click.option("--pictures", metavar="FOLDER", type=click.Path(path_type=Path),
              help="Also save a picture (PNG) of each scan: three planes, with what was drawn on them. This reads the "
                   "voxels, and finds more that is wrong than the headers tell.")  # fmt: skip
@click.option("--paths", is_flag=True, help="Show in which folder each series lies (names of folders may be names).")
@click.option("--series", metavar="UID", help="Show only this series (its UID, or the name that the table gives it).")
@click.option("--resample-irregular", is_flag=True, help="Judge and draw series as this option of convert reads them.")
@click.option("--without-preamble", is_flag=True, help='Try DICOM on files without "DICM" at byte 128.')
def inspect(
    path: Path,
    as_json: bool,
    pictures: Path | None,
    paths: bool,
    series: str | None,
    resample_irregular: bool,
    without_preamble: bool,
) -> None:
    """Show what lies at PATH, without changing anything: which scans, who drew on them, what is wrong with them.

    PATH is a tree or zip of DICOM files, a NIfTI file or a picture, or a folder of these. Series are named by
    modality and a digest of their UID, patients by a digest: nothing about the patient is shown. The exit status is 0
    also where scans are broken; --json says which.

    \b
      medseg inspect EXPORT
      medseg inspect EXPORT --pictures pictures     look before you train
      medseg inspect EXPORT --paths                 where each series lies
      medseg inspect EXPORT --json > inventory.json
    """
    from rich.console import Console

    from medseg.reports.inventory import inspect_path

    inspect_path(
        path,
        Console(),
        as_json=as_json,
        pictures=pictures,
        paths=paths,
        series=series,
        resample_irregular=resample_irregular,
        without_preamble=without_preamble,
    )
