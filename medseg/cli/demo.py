"""medseg demo."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("demo", short_help="The whole way on a phantom, in minutes.")
@click.option(
    "-o", "--output", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder for everything."
)
@click.option("--minutes", default=2.0, show_default=True, help="Time budget of the training.")
@click.option("--seed", default=0, show_default=True, help="Seed of the phantom and the training.")
def demo(output: Path, minutes: float, seed: int) -> None:
    """Make a phantom data set, train on it, predict a DICOM series that the model never saw, score and draw it.

    Everything goes the ways that your own data would go: the same train, predict and evaluate.
    """
    from medseg.demo import run_demo

    run_demo(output, minutes=minutes, seed=seed)
