"""How large each structure of a label map is, how bright the scan is in it, and whether the scan cuts it off.

All is measured on the scan's own grid, in the label map as it is written: post-processed, and of the chosen classes.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.formats.atomic import whole_file
from medseg.inference.components import Indices, boxes_of
from medseg.labels import Labels
from medseg.volume import Volume

STATISTICS_FILE = "statistics.csv"
COLUMNS = ("case", "class", "num_voxels", "volume_ml")
LAST_COLUMNS = ("num_components", "touches_border")
MM3_PER_ML = 1000.0

Row = dict[str, Any]


def structure_statistics(indices: Indices, image: Volume, labels: Labels, channels: Sequence[str]) -> list[Row]:
    """A row for each class, or each region where there are regions.

    Args:
        indices: class indices, shape *S.
        image: the scan as it was read, (C, *S).
        labels: the classes.
        channels: names of the scan's channels.
    Returns:
        Rows with `class`; `num_voxels`; `volume_ml`, None for pictures; `mean_…` and `sd_…` of the scan's own values in
        it, for each channel (`…_intensity` where there is one), the SD that of these voxels (divided by n), None where
        the class is absent; `num_components` (26 neighbours, 8 in 2D); `touches_border`: True where a voxel of it lies
        in the first or last plane of an axis, along which the scan may have cut it off. Axes of one plane do not count.
    """
    boxes = boxes_of(indices)
    names = ["intensity"] if len(channels) == 1 else list(channels)
    return [
        {"class": name, **_measured(indices, image, members, boxes, names)}
        for name, members in zip(labels.foreground, labels.parts, strict=True)
    ]


def cut_off(rows: Iterable[Row]) -> str | None:
    """What is to be said of structures that touch the border; None where there are none."""
    names = [str(row["class"]) for row in rows if row["touches_border"]]
    if not names:
        return None
    return f"touches the border of the scan, which may have cut it off: {', '.join(names)}"


def write_statistics(path: Path, cases: Iterable[tuple[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Write the table of all cases, whole or not at all.

    Args:
        path: the CSV file.
        cases: ids and their rows; all have the same columns.
    Raises:
        MedsegError: E_OUTPUT.
    """
    with whole_file(path, ".csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer: Any = None
        for case_id, rows in cases:
            for row in rows:
                if writer is None:
                    measured = [key for key in row if key not in (*COLUMNS, *LAST_COLUMNS)]
                    writer = csv.DictWriter(stream, [*COLUMNS, *measured, *LAST_COLUMNS], restval="")
                    writer.writeheader()
                cells = {key: _cell(value) for key, value in row.items() if key in writer.fieldnames}
                writer.writerow({"case": case_id, **cells})


def _measured(
    indices: Indices,
    image: Volume,
    members: Sequence[int],
    boxes: Sequence[tuple[slice, ...] | None],
    names: Sequence[str],
) -> Row:
    found = [box for index in members if index <= len(boxes) and (box := boxes[index - 1]) is not None]
    if not found:
        absent = {f"{kind}_{name}": None for name in names for kind in ("mean", "sd")}
        volume = None if image.grid.is_picture else 0.0
        return {"num_voxels": 0, "volume_ml": volume, **absent, "num_components": 0, "touches_border": False}
    from medseg.metrics.components import components  # here, because few ask, and scipy.sparse is slow to import

    box = tuple(slice(min(s.start for s in side), max(s.stop for s in side)) for side in zip(*found, strict=True))
    mask: NDArray[np.bool_] = np.isin(indices[box], list(members))
    number = int(np.count_nonzero(mask))
    values: Row = {}
    for name, channel in zip(names, image.array, strict=True):
        inside = channel[box][mask]
        mean = float(inside.mean(dtype=np.float64))
        values[f"mean_{name}"] = mean
        values[f"sd_{name}"] = float(np.sqrt(np.mean((inside - np.float64(mean)) ** 2)))
    # The box is the smallest one, so that its faces hold voxels of the structure.
    touches = any(n > 1 and (side.start == 0 or side.stop == n) for side, n in zip(box, indices.shape, strict=True))
    voxel_mm3 = float(np.prod(image.grid.spacing_mm))
    return {
        "num_voxels": number,
        "volume_ml": None if image.grid.is_picture else number * voxel_mm3 / MM3_PER_ML,
        **values,
        "num_components": components(mask)[1],
        "touches_border": touches,
    }


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
