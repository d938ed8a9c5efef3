"""medseg survival."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("survival", short_help="Time to an event from features: Cox model, C-index, Kaplan–Meier.")
@click.argument("tables", metavar="TABLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--time", required=True, metavar="COLUMN", help="Time until the event or the end of observation.")
@click.option("--event", required=True, metavar="COLUMN", help="Whether the event came: 1, or 0 (censored).")
@click.option("--features", metavar="NAMES",
              help='Columns between commas, or patterns: "age,glcm_*", of any TABLE; else all columns of numbers '
              "of the first.")  # fmt: skip
@click.option("--label", metavar="NAME", help="The structure whose rows count, where a case has several.")
@click.option("--by", metavar="COLUMN", help="What joins several tables; else case, or patient.")
@click.option("--penalty", metavar="auto|NUMBER", default="auto", show_default=True,
              help="Ridge penalty; auto: none with ten events for each feature, else chosen by "
              "cross-validation.")  # fmt: skip
@click.option("--folds", default=5, show_default=True, help="Of the cross-validation, over patients.")
@click.option("--groups", default="2", show_default=True, type=click.Choice(["2", "3"]), help="Risk groups.")
@click.option("--seed", default=0, show_default=True, help="Of folds and intervals.")
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="Folder for cox.csv, risk.csv, kaplan_meier.csv and .png, hazard_ratios.png, "
              "survival.json.")  # fmt: skip
def survival(
    tables: tuple[Path, ...],
    time: str,
    event: str,
    features: str | None,
    label: str | None,
    by: str | None,
    penalty: str,
    folds: int,
    groups: str,
    seed: int,
    output: Path | None,
) -> None:
    """Model the time until an event from the columns of TABLE (extra medseg[survival]).

    TABLE is a CSV, as medseg measure writes it; several are joined by case or patient: features in the first, times in
    the second. Columns of the second are features only where --features names them.

    Cox's model gives a hazard ratio for one standard deviation of each feature, with its 95 % interval and a check that
    the effect does not change over time. Its C-index in its own patients is too good; the one to quote is
    cross-validated: each risk comes from a model that had not seen the patient. Kaplan–Meier curves are of groups by
    that risk.

    \b
      medseg survival features.csv outcomes.csv --time months --event died -o survival
      medseg survival features.csv outcomes.csv --time months --event died --features "shape_volume,glcm_*" --groups 3
      medseg survival embeddings.csv outcomes.csv --time months --event died --penalty 0.1
    """
    if folds < 2:
        raise click.UsageError("--folds takes at least 2")
    from rich.console import Console

    from medseg.survival.analysis import analyse, write_analysis
    from medseg.survival.cox import lifelines
    from medseg.survival.data import read_cohort

    ridge = _penalty(penalty)
    lifelines()
    console = Console()
    chosen = tuple(name.strip() for name in features.split(",")) if features else ()
    cohort = read_cohort(tables, time=time, event=event, features=chosen, label=label, key=by)
    for note in cohort.notes:
        console.print(note, style="yellow", highlight=False, markup=False)
    with console.status("fitting"):
        analysis = analyse(cohort, penalty=ridge, num_folds=folds, num_groups=int(groups), seed=seed)
    from medseg.survival.text import print_analysis

    print_analysis(analysis, console)
    if output is not None:
        settings = {
            "tables": [table.name for table in tables],
            "time": time,
            "event": event,
            "features": list(chosen) or "all numbers of the first table",
            "label": label,
            "penalty": penalty,
            "folds": folds,
            "groups": int(groups),
            "seed": seed,
        }
        written = write_analysis(analysis, output, settings)
        console.print(f"written: {output / written[0]}, {', '.join(written[1:])}", highlight=False, soft_wrap=True)


def _penalty(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise click.UsageError(f"--penalty takes auto or a number from 0 on, not {text!r}")
    return value
