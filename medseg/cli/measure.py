"""medseg measure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.reading import reading_options

if TYPE_CHECKING:
    from medseg.formats import Reading

FAMILIES = "shape,intensity,histogram,glcm,glrlm,glszm,gldm,ngtdm,edge"

TEXTURE_FAMILIES = {"glcm", "glrlm", "glszm", "gldm", "ngtdm"}
FLAT = 2.0
"""Voxels that are longer than this by their width are spoken of."""


@click.command("measure", short_help="Features of structures: shape, intensity, texture, edges; embeddings.")
@click.argument("images", metavar="IMAGE", type=click.Path(path_type=Path))
@click.argument("labels", metavar="[LABEL]", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The table: a CSV file.")
@click.option("--label", "wanted", metavar="NAME", multiple=True,
              help="A structure, by name or by its value; several times for several. Else all.")  # fmt: skip
@click.option("--labels", "names", metavar="TABLE",
              help='What the values mean: "{tumour: 1, oedema: [2, 3]}"; else what a table or dataset.json beside the '
              "labels says, else label_1 and so on.")  # fmt: skip
@click.option("--families", metavar="NAMES", default=FAMILIES, show_default=True,
              help="Which features, between commas; none for --embeddings alone.")  # fmt: skip
@click.option("--bins", type=int, help="Grey levels between minimum and maximum of the structure (32 if neither this "
              "nor --bin-width is given): for units without a meaning, as of MR.")  # fmt: skip
@click.option("--bin-width", type=float, help="Width of a grey level instead, in units of the image: for CT, say 25.")
@click.option("--bin-origin", type=float,
              help="Where bins of that width begin; else at the lower end of --range, else at the structure's "
              "minimum.")  # fmt: skip
@click.option("--range", "intensities", type=float, nargs=2, metavar="LOW HIGH",
              help="Only voxels between these intensities count (not for the shape).")  # fmt: skip
@click.option("--outliers", type=float, metavar="SD",
              help="Only voxels within so many standard deviations of the structure's mean count.")  # fmt: skip
@click.option("--spacing", metavar="MM",
              help="Resample to cubes of this size first, or to three sizes between commas (slice, row, "
              "column).")  # fmt: skip
@click.option("--order", default=3, show_default=True, type=int, help="Spline of the resampling: 1 (linear) or 3.")
@click.option("--texture", default="3d", show_default=True,
              type=click.Choice(["3d", "3d-merged", "2.5d", "2.5d-merged", "2d", "2d-merged"]),
              help="Neighbours in all directions, or within slices; see docs/measure.md.")  # fmt: skip
@click.option("--edge-reach", default=5.0, show_default=True, help="How far around its border, in mm (or pixels).")
@click.option("--channel", type=int, help="Which channel, from 0 on, where the images have several.")
@click.option("--embeddings", metavar="RUN", type=click.Path(path_type=Path),
              help="Also what this trained network makes of each structure (without LABEL: of each scan): a run that "
              "segments, or a pretraining.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="Where the network runs: cpu, cuda, mps.")
@click.option("--patients", metavar="TABLE", type=click.Path(path_type=Path),
              help="Whose each case is: a CSV with the columns case and patient.")  # fmt: skip
@click.option("--on-bad-case", default="error", show_default=True, type=click.Choice(["error", "skip"]),
              help="A case that cannot be measured: end, or a row that says why.")  # fmt: skip
@click.option("--threads", default=2, show_default=True, help="Cases measured at a time.")
@reading_options
def measure(
    images: Path,
    labels: Path | None,
    output: Path,
    wanted: tuple[str, ...],
    names: str | None,
    families: str,
    bins: int | None,
    bin_width: float | None,
    bin_origin: float | None,
    intensities: tuple[float, float] | None,
    outliers: float | None,
    spacing: str | None,
    order: int,
    texture: str,
    edge_reach: float,
    channel: int | None,
    embeddings: Path | None,
    device: str,
    patients: Path | None,
    on_bad_case: str,
    threads: int,
    reading: Reading,
) -> None:
    """Measure the structures of LABEL in IMAGE: two files, or two folders with the same case names.

    150 features, to the definitions of the IBSI where it has them; one row for each case and structure, which also says
    how it was measured: a table for statistics. LABEL may be a SEG or RTSTRUCT file; of a tree of DICOM files that
    holds such files, name the tree twice. Features that do not exist (of an empty structure, of a single voxel) are
    empty, and the column missing says why.

    \b
      medseg measure scan.nii.gz label.nii.gz -o features.csv
      medseg measure ct labels -o features.csv --bin-width 25 --spacing 1 --label tumour --labels "{tumour: 1}"
      medseg measure SERIES rtstruct.dcm -o features.csv --label GTV
      medseg measure EXPORT EXPORT -o features.csv --on-bad-case skip
      medseg measure scans labels --embeddings RUN --families none -o embeddings.csv
      medseg measure scans --embeddings RUN -o embeddings.csv
    """
    if labels is None and embeddings is None:
        raise click.UsageError("LABEL is missing: features are of structures. Without it, --embeddings RUN")
    if families == "none" and embeddings is None:
        raise click.UsageError("--families none leaves nothing to measure without --embeddings RUN")
    if threads < 1:
        raise click.UsageError("--threads takes at least 1")
    from rich.console import Console

    from medseg.features.settings import Settings
    from medseg.formats.atomic import make_folder
    from medseg.formats.label_table import table_of
    from medseg.formats.remarks import gathered_warnings
    from medseg.labels import Labels
    from medseg.measurement.cases import find_cases
    from medseg.measurement.regions import check_wanted
    from medseg.measurement.table import measure_cases, write_table
    from medseg.reports.pairs import declared_labels
    from medseg.reports.progress import counting_bar

    chosen = () if families == "none" else tuple(name.strip() for name in families.split(","))
    settings = Settings(
        families=chosen,
        bin_count=bins if bins is not None or bin_width is not None else 32,
        bin_width=bin_width,
        bin_origin=bin_origin,
        intensities=intensities,
        outliers=outliers,
        spacing_mm=_numbers(spacing),
        order=order,
        texture=texture,
        edge_reach_mm=edge_reach,
    )
    console = Console()
    embedder = None
    if embeddings is not None:
        from medseg.measurement.embedding import Embedder

        embedder = Embedder(embeddings, device)
    with gathered_warnings() as warnings:
        cases = find_cases(images, labels, patients=patients, reading=reading)
        table = Labels.from_mapping(table_of(names)) if names is not None else None
        if table is None and labels is not None and any(case.label is not None for case in cases):
            table = declared_labels(labels)
        if any(case.label is not None for case in cases):
            check_wanted(table, wanted)
        with counting_bar(console, "measuring cases") as progress:
            rows = measure_cases(
                cases,
                settings,
                table=table,
                wanted=wanted,
                channel=channel,
                embedder=embedder,
                skip_bad=on_bad_case == "skip",
                num_threads=threads,
                progress=progress,
                reading=reading,
            )
    make_folder(output.parent)
    write_table(output, rows)
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    for row in rows:
        if row.about.get("missing"):
            said = ", ".join(filter(None, (row.about["case"], row.about.get("label"))))
            console.print(f"{said}: {row.about['missing']}", style="yellow", highlight=False, markup=False)
    textured = bool(TEXTURE_FAMILIES & {*chosen}) and texture.startswith("3d") and not settings.spacing_mm
    if textured and any(_flatness(row.about) > FLAT for row in rows):
        console.print(
            f"voxels are more than {FLAT:g} times as long as wide: textures in 3D mix near and far neighbours; "
            "--texture 2.5d keeps to the slices, --spacing makes cubes",
            style="yellow", highlight=False, soft_wrap=True,
        )  # fmt: skip
    num_features = max((len(row.values) for row in rows), default=0)
    console.print(
        f"written: {output} ({len(cases)} cases, {len(rows)} rows, {num_features} features)",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


def _flatness(about: dict[str, str]) -> float:
    """How many times longer than wide the voxels of a case are."""
    sides = [float(side) for side in about.get("spacing", "").split()]
    return max(sides) / min(sides) if sides else 1.0


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise click.UsageError(f"--spacing takes numbers between commas, not {text!r}") from None
