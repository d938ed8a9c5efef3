"""An analysis as a terminal shows it."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medseg.statistics import Interval
from medseg.survival.analysis import Analysis

MOST_SHOWN = 25
"""Features that the terminal lists; cox.csv has all."""


def print_analysis(analysis: Analysis, console: Console) -> None:
    """Print the model, its C-indices and the groups."""
    cohort = analysis.cohort
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in ("feature", "hazard ratio per SD", "95 % interval", "p", "proportional, p"):
        view.add_column(title, justify="left" if title == "feature" else "right", overflow="fold")
    effects = sorted(analysis.effects, key=lambda effect: (math.isnan(effect.p), effect.p))
    for effect in effects[:MOST_SHOWN]:
        view.add_row(
            escape(effect.feature), f"{effect.hazard_ratio:.3f}", f"{effect.low:.3f} to {effect.high:.3f}",
            _p(effect.p), _p(effect.proportional_p),
        )  # fmt: skip
    console.print(view)
    if len(effects) > MOST_SHOWN:
        console.print(f"… and {len(effects) - MOST_SHOWN} more features", style="dim", highlight=False)
    patients = len(set(cohort.patients))
    ridge = f"ridge penalty {analysis.penalty:g}: intervals and p are then only a rough guide"
    console.print(
        f"{len(cohort.ids)} rows of {patients} patients, {int(cohort.event.sum())} events, "
        f"{len(cohort.features)} features; {ridge if analysis.penalty else 'no penalty'}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(f"C-index, cross-validated:   {_interval(analysis.cross_validated)}", highlight=False)
    console.print(f"C-index, of training data:  {_interval(analysis.apparent)}  (too good)", highlight=False)
    sizes = ", ".join(f"{c.name} {c.at_risk[0]} ({int(c.events.sum())} events)" for c in analysis.curves)
    console.print(f"groups by cross-validated risk: {sizes}; log-rank p {_p(analysis.logrank_p)}", highlight=False)
    broken = [effect.feature for effect in analysis.effects if effect.proportional_p < 0.05]
    if broken:
        console.print(
            f"the effect of {len(broken)} features may change over time (proportional, p below 0.05): "
            f"{escape(', '.join(broken[:5]))}{', …' if len(broken) > 5 else ''}; of {len(effects)} tests about "
            f"{0.05 * len(effects):.1f} would be so by chance",
            style="yellow", highlight=False, soft_wrap=True,
        )  # fmt: skip
    if analysis.cross_validated.warning:
        console.print(analysis.cross_validated.warning, style="yellow", highlight=False)


def _interval(interval: Interval) -> str:
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _p(value: float) -> str:
    return "" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
