"""medseg compare."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("compare", short_help="Two evaluations of the same cases: which model is better?")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the table as JSON.")
@click.option("--metrics", metavar="NAMES", help="Metrics between commas, e.g. dice,hd95; else all that rank.")
def compare(first: Path, second: Path, output: Path | None, metrics: str | None) -> None:
    """Compare two models by the evaluations that medseg evaluate -o wrote (metrics.json, or its folder).

    Per class and metric: both means, the difference with its 95 % bootstrap interval, and a paired test (Wilcoxon's
    signed-rank test, corrected by Holm for all rows). Evaluations of other cases, classes or references are refused.

    \b
      medseg evaluate unet     REFERENCES -o scores/unet
      medseg evaluate residual REFERENCES -o scores/residual
      medseg compare scores/unet scores/residual
    """
    from rich.console import Console

    from medseg.metrics.metric import metric_names
    from medseg.reports import comparison

    names = None if metrics is None else metric_names(metrics)
    result = comparison.compare(*(comparison.read_metrics(path) for path in (first, second)), names=names)
    console = Console()
    of_whom = f" of {result.num_patients} patients" if result.units == "patients" else ""
    console.print(
        f"\n{result.num_cases} cases{of_whom}  first: {first}  second: {second}", highlight=False, markup=False
    )
    comparison.print_comparison(result, console)
    if output is not None:
        result.write(output)
        console.print(f"written: {output}", highlight=False, soft_wrap=True, markup=False)
