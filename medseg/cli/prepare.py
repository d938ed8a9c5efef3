"""medseg prepare."""

from __future__ import annotations

from typing import Literal

import click


@click.command("prepare", short_help="Prepare the cases of a training before it, also on a cluster.")
@click.argument("overrides", nargs=-1, metavar="KEY=VALUE...", type=click.UNPROCESSED)
@click.option("--engine", default="local", show_default=True, type=click.Choice(["local", "ray"]),
              help="Who works: this process, or a Ray cluster (RAY_ADDRESS, else one of this machine).")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), show_default="one for each processor that has 4 GB",
              help="Processes of --engine ray; each holds a case.")  # fmt: skip
def prepare(overrides: tuple[str, ...], engine: Literal["local", "ray"], workers: int | None) -> None:
    """Read and prepare the cases of a training, and keep them in its store: the training then begins at once.

    Keys and values are those of medseg train, and so is what is prepared: the cases that train or validate, as the plan
    wants them. What the store has is not done again, so the same command goes on where another one was ended.

    With --engine ray workers on many machines share the work. All of them see the data and the store at the same paths;
    the store lies in ./runs/prepared, or where data.store says. See docs/scaling.md.

    \b
      medseg prepare data.root=FOLDER
      RAY_ADDRESS=head:6379 medseg prepare --engine ray data.root=/shared/scans data.store=/shared/prepared
    """
    from medseg.config import compose
    from medseg.errors import Code, MedsegError
    from medseg.tasks import SEGMENTATION, TASKS, task_of
    from medseg.training.prepare_data import prepare_data

    if workers is not None and engine != "ray":
        raise click.UsageError("--workers is of --engine ray, which is not asked for.")
    if task_of(overrides) is not TASKS[SEGMENTATION]:
        raise MedsegError(
            Code.CONFIG,
            "only the cases of a segmentation are prepared ahead",
            where="task",
            remedy="leave this out: a training of another task prepares its own",
        )
    experiment = compose(TASKS[SEGMENTATION].config, overrides)
    prepare_data(experiment, engine=engine, num_workers=workers, stated=overrides)
