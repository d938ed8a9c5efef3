"""The table: one row for each structure of each case, with how it was measured."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medseg import __version__
from medseg.errors import Code, MedsegError
from medseg.features.region import Measured, measure_region
from medseg.features.settings import Settings
from medseg.formats import STRICT, Reading, is_image_file, open_label, read_grid
from medseg.formats.atomic import whole_file
from medseg.labels import Labels
from medseg.measurement.cases import MeasuredCase, open_channel
from medseg.measurement.columns import ABOUT
from medseg.measurement.regions import Region, regions_of_annotations, regions_of_map
from medseg.volume import PIXEL_FRAME, Volume

if TYPE_CHECKING:
    from medseg.measurement.embedding import Embedder

ISOTROPIC = 1.01
"""Voxels whose sides differ by less than this factor count as cubes: slices are then axial ones."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """One structure of one case.

    Args:
        about: what was measured and how: the first columns.
        values: the features, NaN where they do not exist.
    """

    about: dict[str, str]
    values: dict[str, float] = field(default_factory=dict)


def measure_cases(
    cases: Sequence[MeasuredCase],
    settings: Settings,
    *,
    table: Labels | None = None,
    wanted: Sequence[str] = (),
    channel: int | None = None,
    embedder: Embedder | None = None,
    skip_bad: bool = False,
    num_threads: int = 1,
    progress: Progress | None = None,
    reading: Reading = STRICT,
) -> list[Row]:
    """Measure the structures of cases.

    Args:
        cases: as `find_cases` finds them.
        settings: what is computed, and how.
        table: what the values of label maps mean.
        wanted: names or values of structures; () is all.
        channel: of the images; None where they have one.
        embedder: a network that is asked about each structure, or of cases without a label about the whole scan.
        skip_bad: a case that cannot be measured becomes a row that says why; else it is refused.
        num_threads: cases in work at a time; each holds an image and its label.
        progress: called with (cases done, cases in all) after each case.
        reading: what is asked of the readers.
    Returns:
        In the order of the cases, then of the structures.
    Raises:
        MedsegError: E_GRID, E_CHANNELS, E_LABEL, E_NONFINITE, and what reading the files refuses; E_MIXED before
            anything is measured, where volumes and pictures come together.
    """
    if settings.families:
        _refuse_mixed(cases, reading)

    def measure(case: MeasuredCase) -> list[Row]:
        try:
            return list(
                _rows(case, settings, table=table, wanted=wanted, channel=channel, embedder=embedder, reading=reading)
            )
        except MedsegError as error:
            if not skip_bad:
                raise
            said = str(error).splitlines()[0]
            return [Row(_about(case, settings) | {"missing": f"refused: {said}"})]

    done: dict[int, list[Row]] = {}
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        futures = {pool.submit(measure, case): number for number, case in enumerate(cases)}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                if progress is not None:
                    progress(len(done), len(cases))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [row for number in sorted(done) for row in done[number]]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV; what does not exist is an empty cell.

    Raises:
        MedsegError: E_MIXED where volumes and pictures, which have other features, come together; E_OUTPUT.
    """
    with_values = [row for row in rows if row.values]
    columns = list(dict.fromkeys(name for row in with_values for name in row.values))
    if any(set(row.values) != set(columns) for row in with_values):
        raise _mixed(path.name)
    with whole_file(path, ".csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*ABOUT, *columns])
        for row in rows:
            cells = (row.values.get(name, math.nan) for name in columns)
            written = ("" if math.isnan(value) else f"{value:.9g}" for value in cells)
            writer.writerow([*(row.about.get(name, "") for name in ABOUT), *written])


def _refuse_mixed(cases: Sequence[MeasuredCase], reading: Reading) -> None:
    """Refuse volumes among pictures by the headers of files. DICOM is left to `write_table`: the grid of a series takes
    the headers of all its slices."""
    found: dict[int, str] = {}
    for case in cases:
        source = case.case.images[0]
        if case.label is None or not (isinstance(source, Path) and source.is_file() and is_image_file(source)):
            continue
        try:
            axes = {read_grid(source, reading).ndim, read_grid(case.label, reading).ndim}
        except MedsegError:  # said, or skipped, when it is measured
            continue
        if len(axes) == 1:
            found.setdefault(axes.pop(), case.case_id)
    if len(found) > 1:
        raise _mixed(", ".join(f"{case_id} ({ndim}D)" for ndim, case_id in sorted(found.items())))


def _mixed(where: str) -> MedsegError:
    return MedsegError(
        Code.MIXED, "the cases mix volumes and pictures, whose features differ", where=where,
        remedy="measure them apart",
    )  # fmt: skip


def _rows(
    case: MeasuredCase,
    settings: Settings,
    *,
    table: Labels | None,
    wanted: Sequence[str],
    channel: int | None,
    embedder: Embedder | None,
    reading: Reading,
) -> Iterator[Row]:
    if case.label is None and not case.annotations:
        if embedder is not None:
            yield Row(_about(case, settings), embedder.of_scan(case.case, reading))
        return
    image = open_channel(case.case, channel, reading)
    turned = image.reoriented()
    spacing = turned.grid.spacing_mm
    across = slice_axis(spacing)
    for region in _regions(case, image, table, wanted, reading):
        mask = np.asarray(Volume(region.mask, image.grid).reoriented().array, dtype=np.bool_)
        where = f"{case.case_id}, {region.name or 'label'}"
        if settings.families:
            measured = measure_region(
                np.asarray(turned.array[0]), mask, spacing, settings, across=across, where=where
            )  # fmt: skip
        else:
            measured = Measured({}, int(mask.sum()), 0)
        values = dict(measured.values)
        if embedder is not None:
            values |= embedder.of_region(case.case, region.mask, image.grid, reading)
        about = _about(case, settings, image, region, measured)
        if image.grid.ndim == 3 and settings.texture.startswith("2"):
            about["slices_along"] = f"{spacing[across]:.4g} mm"
        yield Row(about, values)


def _regions(
    case: MeasuredCase, image: Volume, table: Labels | None, wanted: Sequence[str], reading: Reading
) -> Iterator[Region]:
    if case.label is None:
        return regions_of_annotations(case.annotations, image.grid, wanted, case.case_id)
    return regions_of_map(open_label(case.label, reading), image.grid, table, wanted, case.case_id)


def slice_axis(spacing: Sequence[float]) -> int:
    """The axis from slice to slice of an image in `MODEL_ORIENTATION`: the coarsest, or the one to the head."""
    coarsest = int(np.argmax(spacing))
    return coarsest if spacing[coarsest] > ISOTROPIC * min(spacing) else 0


def _about(
    case: MeasuredCase,
    settings: Settings,
    image: Volume | None = None,
    region: Region | None = None,
    measured: Measured | None = None,
) -> dict[str, str]:
    about = {"case": case.case_id, "patient": case.patient or "", "medseg": __version__}
    if image is None or region is None or measured is None:
        return about
    counted = []
    if settings.intensities is not None:
        counted.append("{:g} to {:g}".format(*settings.intensities))
    if settings.outliers is not None:
        counted.append(f"within {settings.outliers:g} SD of the mean")
    about |= {
        "label": region.name,
        "value": str(region.value),
        "modality": image.modality or "",
        "unit": "px" if image.grid.frame == PIXEL_FRAME else "mm",
        "spacing": " ".join(f"{s:.6g}" for s in image.reoriented().grid.spacing_mm),
        "voxels": str(measured.num_voxels),
        "missing": "; ".join(measured.missing),
    }
    if settings.families:
        about |= {
            "resampled": " ".join(f"{s:g}" for s in settings.spacing_mm),
            "bins": settings.bins,
            "counted": " and ".join(counted) or "all",
            "texture": settings.texture,
            "levels": str(measured.num_levels),
        }
    return about
