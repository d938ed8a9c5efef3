"""The course of a training as curves: loss, Dice and learning rate over steps."""

from __future__ import annotations

import csv
from contextlib import suppress
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medseg.errors import Code, MedsegError
from medseg.formats.atomic import whole_file
from medseg.reports.palette import class_colours

STEP = "step"
DICE_PREFIX = "val_dice_"
DICE_MEAN = "val_dice_mean"
DPI = 150
_LOSS_COLOURS = {"train_loss": "#0072B2", "val_loss": "#D55E00"}

Curve = tuple[list[float], list[float]]


def save_curves(path: Path, history_csv: Path) -> None:
    """Draw the trainer's history as PNG.

    Args:
        path: the PNG to write.
        history_csv: a table with the column `step` and any of `train_loss`, `val_loss`, `lr`, `val_dice_mean`,
            `val_dice_<class>`; cells may be empty, other columns are left out.
    Raises:
        MedsegError: E_MISSING if there is no history, E_RUN if it holds nothing to draw, E_OUTPUT.
    """
    figure = curves_figure(read_history(history_csv))
    with whole_file(path, ".png") as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def read_history(history_csv: Path) -> dict[str, Curve]:
    """Column → (steps, values) of its cells that hold a number.

    Raises:
        MedsegError: E_MISSING, E_RUN.
    """
    if not history_csv.is_file():
        raise MedsegError(Code.MISSING, "there is no history of this run", where=history_csv.name)
    curves: dict[str, Curve] = {}
    with history_csv.open(newline="", encoding="utf-8", errors="replace") as file, suppress(csv.Error):
        for row in csv.DictReader(file):  # what a crash or a disk damaged is left out
            step = _number(row.get(STEP))
            for name, cell in row.items():
                value = _number(cell)
                if step is None or value is None or name == STEP:
                    continue
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    if not any(_panel(name) for name in curves):
        raise MedsegError(
            Code.RUN,
            "the history holds nothing to draw",
            where=history_csv.name,
            expected=f"a column {STEP!r} and losses or Dice values",
            got=", ".join(curves) or "no numbers",
        )
    return curves


def curves_figure(curves: dict[str, Curve]) -> Figure:
    """One panel each for losses, Dice and learning rate, as far as there are curves for it."""
    drawers = {"loss": _draw_loss, "dice": _draw_dice, "lr": _draw_rate}
    panels = [panel for panel in drawers if any(_panel(name) == panel for name in curves)]
    heights = [0.5 if panel == "lr" else 1.0 for panel in panels]
    figure = Figure(figsize=(8, 0.7 + 2.6 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        drawers[panel](ax, {name: curve for name, curve in curves.items() if _panel(name) == panel})
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    return figure


def _panel(name: str) -> str | None:
    if name in _LOSS_COLOURS:
        return "loss"
    if name.startswith(DICE_PREFIX):
        return "dice"
    return "lr" if name == "lr" else None


def _draw_loss(ax: Axes, curves: dict[str, Curve]) -> None:
    for name, (steps, values) in curves.items():
        label = "training" if name == "train_loss" else "validation"
        ax.plot(steps, values, color=_LOSS_COLOURS[name], linewidth=1.4, label=label, marker=_marker(steps))
    ax.set_ylabel("loss")
    ax.legend(frameon=False, fontsize=8)


def _draw_dice(ax: Axes, curves: dict[str, Curve]) -> None:
    classes = [name for name in curves if name != DICE_MEAN]
    for name, colour in zip(classes, class_colours(len(classes)), strict=True):
        steps, values = curves[name]
        label = name.removeprefix(DICE_PREFIX)
        ax.plot(steps, values, color=colour, linewidth=1.2, label=label, marker=_marker(steps))
    if DICE_MEAN in curves:
        steps, values = curves[DICE_MEAN]
        ax.plot(steps, values, color="black", linewidth=2, label="mean", marker=_marker(steps))
        best = max(range(len(values)), key=values.__getitem__)
        ax.plot(steps[best], values[best], "o", color="black", markersize=6, label=f"best mean {values[best]:.3f}")
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("validation Dice")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(classes) // 14)


def _draw_rate(ax: Axes, curves: dict[str, Curve]) -> None:
    for steps, values in curves.values():
        ax.plot(steps, values, color="#555555", linewidth=1.2, marker=_marker(steps))
    ax.set_ylabel("learning rate")


def _marker(steps: list[float]) -> str:
    """A curve of one point is visible only as a marker."""
    return "." if len(steps) == 1 else ""


def _number(cell: str | None) -> float | None:
    try:
        return float(cell) if cell else None
    except (TypeError, ValueError):
        return None
