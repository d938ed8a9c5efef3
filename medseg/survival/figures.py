"""Pictures of an analysis: Kaplan–Meier curves by risk group, and hazard ratios."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from medseg.formats.atomic import whole_file
from medseg.survival.analysis import Analysis, Curve

DPI = 150
COLOURS = ("#0072B2", "#E69F00", "#D55E00")
"""Okabe and Ito's: of low, middle and high risk."""
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100)
"""Ticks of hazard ratios."""
MOST_EFFECTS = 30
"""Features on one picture: the ones that are most sure to have an effect."""


def save_kaplan_meier(path: Path, analysis: Analysis, time: str = "time") -> None:
    """Draw the survival of each risk group, with who is still observed below.

    Args:
        path: the PNG to write.
        analysis: whose groups.
        time: what the times are called.
    Raises:
        MedsegError: E_OUTPUT.
    """
    figure = kaplan_meier_figure(analysis, time)
    with whole_file(path, ".png") as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def kaplan_meier_figure(analysis: Analysis, time: str = "time") -> Figure:
    """The figure that `save_kaplan_meier` saves."""
    curves = analysis.curves
    figure = Figure(figsize=(7, 4.4 + 0.25 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    axes, table = figure.subplots(2, 1, sharex=True, height_ratios=(4.4, 0.35 + 0.25 * len(curves)))
    colours = (COLOURS[0], COLOURS[2]) if len(curves) == 2 else COLOURS
    for curve, colour in zip(curves, colours, strict=False):
        axes.fill_between(curve.times, curve.low, curve.high, step="post", color=colour, alpha=0.15, linewidth=0)
        label = f"{curve.name} (n = {curve.at_risk[0]}, {int(curve.events.sum())} events)"
        axes.step(curve.times, curve.survival, where="post", color=colour, label=label)
        lost = curve.censored > 0
        axes.plot(curve.times[lost], curve.survival[lost], "|", color=colour, markersize=5)
    end = max(float(curve.times[-1]) for curve in curves)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(-0.03 * end, 1.03 * end)
    axes.set_ylabel("share without the event")
    axes.spines[["top", "right"]].set_visible(False)
    unseen = analysis.cross_validated
    chance = "" if math.isnan(analysis.logrank_p) else f"log-rank p {_p(analysis.logrank_p)}"
    axes.set_title(
        f"C-index {unseen.mean:.2f} ({unseen.low:.2f} to {unseen.high:.2f}), cross-validated;  {chance}", fontsize=10
    )
    axes.legend(loc="lower left", frameon=False, fontsize=9)
    axes.tick_params(labelbottom=True)
    ticks = [t for t in MaxNLocator(6, integer=end > 6).tick_values(0, end) if 0 <= t <= end]
    axes.set_xticks(ticks)
    axes.set_xlabel(time)
    for row, (curve, colour) in enumerate(zip(curves, colours, strict=False)):
        for tick in ticks:
            table.text(tick, -row, str(at_risk(curve, tick)), ha="center", va="center", fontsize=9, color=colour)
        table.text(
            -0.02, -row, curve.name, ha="right", va="center", fontsize=9, color=colour,
            transform=table.get_yaxis_transform(),
        )  # fmt: skip
    table.set_ylim(-len(curves) + 0.4, 0.6)
    table.set_title("at risk", fontsize=9, loc="left", pad=2)
    table.axis("off")
    return figure


def at_risk(curve: Curve, time: float) -> int:
    """How many are still observed just before a time."""
    later = np.flatnonzero(curve.times >= time)
    return int(curve.at_risk[later[0]]) if len(later) else 0


def save_effects(path: Path, analysis: Analysis) -> None:
    """Draw hazard ratios for one standard deviation with their 95 % intervals.

    Raises:
        MedsegError: E_OUTPUT.
    """
    figure = effects_figure(analysis)
    with whole_file(path, ".png") as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def effects_figure(analysis: Analysis) -> Figure:
    """The figure that `save_effects` saves."""
    known = [effect for effect in analysis.effects if not math.isnan(effect.p)]
    effects = sorted(known, key=lambda effect: effect.p)[:MOST_EFFECTS]
    figure = Figure(figsize=(7, 1.2 + 0.28 * len(effects)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = -np.arange(len(effects))
    ratios = np.array([effect.hazard_ratio for effect in effects])
    reach = np.array([[e.hazard_ratio - e.low, e.high - e.hazard_ratio] for e in effects]).T
    axes.errorbar(ratios, places, xerr=reach, fmt="o", color=COLOURS[0], markersize=4, linewidth=1.2)
    axes.axvline(1, color="0.6", linewidth=1, zorder=0)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in RATIOS if low <= tick <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(places, [effect.feature for effect in effects], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0.6 - len(effects), 0.6)
    about = ["95 % interval"]
    if analysis.penalty:
        about.append(f"ridge penalty {analysis.penalty:g}")
    if len(effects) < len(analysis.effects):
        about.append(f"{len(effects)} of {len(analysis.effects)} features")
    axes.set_xlabel(f"hazard ratio for one standard deviation\n({', '.join(about)})", fontsize=9)
    return figure


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
