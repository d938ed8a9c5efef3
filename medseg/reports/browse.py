"""Runs that were trained, and what their final validation says: what a notebook looks at.

A run is what `medseg train` leaves. Tables are small HTML tables, figures have their own canvas.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medseg.bundle import BUNDLE_FILE, BundleInfo
from medseg.data.cases import DataFolder, find_cases, load_image, load_label_values
from medseg.documents import parse_json, parse_yaml
from medseg.errors import Code, MedsegError, nearest
from medseg.formats import Reading, is_image_file, open_label, strip_suffix
from medseg.labels import Labels
from medseg.metrics.masks import State
from medseg.metrics.metric import known_metrics
from medseg.reports.curves import DICE_MEAN, read_history
from medseg.reports.evaluation import Evaluation, Row
from medseg.reports.palette import class_colours
from medseg.volume import PIXEL_FRAME, WORLD_FRAME, Volume

HISTORY_FILE, CONFIG_FILE, VALIDATION_FOLDER, METRICS_FILE = "history.csv", "config.yaml", "validation", "metrics.json"
PLACES_FILE = "places.yaml"
"""In the folder of a run, as training and `Evaluation.write` name them."""
TABLE_METRICS = ("dice", "surface_dice", "hd95", "relative_volume_error")
"""What a table of cases and classes shows; metrics.csv has everything."""
UNDEFINED = "–"
_STRIP_WIDTH = 0.5
"""Share of a class's width over which its points are spread."""

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """A table that a notebook shows as HTML.

    Args:
        columns: headings.
        rows: one cell per column; NaN is undefined.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def sorted_by(self, column: str, *, descending: bool = False) -> Table:
        """Rows in the order of a column; undefined cells come last either way.

        Raises:
            MedsegError: E_NAME if there is no such column.
        """
        if column not in self.columns:
            raise MedsegError(
                Code.NAME, "the table has no such column", where=column, remedy=nearest(column, self.columns)
            )
        index = self.columns.index(column)
        defined = [row for row in self.rows if not _is_undefined(row[index])]
        undefined = tuple(row for row in self.rows if _is_undefined(row[index]))
        ordered = sorted(defined, key=lambda row: row[index], reverse=descending)
        return Table(self.columns, (*ordered, *undefined))

    def head(self, num_rows: int) -> Table:
        """The first rows."""
        return Table(self.columns, self.rows[:num_rows])

    def __repr__(self) -> str:
        lines = [self.columns, *(tuple(_text(cell) for cell in row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def _repr_html_(self) -> str:
        """What Jupyter shows. Texts stand on the left, numbers on the right."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        rows = ("".join(_html_cell(cell) for cell in row) for row in self.rows)
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


@dataclass(frozen=True)
class RunEntry:
    """A run that was found.

    Args:
        folder: the run.
        name: its path below the folder that was searched.
        model: the network's name.
        date: when it was started, or resumed.
        num_steps: optimizer steps so far.
        best_dice: the best mean Dice of its validations; NaN before the first.
        is_scored: whether the final validation is there.
    """

    folder: Path
    name: str
    model: str
    date: datetime
    num_steps: int
    best_dice: float
    is_scored: bool


def find_runs(folder: Path) -> list[RunEntry]:
    """All runs in a folder and the folders within, the newest first.

    Raises:
        MedsegError: E_RUN if there is none.
    """
    found = [_entry(path.parent, folder) for path in folder.rglob(BUNDLE_FILE) if (path.parent / CONFIG_FILE).is_file()]
    if not found:
        raise MedsegError(
            Code.RUN,
            "no run was found here",
            where=folder.resolve().name,
            expected=f"a folder with runs of medseg train (with {BUNDLE_FILE} and {CONFIG_FILE})",
            remedy="make one with: medseg demo; or name another folder: medseg notebook FOLDER (or MEDSEG_RUNS=FOLDER)",
        )
    return sorted(found, key=lambda entry: (entry.date, entry.name), reverse=True)


def runs_table(runs: Sequence[RunEntry]) -> Table:
    """The runs with what tells them apart."""
    return Table(
        ("run", "model", "date", "steps", "best Dice", "validated"),
        tuple(
            (r.name, r.model, f"{r.date:%Y-%m-%d %H:%M}", r.num_steps, r.best_dice, "yes" if r.is_scored else "no")
            for r in runs
        ),
    )


def data_of(run: Path, root: Path | None = None) -> DataFolder:
    """The data that a run was trained on.

    Args:
        run: the run's folder.
        root: where the data are now; by default where the run's `PLACES_FILE` says. A relative path there is looked for
            from the run's folder upwards, then from the working directory.
    Raises:
        MedsegError: E_RUN without a configuration, E_MISSING if the data are not there, and what `find_cases` refuses.
    """
    data = _data_config(run)
    manifest = None if data["manifest"] is None else _find_stored(run, data["manifest"])
    info = BundleInfo.read(run)
    return find_cases(
        root or _find_stored(run, data["root"]),
        manifest=manifest,
        labels=info.structures or data["labels"],
        modality=data.get("modality") or (info.modality if info.structures else None),
        reading=_reading(data),
    )


def _data_config(run: Path) -> dict[str, Any]:
    """The keys below `data` of a run's configuration, with the places where its data were."""
    try:
        data: dict[str, Any] = parse_yaml((run / CONFIG_FILE).read_text(encoding="utf-8"))["data"]
        stored = run / PLACES_FILE
        places = parse_yaml(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
        for key in ("root", "manifest"):
            data[key] = data[key] or places.get(f"data.{key}")
        data["labels"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise MedsegError(
            Code.RUN, "the run's configuration cannot be read", where=f"{run.name}/{CONFIG_FILE}", got=error
        ) from error
    return data


def _reading(data: dict[str, Any]) -> Reading:
    return Reading(
        resample_irregular=bool(data.get("resample_irregular")),
        without_preamble=bool(data.get("without_preamble")),
        form=data.get("form"),
        without_form=bool(data.get("without_form")),
    )


@dataclass(frozen=True, eq=False)
class ValidationCase:
    """A case of the final validation.

    Args:
        case_id: its name.
        image: shape (C, *grid.shape).
        reference: label map on the image's grid, with the values of files.
        predicted: the same, from the run's best checkpoint.
        labels: what the values mean.
    """

    case_id: str
    image: Volume
    reference: Volume
    predicted: Volume
    labels: Labels


def open_validation_case(run: Path, data: DataFolder, case_id: str) -> ValidationCase:
    """Open a validation case with its prediction.

    Raises:
        MedsegError: E_MISSING if the run did not predict such a case or the data lack it, with the nearest names;
            what reading the files refuses.
    """
    folder = run / VALIDATION_FOLDER
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    predictions = {strip_suffix(path.name): path for path in files if is_image_file(path)}
    cases = {case.case_id: case for case in data.cases}
    for where, known in ((f"{run.name}/{VALIDATION_FOLDER}", list(predictions)), (data.root.name, list(cases))):
        if case_id not in known:
            raise MedsegError(
                Code.MISSING, f"there is no case {case_id!r} here", where=where, remedy=nearest(case_id, known)
            )
    info = BundleInfo.read(run)
    reading = _reading(_data_config(run))
    image = load_image(cases[case_id], channels=info.channels, reading=reading)
    reference = load_label_values(cases[case_id], image.grid, reading)
    return ValidationCase(case_id, image, reference, open_label(predictions[case_id]), info.labels)


def read_evaluation(folder: Path) -> Evaluation:
    """Read back what `Evaluation.write` wrote; metrics that are not installed here are left out.

    Raises:
        MedsegError: E_RUN if it is not there or cannot be read.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise MedsegError(
            Code.RUN,
            "there is no evaluation here",
            where=f"{folder.parent.name}/{folder.name}",
            expected=METRICS_FILE,
            remedy="let the training end, or choose a run that is validated",
        )
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        frame = PIXEL_FRAME if "tolerance_px" in content else WORLD_FRAME
        columns = {m.name: m.column(frame) for m in known_metrics()}
        rows = tuple(
            Row(
                case["case"],
                case["class"],
                State(case["state"]),
                {name: _number(case[column]) for name, column in columns.items() if column in case},
            )
            for case in content["cases"]
        )
        tolerance = float(content["tolerance_px" if frame == PIXEL_FRAME else "tolerance_mm"])
        return Evaluation(rows, Labels.from_mapping(content["labels"]), tolerance, frame)
    except (ValueError, KeyError, TypeError) as error:
        raise MedsegError(
            Code.RUN, "the evaluation cannot be read", where=path.name, got=f"{type(error).__name__}: {error}"
        ) from error


def cases_table(evaluation: Evaluation) -> Table:
    """The cases, those with the lowest mean Dice first."""
    rows: list[tuple[Cell, ...]] = []
    for case, mean in evaluation.case_means("dice").items():
        scored = [r for r in evaluation.rows if r.case == case and not math.isnan(r.values["dice"])]
        worst = min(scored, key=lambda row: row.values["dice"], default=None)
        missed = ", ".join(r.class_name for r in scored if r.state is State.MISSED)
        spurious = ", ".join(r.class_name for r in scored if r.state is State.SPURIOUS)
        lowest = (UNDEFINED, math.nan) if worst is None else (worst.class_name, worst.values["dice"])
        rows.append((case, mean, *lowest, missed, spurious))
    columns = ("case", "mean Dice", "worst class", "its Dice", "missed", "spurious")
    return Table(columns, tuple(rows)).sorted_by("mean Dice")


def metrics_table(evaluation: Evaluation) -> Table:
    """One row per case and class with `TABLE_METRICS`, in the order of the evaluation."""
    shown = [m for m in evaluation.metrics if m.name in TABLE_METRICS]
    units = (m.unit(evaluation.frame) for m in shown)
    headings = [f"{m.title} ({unit})" if unit else m.title for m, unit in zip(shown, units, strict=True)]
    rows = tuple((r.case, r.class_name, r.state.value, *(r.values[m.name] for m in shown)) for r in evaluation.rows)
    return Table(("case", "class", "structure", *headings), rows)


def dice_figure(evaluation: Evaluation) -> Figure:
    """A point per case in a column per class, a line at the median, a cross where one of the masks is empty."""
    names = evaluation.labels.foreground
    figure = Figure(figsize=(max(5.0, 1.5 + 1.1 * len(names)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    position = {case: i for i, case in enumerate(evaluation.cases)}
    step = _STRIP_WIDTH / max(1, len(position) - 1)
    start = -_STRIP_WIDTH / 2 if len(position) > 1 else 0.0
    medians = {entry.class_name: entry.statistics["dice"].median for entry in evaluation.summary}
    for column, (name, colour) in enumerate(zip(names, class_colours(len(names)), strict=True)):
        rows = [r for r in evaluation.rows if r.class_name == name]
        for row in rows:
            x, marker = column + start + step * position[row.case], "o" if row.state is State.PRESENT else "X"
            ax.plot(x, row.values["dice"], marker, color=colour, markersize=7, mec="#333333", mew=0.6, clip_on=False)
        ax.plot([column - 0.35, column + 0.35], [medians[name]] * 2, color="#222222", linewidth=1.5)
    many = len(names) > 6
    ax.set_xticks(range(len(names)), names, rotation=30 if many else 0, ha="right" if many else "center")
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel("Dice")
    ax.grid(axis="y", alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def _entry(run: Path, searched: Path) -> RunEntry:
    try:
        curves = read_history(run / HISTORY_FILE)
    except MedsegError:  # a run that has just begun
        curves = {}
    return RunEntry(
        run,
        run.relative_to(searched).as_posix() if run != searched else run.resolve().name,
        str(BundleInfo.read(run).model["name"]),
        datetime.fromtimestamp((run / BUNDLE_FILE).stat().st_mtime).astimezone(),
        int(max((steps[-1] for steps, _ in curves.values()), default=0)),
        max(curves[DICE_MEAN][1], default=math.nan) if DICE_MEAN in curves else math.nan,
        (run / VALIDATION_FOLDER / METRICS_FILE).is_file(),
    )


def _find_stored(run: Path, stored: object) -> Path:
    """A path of a run's places, which is relative to wherever the training was started."""
    path = Path(str(stored)).expanduser()
    starts = [Path()] if path.is_absolute() else [*run.resolve().parents, Path()]
    there = (start / path for start in starts if os.path.exists(start / path))  # noqa: PTH110  # no OSError for long names
    found = None if stored is None else next(there, None)
    if found is None:
        raise MedsegError(
            Code.MISSING,
            "the data of this run are not where they were",
            where=f"{run.name}/{PLACES_FILE}",
            got="no place" if stored is None else path.name,
            remedy="say where they are now: data_of(run, Path('FOLDER'))",
        )
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _is_undefined(cell: Cell) -> bool:
    return isinstance(cell, float) and math.isnan(cell)


def _text(cell: Cell) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return UNDEFINED if math.isnan(cell) else f"{cell:.3f}" if abs(cell) < 10 else f"{cell:.1f}"


def _html_cell(cell: Cell) -> str:
    side = "left" if isinstance(cell, str) else "right"
    return f'<td style="text-align: {side}">{html.escape(_text(cell))}</td>'
