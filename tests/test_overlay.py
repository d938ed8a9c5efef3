"""Overlays and curves: which slice, which side, which colour; files that are whole."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from medseg.errors import MedsegError
from medseg.labels import Labels
from medseg.reports.curves import curves_figure, read_history, save_curves
from medseg.reports.layout import arrange
from medseg.reports.overlay import FALSE_NEGATIVE, FALSE_POSITIVE, figure_to_array, overlay_figure, save_overlay
from medseg.reports.palette import class_colours
from medseg.reports.planes import SOFT_TISSUE_HU, views_of
from medseg.volume import Grid, Volume

LABELS = Labels.from_mapping({"background": 0, "liver": 1, "spleen": 5})
# Array axes run to the right, the posterior and the superior; voxels of 2 × 1 × 4 mm.
AFFINE = np.array([[2.0, 0, 0, -20], [0, -1.0, 0, 30], [0, 0, 4.0, 100], [0, 0, 0, 1]])
SHAPE = (20, 30, 10)


def case() -> tuple[Volume, Volume]:
    """The liver on the patient's right, in front and above; the spleen on the left."""
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[14:19, 3:9, 6:9] = 1
    label[2:4, 20:24, 6:8] = 5
    image = np.random.default_rng(0).normal(0, 5, SHAPE) + 60 * (label == 1) + 20
    grid = Grid(SHAPE, AFFINE)
    return Volume(image[None].astype(np.float32), grid), Volume(label, grid)


@pytest.mark.parametrize("orientation", ["RPS", "LAS", "SPL", "IRA"])
def test_radiological_convention_for_any_orientation_of_the_file(orientation: str) -> None:
    image, label = (v.reoriented(orientation) for v in case())
    liver = (label.array == 1).astype(np.uint8)
    axial, coronal, sagittal = views_of(image, liver, None, liver)
    rows, columns = np.nonzero(axial.reference)
    assert axial.image.shape == (30, 20)
    assert (columns.max() < 10, rows.max() < 15) == (True, True)  # right is on the left, anterior at the top
    assert axial.sides == ("R", "L", "A", "P")
    rows, columns = np.nonzero(coronal.reference)
    assert coronal.image.shape == (10, 20)
    assert (columns.max() < 10, rows.max() < 5) == (True, True)  # superior at the top
    rows, columns = np.nonzero(sagittal.reference)
    assert sagittal.image.shape == (10, 30)
    assert (columns.max() < 15, rows.max() < 5) == (True, True)  # anterior on the left
    assert [round(v.aspect, 3) for v in (axial, coronal, sagittal)] == [round(40 / 30, 3), 1.0, 0.75]
    assert axial.caption == "axial  7/10"


def test_the_slice_is_where_the_structure_is_largest() -> None:
    image, _ = case()
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[5, 5, 2] = label[5:9, 5:9, 4] = 1
    assert views_of(image, label, None, label)[0].caption == "axial  5/10"
    assert views_of(image, None, None, None)[0].caption == "axial  6/10"


def test_line_and_fill_are_drawn_in_the_class_colour() -> None:
    image, label = case()
    flat = Volume(np.zeros_like(image.array), image.grid)
    colour = np.array(to_rgb(class_colours(1)[0])) * 255

    def pixels(figure_of: dict[str, Volume], alpha: float) -> int:
        array = figure_to_array(overlay_figure(flat, labels=LABELS, **figure_of)).astype(int)
        legend = int(array.shape[0] * 0.94)
        return int((np.abs(array[:legend] - alpha * colour).max(axis=-1) <= 3).sum())

    assert pixels({"reference": label}, 1.0) > 500
    assert pixels({"predicted": label}, 0.42) > 20 * 500
    assert pixels({}, 1.0) == pixels({}, 0.42) == 0


def test_dice_stands_in_the_legend_only_with_both_masks() -> None:
    image, label = case()
    missed = Volume(np.where(label.array == 5, 0, label.array).astype(np.uint8), label.grid)

    def texts(**masks: Volume) -> list[str]:
        (legend,) = overlay_figure(image, labels=LABELS, **masks).legends
        return [t.get_text() for t in legend.get_texts()]

    assert texts(reference=label, predicted=missed) == ["liver   Dice 1.000", "spleen   Dice 0.000"]
    assert texts(predicted=missed) == ["liver"]


def test_pictures_show_errors_in_their_own_colours() -> None:
    grid = Grid.of_picture((60, 80))
    truth, guess = np.zeros((60, 80), np.uint8), np.zeros((60, 80), np.uint8)
    truth[10:50, 10:40], guess[10:50, 20:60] = 1, 1
    photo = np.full((3, 60, 80), 120, np.float32)
    photo[0] = 200
    figure = overlay_figure(
        Volume(photo, grid), labels=LABELS, reference=Volume(truth, grid), predicted=Volume(guess, grid)
    )
    assert len(figure.axes) == 4
    errors = np.asarray(figure.axes[3].images[1].get_array())
    assert errors[30, 15, :3] == pytest.approx(to_rgb(FALSE_NEGATIVE))
    assert errors[30, 50, :3] == pytest.approx(to_rgb(FALSE_POSITIVE))
    assert errors[30, 30, 3] < 1
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown[0, 0] == pytest.approx([200 / 255, 120 / 255, 120 / 255])


def test_panels_neither_overlap_nor_leave_the_figure() -> None:
    for aspects, rows in (([0.7, 1.0, 1.4], 2), ([1.2, 3.0, 2.8], 2), ([1.0, 0.4, 0.4], 1), ([1.3], 4), ([0.5], 1)):
        layout = arrange(aspects, num_rows=rows, title=True, num_legend=5)
        boxes = [box for row in layout.boxes for box in row]
        assert len(boxes) == rows * len(aspects)
        for box, aspect in zip(boxes, list(aspects) * rows, strict=True):
            left, bottom, width, height = box
            assert min(left, bottom) > 0
            assert max(left + width, bottom + height) < 1
            assert width * layout.size[0] / (height * layout.size[1]) == pytest.approx(aspect)
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart = a[0] >= b[0] + b[2] or b[0] >= a[0] + a[2] or a[1] >= b[1] + b[3] or b[1] >= a[1] + a[3]
                assert apart


def test_ct_gets_the_soft_tissue_window_unless_the_structure_is_elsewhere() -> None:
    image, label = case()
    hounsfield = np.full((1, *SHAPE), 40.0, np.float32)
    hounsfield[0, :2] = -1000
    ct = Volume(hounsfield, image.grid, "CT")
    low, high = SOFT_TISSUE_HU
    assert views_of(ct, label.array, None, label.array)[0].image.max() == pytest.approx((40 - low) / (high - low))
    lung = np.where(np.arange(20)[:, None, None] < 2, 1, 0) * np.ones(SHAPE, np.uint8)
    assert views_of(ct, lung.astype(np.uint8), None, lung.astype(np.uint8))[0].image.max() == 1


@pytest.mark.parametrize("value", [0.0, 7.0, np.nan])
def test_constant_images_and_single_slices(value: float) -> None:
    grid = Grid((16, 12, 1), AFFINE)
    figure = overlay_figure(Volume(np.full((1, 16, 12, 1), value, np.float32), grid), labels=LABELS)
    assert len(figure.axes) == 1
    assert figure_to_array(figure).ndim == 3


def test_a_mask_elsewhere_is_refused() -> None:
    image, label = case()
    moved = AFFINE.copy()
    moved[:3, 3] += 50
    with pytest.raises(MedsegError, match="E_GRID"):
        overlay_figure(image, labels=LABELS, reference=Volume(label.array, Grid(SHAPE, moved)))


def test_saving_and_arrays(tmp_path: Path) -> None:
    image, label = case()
    backend = mpl.get_backend()
    save_overlay(tmp_path / "a.png", image, labels=LABELS, reference=label, predicted=label, title="a")
    with Image.open(tmp_path / "a.png") as picture:
        size = picture.size
    array = figure_to_array(overlay_figure(image, labels=LABELS, reference=label, predicted=label, title="a"))
    assert array.dtype == np.uint8
    assert array.shape == (size[1], size[0], 3)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert mpl.get_backend() == backend
    with pytest.raises(MedsegError, match="E_OUTPUT"):
        save_overlay(tmp_path / "none" / "a.png", image, labels=LABELS)


def test_colours_are_distinct_and_do_not_depend_on_the_number() -> None:
    many = class_colours(60)
    assert len(set(many)) == 60
    assert class_colours(3) == many[:3]


def test_curves_draw_what_is_there(tmp_path: Path) -> None:
    history = tmp_path / "history.csv"
    history.write_text(
        "step,minutes,train_loss,val_loss,lr,val_dice_mean,val_dice_liver\n"
        "10,0.1,1.0,,0.01,,\n20,0.2,0.5,0.6,0.005,0.7,0.7\n30,0.3,nan?,0.5,0.001,0.6,\n"
    )
    curves = read_history(history)
    assert curves["train_loss"] == ([10, 20], [1.0, 0.5])
    assert curves["val_dice_mean"] == ([20, 30], [0.7, 0.6])
    figure = curves_figure(curves)
    assert [ax.get_ylabel() for ax in figure.axes] == ["loss", "validation Dice", "learning rate"]
    labels = [t.get_text() for t in figure.axes[1].get_legend().get_texts()]
    assert labels == ["liver", "mean", "best mean 0.700"]
    save_curves(tmp_path / "curves.png", history)
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 300
    history.write_text("step,train_loss\n10,1.0\n")
    assert len(curves_figure(read_history(history)).axes) == 1


def test_a_history_without_content(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="E_MISSING"):
        read_history(tmp_path / "history.csv")
    (tmp_path / "history.csv").write_text("step,train_loss\n")
    with pytest.raises(MedsegError, match="E_RUN"):
        read_history(tmp_path / "history.csv")
