"""medseg select."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click


@click.command("select", short_help="Compare runs, and make the best ensemble of them.")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="ENSEMBLE", type=click.Path(path_type=Path),
              help="Folder for the choice; medseg predict takes it as its RUN.")  # fmt: skip
@click.option("--data", metavar="FOLDER", type=click.Path(path_type=Path),
              help="Where the cases are now, if the folder that the runs were trained on has moved.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", default="auto", show_default=True, type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
              help="What the network computes in; auto: bf16 where the processor has it.")  # fmt: skip
@click.option("--batch-size", default=4, show_default=True, help="Tiles in one forward pass.")
@click.option("--overwrite", is_flag=True, help="Replace an ensemble that is there already.")
def select(
    runs: tuple[Path, ...],
    output: Path,
    data: Path | None,
    device: str,
    precision: str,
    batch_size: int,
    overwrite: bool,
) -> None:
    """Compare two or more RUNs, and every two of them together, on their validation cases; take the best.

    The RUNs are folders that medseg train made, of the same cases, folds and classes: another model, another
    resolution, 2D instead of 3D. Train them with folds=all, so that every case validates once; with one fold there are
    few cases to choose by. Each case is predicted by the models that have not seen it.

    Ranked is by mean Dice. Two runs together take twice the time to predict: they are chosen only where they are better
    than one by more than chance (Wilcoxon's signed-rank test over the cases).

    \b
      medseg train data.root=DATA folds=all model=unet                  hydra.run.dir=runs/unet
      medseg train data.root=DATA folds=all model=residual_encoder_unet hydra.run.dir=runs/residual
      medseg select runs/unet runs/residual -o runs/best
      medseg predict runs/best SCAN -o labels

    ENSEMBLE holds selection.md (the table, and why), selection.json, ensemble.json (which runs, by relative paths: keep
    them where they are), validation/ (the chosen one's label files) and postprocessing.md (what predict does to its
    labels, decided on these).
    """
    from rich.console import Console

    from medseg.config import resumed
    from medseg.inference.folder import refuse_swapped
    from medseg.training.selection import select as select_best

    for run in runs:
        refuse_swapped(run, ())
    experiments = [resumed(run, []) for run in runs]
    if data is not None:
        experiments = [
            dataclasses.replace(one, data=dataclasses.replace(one.data, root=str(data.absolute())))
            for one in experiments
        ]
    select_best(
        runs,
        output,
        experiments,
        Console(),
        device=device,
        precision=precision,
        batch_size=batch_size,
        overwrite=overwrite,
    )
