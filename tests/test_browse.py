"""What notebooks look at: runs, tables, the final validation read back, slices with errors."""

from __future__ import annotations

import csv
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyRun
from matplotlib.colors import to_rgb

from medseg.errors import Code, MedsegError
from medseg.labels import Labels
from medseg.reports.browse import (
    Table,
    cases_table,
    data_of,
    dice_figure,
    find_runs,
    metrics_table,
    open_validation_case,
    read_evaluation,
    runs_table,
)
from medseg.reports.evaluation import Evaluation, evaluate_pair
from medseg.reports.overlay import FALSE_NEGATIVE, FALSE_POSITIVE, OTHER_CLASS, figure_to_array, slices_figure
from medseg.reports.planes import slice_axis, slice_views
from medseg.reports.slices import SliceErrors
from medseg.volume import Grid, Volume

LABELS = Labels.from_mapping({"background": 0, "liver": 1, "spleen": 5})


def volume(array: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 4.0)) -> Volume:
    """On a grid whose axes run to the right, the anterior and the superior."""
    shape = array.shape[-3:]
    return Volume(array, Grid(shape, np.diag([*spacing, 1.0])))


def masks() -> tuple[Volume, Volume]:
    """Reference and prediction of 12 slices: 4 voxels missed in slice 2, 3 too many in 4, 6 of another class in 9."""
    reference = np.zeros((8, 8, 12), dtype=np.uint8)
    reference[1:5, 1:5] = 1
    predicted = reference.copy()
    predicted[1, 1:5, 2] = 0
    predicted[6, 1:4, 4] = 5
    predicted[1:3, 1:4, 9] = 5
    return volume(reference), volume(predicted)


def test_errors_of_each_slice() -> None:
    reference, predicted = masks()
    errors = SliceErrors.of(reference, predicted, LABELS)
    assert np.flatnonzero(errors.num_missed).tolist() == [2] and errors.num_missed[2] == 4
    assert np.flatnonzero(errors.num_extra).tolist() == [4] and errors.num_extra[4] == 3
    assert np.flatnonzero(errors.num_other).tolist() == [9] and errors.num_other[9] == 6
    assert errors.dice[[0, 2, 4, 9]] == pytest.approx([1, 2 * 12 / 28, 2 * 16 / 35, 2 * 10 / 32])
    assert (errors.spacing_mm, errors.direction) == (4.0, "inferior to superior")


@pytest.mark.parametrize("orientation", ["LPI", "SPL", "IRA"])
def test_slices_are_counted_upwards_for_any_orientation_of_the_files(orientation: str) -> None:
    reference, predicted = masks()
    errors = SliceErrors.of(reference.reoriented(orientation), predicted, LABELS)
    assert errors.worst(2) == [9, 2]
    assert errors.num_wrong.sum() == 13


def test_worst_slices_are_apart_and_wrong() -> None:
    reference, predicted = masks()
    predicted.array[1, 1:4, 3] = 0  # 4 mm from slice 2, 4 mm from slice 4
    errors = SliceErrors.of(reference, predicted, LABELS)
    assert errors.worst(5) == [9, 2]
    assert SliceErrors.of(reference, reference, LABELS).worst() == []


def test_slices_lie_where_the_scan_is_coarse() -> None:
    assert slice_axis(Grid((8, 8, 8), np.diag([1.0, 1.0, 1.1, 1]))) == 0
    assert slice_axis(Grid((8, 8, 8), np.diag([4.0, 1.0, 1.0, 1]))) == 2
    assert slice_axis(Grid((8, 8, 8), np.diag([1.0, 4.0, 1.0, 1]))) == 1
    reference, _ = masks()
    sagittal = Volume(reference.array, Grid(reference.grid.shape, np.diag([5.0, 1.0, 1.0, 1])))
    image = Volume(np.zeros((1, *sagittal.grid.shape), dtype=np.float32), sagittal.grid)
    (view,) = slice_views(image, sagittal.array, None, None, [6])  # counted to the left: the second to the right
    assert view.caption == "sagittal  7/8" and view.sides == ("A", "P", "S", "I")
    assert np.array_equal(view.reference, sagittal.array[1].T[::-1, ::-1])


def test_a_picture_is_one_slice() -> None:
    grid = Grid.of_picture((6, 7))
    reference, predicted = np.zeros((2, 6, 7), dtype=np.uint8)
    reference[2, 2:5] = 1
    errors = SliceErrors.of(Volume(reference, grid), Volume(predicted, grid), LABELS)
    assert errors.num_missed.tolist() == [3] and errors.worst() == [0]
    image = Volume(np.zeros((1, 6, 7), dtype=np.float32), grid)
    figure = slices_figure(
        image, [0], labels=LABELS, reference=Volume(reference, grid), predicted=Volume(predicted, grid)
    )
    assert len(figure.axes) == 4


def test_the_error_map_of_the_slice_that_was_asked_for() -> None:
    reference, predicted = masks()
    image = volume(np.zeros((1, 8, 8, 12), dtype=np.float32))

    def pixels(index: int) -> list[int]:
        figure = slices_figure(image, [index], labels=LABELS, reference=reference, predicted=predicted)
        array = figure_to_array(figure).astype(int)
        colours = (FALSE_NEGATIVE, FALSE_POSITIVE, OTHER_CLASS)
        return [int((np.abs(array - 255 * np.array(to_rgb(c))).max(axis=-1) <= 3).sum()) for c in colours]

    none = pixels(0)  # the key
    for index, kind in ((2, 0), (4, 1), (9, 2)):
        more = [a - b for a, b in zip(pixels(index), none, strict=True)]
        assert more[kind] > 10_000 and max(m for i, m in enumerate(more) if i != kind) < 1000


def test_the_profile_is_stacked_and_numbers_the_worst() -> None:
    reference, predicted = masks()
    (ax,) = SliceErrors.of(reference, predicted, LABELS).figure().axes
    tops = np.zeros(12)
    for bar in ax.patches:
        slot = round(bar.get_x() + bar.get_width() / 2) - 1
        tops[slot] = max(tops[slot], bar.get_y() + bar.get_height())
    assert tops.tolist() == [0, 0, 4, 0, 3, 0, 0, 0, 0, 6, 0, 0]
    assert {text.get_text() for text in ax.texts} == {"10", "3"}


def test_tables_sort_and_escape() -> None:
    table = Table(("case", "Dice"), (("b", 0.5), ("<a>", math.nan), ("c", 0.25)))
    assert [row[0] for row in table.sorted_by("Dice").rows] == ["c", "b", "<a>"]
    assert [row[0] for row in table.sorted_by("Dice", descending=True).rows] == ["b", "c", "<a>"]
    assert table.head(1).rows == (("b", 0.5),)
    page = table._repr_html_()
    assert "&lt;a&gt;" in page and "<a>" not in page and "0.500" in page and "–" in page
    with pytest.raises(MedsegError, match="Dice") as caught:
        table.sorted_by("Dcie")
    assert caught.value.code == Code.NAME


def test_an_evaluation_comes_back_as_it_was_written(tmp_path: Path) -> None:
    reference, predicted = masks()
    empty = volume(np.zeros_like(reference.array))
    rows = [*evaluate_pair(predicted, reference, LABELS, case="a"), *evaluate_pair(empty, reference, LABELS, case="b")]
    written = Evaluation(tuple(rows), LABELS, 3.0)
    written.write(tmp_path)
    read = read_evaluation(tmp_path)
    assert (read.labels, read.tolerance_mm, read.frame, read.cases) == (LABELS, 3.0, written.frame, ("a", "b"))
    for row, original in zip(read.rows, written.rows, strict=True):
        assert (row.case, row.class_name, row.state) == (original.case, original.class_name, original.state)
        assert row.values == pytest.approx(original.values, nan_ok=True)
    table = cases_table(read)
    assert table.rows[0][:5] == ("b", 0.0, "liver", 0.0, "liver")  # the spleen is in neither mask
    assert table.rows[1][0] == "a" and table.rows[1][5] == "spleen"
    assert [row[:3] for row in metrics_table(read).rows][2] == ("b", "liver", "missed")
    assert "HD95 (mm)" in metrics_table(read).columns
    with pytest.raises(MedsegError) as caught:
        read_evaluation(tmp_path / "elsewhere")
    assert caught.value.code == Code.RUN


def test_every_case_is_a_point_and_empty_masks_are_crosses() -> None:
    reference, predicted = masks()
    empty = volume(np.zeros_like(reference.array))
    rows = [*evaluate_pair(predicted, reference, LABELS, case="a"), *evaluate_pair(empty, reference, LABELS, case="b")]
    (ax,) = dice_figure(Evaluation(tuple(rows), LABELS)).axes
    points = [(line.get_marker(), float(line.get_ydata()[0])) for line in ax.lines if len(line.get_xdata()) == 1]
    defined = [r for r in rows if not math.isnan(r.values["dice"])]
    assert sorted(p for p in points if not math.isnan(p[1])) == sorted(
        ("o" if r.state.value == "present" else "X", r.values["dice"]) for r in defined
    )


def test_runs_are_found_newest_first(tiny_run: TinyRun, tmp_path: Path) -> None:
    old, new, begun = (tmp_path / name for name in ("a_new_name_of_an_old_run", "sweep/0_unet", "begun"))
    for copy, time in ((old, 1_000_000_000), (new, 1_100_000_000), (begun, 1_200_000_000)):
        shutil.copytree(tiny_run.run, copy)
        os.utime(copy / "bundle.json", (time, time))
    shutil.rmtree(begun / "validation")
    (begun / "history.csv").unlink()
    runs = find_runs(tmp_path)
    assert [r.name for r in runs] == ["begun", "sweep/0_unet", "a_new_name_of_an_old_run"]
    assert [r.is_scored for r in runs] == [False, True, True]
    assert runs[1].model == "unet" and runs[1].num_steps == 10 and math.isnan(runs[0].best_dice)
    with (tiny_run.run / "history.csv").open(newline="") as file:
        dice = [float(row["val_dice_mean"]) for row in csv.DictReader(file) if row["val_dice_mean"]]
    assert runs[1].best_dice == max(dice)
    assert [row[0] for row in runs_table(runs).rows] == [r.name for r in runs]
    with pytest.raises(MedsegError, match="MEDSEG_RUNS") as caught:
        find_runs(tmp_path / "sweep" / "nothing")
    assert caught.value.code == Code.RUN


def test_a_validation_case_is_opened_with_its_prediction(tiny_run: TinyRun) -> None:
    data = data_of(tiny_run.run)
    evaluation = read_evaluation(tiny_run.run / "validation")
    case = open_validation_case(tiny_run.run, data, evaluation.cases[0])
    rows = evaluate_pair(case.predicted, case.reference, case.labels)
    expected = [r.values["dice"] for r in evaluation.rows if r.case == evaluation.cases[0]]
    assert [r.values["dice"] for r in rows] == pytest.approx(expected, abs=1e-5)
    assert case.image.modality == "CT"
    with pytest.raises(MedsegError, match=evaluation.cases[0]) as caught:
        open_validation_case(tiny_run.run, data, evaluation.cases[0].replace("phantom", "fantom"))
    assert caught.value.code == Code.MISSING


def test_data_are_found_from_the_run_where_the_path_is_relative(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "work" / "runs" / "one"
    shutil.copytree(tiny_run.run, run)
    places = run / "places.yaml"
    places.write_text(places.read_text().replace(str(tiny_run.data), "data/train"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MedsegError, match="data_of") as caught:
        data_of(run)
    assert caught.value.code == Code.MISSING and str(tmp_path) not in str(caught.value)
    assert len(data_of(run, tiny_run.data).cases) == 4
    whole = places.read_text()
    places.write_text(whole.replace("data/train", "d" * 5000))  # found by fuzzing: too long for any file system
    with pytest.raises(MedsegError, match="E_MISSING"):
        data_of(run)
    places.write_text(whole)
    shutil.copytree(tiny_run.data, tmp_path / "work" / "data" / "train")
    assert data_of(run).root == tmp_path / "work" / "data" / "train"
