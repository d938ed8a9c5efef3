"""Drawings of an evaluation: ROC curves, confusion matrix, the course of training, and where a network looked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medseg.classification.bundle import Classifier
from medseg.classification.evaluation import ClassificationEvaluation
from medseg.explain.saliency import grad_cam
from medseg.formats.atomic import whole_file
from medseg.reports.curves import Curve
from medseg.reports.html.figures import FAINT, INK, QUIET
from medseg.reports.palette import class_colours

MAX_CURVES = 10
"""Classes whose ROC curves are drawn; of more those with the smallest areas."""
MAX_MATRIX = 30
"""Classes of which the confusion matrix is drawn."""
DPI = 110


def roc_figure(evaluation: ClassificationEvaluation) -> Figure:
    """ROC curves of the shown classes, with the decisions that were scored as points."""
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8)
    drawn = [name for name in evaluation.shown if name not in evaluation.undefined]
    drawn = sorted(drawn, key=lambda name: evaluation.aucs[name].value)[:MAX_CURVES]
    colours = dict(zip(evaluation.shown, class_colours(len(evaluation.shown)), strict=True))
    for name in sorted(drawn, key=evaluation.shown.index):
        curve = evaluation.curve(name)
        label = f"{name} {evaluation.aucs[name]}"
        ax.plot(curve.fall_out, curve.sensitivity, color=colours[name], linewidth=1.6, label=label, clip_on=False)
    for row in evaluation.decisions:
        sensitivity, specificity = row.values["sensitivity"].value, row.values["specificity"].value
        if row.class_name in drawn and not math.isnan(sensitivity) and not math.isnan(specificity):
            marker = "s" if row.point == "most probable" else "o"
            ax.plot(1 - specificity, sensitivity, marker, color=colours[row.class_name], markeredgecolor=INK,
                    markeredgewidth=0.6, markersize=5, clip_on=False, zorder=4)  # fmt: skip
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_aspect("equal")
    ax.set_xlabel("1 − specificity")
    ax.set_ylabel("sensitivity")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if drawn:
        legend = ax.legend(
            loc="lower right", fontsize=7.5, frameon=False, title="AUC (95 % interval)", title_fontsize=7.5
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def confusion_figure(evaluation: ClassificationEvaluation) -> Figure | None:
    """The confusion matrix, shaded by the share of each row; None for too many classes."""
    classes, counts = evaluation.classes, evaluation.confusion
    if len(classes) > MAX_MATRIX:
        return None
    size = 1.5 + 0.55 * len(classes)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    ax = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for (row, column), count in np.ndenumerate(counts):
        ax.add_patch(_cell(row, column, float(shares[row, column]), right=row == column))
        ax.text(column, row, str(count), ha="center", va="center", fontsize=9, color=INK)
    ax.set_xlim(-0.5, len(classes) - 0.5)
    ax.set_ylim(len(classes) - 0.5, -0.5)
    ax.set_xticks(range(len(classes)), classes, rotation=30 if len(classes) > 3 else 0, parse_math=False,
                  ha="right" if len(classes) > 3 else "center")  # fmt: skip
    ax.set_yticks(range(len(classes)), classes, parse_math=False)
    ax.set_xlabel("predicted")
    ax.set_ylabel("is")
    ax.set_aspect("equal")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure


def course_figure(curves: Mapping[str, Curve]) -> Figure:
    """Losses, and what validations found, over steps."""
    found = {"val_auc": "AUC", "val_balanced_accuracy": "balanced accuracy", "val_accuracy": "accuracy"}
    panels = [("loss", {"train_loss": "training", "val_loss": "validation"}), ("validation", found)]
    figure = Figure(figsize=(8.2, 3.0), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, (title, columns) in zip(axes, panels, strict=True):
        for colour, (column, label) in zip(("#0072B2", "#D55E00", "#009E73"), columns.items(), strict=False):
            if column in curves:
                marker = "o" if column.startswith("val") else None
                ax.plot(*curves[column], color=colour, label=label, linewidth=1.3, marker=marker, markersize=3)
        ax.set_title(title, fontsize=9, loc="left", fontweight="bold")
        ax.set_xlabel("step", fontsize=8)
        ax.grid(color=FAINT, linewidth=0.4, alpha=0.6)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        if ax.lines:
            ax.legend(fontsize=7.5, frameon=False)
        ax.tick_params(colors=QUIET)
    return figure


def save_attention(path: Path, classifier: Classifier, image: torch.Tensor, output: int, title: str) -> None:
    """Draw an image as the network sees it, and beside it what spoke for a class (Grad-CAM).

    Of a volume the slice is drawn in which most speaks for it.

    Args:
        path: the PNG to write.
        classifier: the model.
        image: as the network sees it, shape (C, *size).
        output: number of the class.
        title: above it.
    """
    model = classifier.model
    layer = next(name for name, module in model.named_modules() if module is model.last_maps)
    device = next(model.parameters()).device
    spoke = (
        grad_cam(model, image.to(device), output, torch.ones(1, dtype=torch.bool, device=device), layer).cpu().numpy()
    )
    shown = image.numpy()
    if spoke.ndim == 3:
        middle = int(spoke.sum(axis=(1, 2)).argmax())
        spoke, shown = spoke[middle], shown[:, middle]
    low, high = np.percentile(shown, [0.5, 99.5])
    shown = np.clip((shown - low) / max(float(high - low), 1e-6), 0, 1)
    plane = np.moveaxis(shown, 0, -1) if len(shown) == 3 else np.repeat(shown[0][..., None], 3, axis=-1)
    figure = Figure(figsize=(6.4, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.imshow(plane, interpolation="nearest")
    right.imshow(plane, interpolation="nearest")
    largest = float(spoke.max())
    if largest > 0:
        shares = spoke / largest
        right.imshow(shares, cmap="inferno", alpha=0.65 * shares, vmin=0, vmax=1, interpolation="bilinear")
    else:
        right.set_xlabel("nothing speaks for it", fontsize=8)
    for ax in (left, right):
        ax.set_xticks([])
        ax.set_yticks([])
    figure.suptitle(title, fontsize=9, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, ".png") as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _cell(row: int, column: int, share: float, *, right: bool) -> Rectangle:
    colour = "#009E73" if right else "#D55E00"
    return Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, facecolor=colour, alpha=0.08 + 0.6 * share, linewidth=0)
