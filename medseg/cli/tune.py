"""medseg tune."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("tune", short_help="Search for settings: train trial after trial, and keep the best.")
@click.argument("overrides", nargs=-1, metavar="KEY=VALUE...", type=click.UNPROCESSED)
@click.option("-o", "--output", metavar="FOLDER", required=True, type=click.Path(path_type=Path), help="Of the trials.")
@click.option("--trials", metavar="N", default=20, show_default=True, type=click.IntRange(1), help="How many in all.")
@click.option("--no-pruning", is_flag=True, help="Train every trial to its end.")
@click.option("--show", is_flag=True, help="Only compare the runs in the folder, of medseg train -m too.")
def tune(overrides: tuple[str, ...], output: Path, trials: int, no_pruning: bool, show: bool) -> None:
    """Search for settings with Optuna (extra medseg[sweep]).

    Keys and values are those of medseg train; several values, or an interval, are searched. A trial that is worse than
    half of the others at the same point ends early. The same command goes on with a search that was interrupted, and
    with more --trials; two at once on one folder share the work.

    \b
      medseg tune -o search --trials 30 data.root=FOLDER trainer.max_minutes=20 \\
          'optimizer.lr=tag(log,interval(1e-4,1e-2))' model=unet,residual_encoder_unet 'data.plan.batch_size=range(2,5)'
      medseg tune -o runs/sweep_2026-01-01_12-00-00 --show
    """
    from rich.console import Console

    if show:
        from medseg.reports.sweep import conclude_sweep

        conclude_sweep(output, Console())
        return
    from medseg import tuning

    tuning.tune(overrides, output, num_trials=trials, prunes=not no_pruning, console=Console())
