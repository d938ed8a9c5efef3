"""The verbs. Imports nothing heavy before it knows the verb: `medseg --help` must answer at once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from medseg import __version__
from medseg.errors import MedsegError

if TYPE_CHECKING:
    from medseg.reports.pairs import MissingPolicy
    from medseg.training.experiment import Experiment

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""Of the log in a run's folder, as in configs/train.yaml."""
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130

HELP = """From a folder of medical scans to a trained, validated, usable segmentation model.

\b
  medseg demo                                     the whole way on a phantom, in minutes
  medseg train data.root=FOLDER                   train on your own cases
  medseg predict RUN SCAN... -o OUT               label scans the model has never seen
  medseg evaluate PREDICTIONS REFERENCES -o OUT   honest numbers, per case and class

For research use only; not a medical device."""

TRAIN_HELP = """Train a model: `medseg train key=value ...` (Hydra).

`medseg train --help` shows the groups, all keys and examples."""


class Verbs(click.Group):
    """Verbs in the order of use, not of the alphabet."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of the verbs."""
        return list(self.commands)


@click.group(cls=Verbs, help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="medseg")
def cli() -> None:
    """The program."""


@cli.command(
    "train",
    help=TRAIN_HELP,
    short_help="Train a model on a folder of cases.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def train(arguments: tuple[str, ...]) -> None:
    """Compose the configuration as Hydra does and train."""
    from medseg.config import resumed, run_hydra, write_config
    from medseg.training.train import train as train_model

    def begin(experiment: Experiment, folder: Path) -> None:
        write_config(experiment, folder)
        train_model(experiment, folder)

    to_resume = [argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")]
    if to_resume:
        run = Path(to_resume[-1]).expanduser().absolute()
        experiment = resumed(run, [a for a in arguments if not a.startswith("resume=")])
        logging.basicConfig(filename=run / "train.log", level=logging.INFO, format=LOG_FORMAT)
        train_model(experiment, run)
    else:
        run_hydra("train", arguments, begin)


@cli.command("predict", short_help="Label scans with a trained model.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the label files.")
@click.option("--checkpoint", default="best", show_default=True, type=click.Choice(["best", "latest"]))
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", default="auto", show_default=True, type=click.Choice(["auto", "bf16", "fp16", "fp32"]))
@click.option("--step", default=0.5, show_default=True, help="Distance of tiles as a share of the tile.")
@click.option("--mirror", is_flag=True, help="Average over mirrored passes, where the model was trained so.")
@click.option("--batch-size", default=4, show_default=True, help="Tiles in one forward pass.")
@click.option("--preview", is_flag=True, help="Also save an overlay picture (PNG) of each case.")
@click.option("--overwrite", is_flag=True, help="Replace label files that exist already.")
def predict(
    run: Path,
    inputs: tuple[Path, ...],
    output: Path,
    checkpoint: str,
    device: str,
    precision: str,
    step: float,
    mirror: bool,
    batch_size: int,
    preview: bool,
    overwrite: bool,
) -> None:
    """Label scans with the model of RUN (a folder that medseg train made).

    Each INPUT is a file (NIfTI, PNG, TIFF), a folder with one DICOM series, or a folder of many cases. The model is
    loaded once. Each label file lies on exactly its scan's grid, in the smallest integer type, and carries the
    values that the training labels had.

    \b
      medseg predict runs/2026-01-31_10-00-00_unet scan.nii.gz -o labels
      medseg predict RUN patient7/CT_series patient8/CT_series -o labels --preview
      medseg predict RUN folder_of_scans -o labels
    """
    from rich.console import Console

    from medseg.inference.folder import predict_inputs
    from medseg.inference.predictor import Predictor
    from medseg.reports.overlay import save_overlay

    predictor = Predictor.from_run(
        run, checkpoint=checkpoint, device=device, precision=precision, step=step, mirror=mirror, batch_size=batch_size
    )
    predict_inputs(
        predictor, inputs, output, Console(), overwrite=overwrite, draw_preview=save_overlay if preview else None
    )


@cli.command("evaluate", short_help="Compare label files with references.")
@click.argument("predictions", type=click.Path(path_type=Path))
@click.argument("references", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for metrics.csv, summary.csv, metrics.json."
)
@click.option(
    "--tolerance", default=2.0, show_default=True, help="Tolerance of the surface Dice in mm (pixels for pictures)."
)
@click.option("--labels", help='Classes as {name: value}, e.g. "{liver: 1, spleen: 2}"; else as found.')
@click.option("--missing", default="error", show_default=True, type=click.Choice(["error", "count", "skip"]),
              help="A reference without a prediction: refuse, count it as a missed case, or leave it out.")  # fmt: skip
@click.option("--threads", default=2, show_default=True, help="Cases measured at a time.")
def evaluate(
    predictions: Path,
    references: Path,
    output: Path | None,
    tolerance: float,
    labels: str | None,
    missing: str,
    threads: int,
) -> None:
    """Measure how well PREDICTIONS agree with REFERENCES: two files, or two folders with the same case names.

    Dice, IoU, sensitivity, specificity, precision, HD95, average surface distance, surface Dice, volume and volume
    error, per case and class, with mean, median and standard deviation. A missed structure never improves a mean: its
    Dice is 0 and its distances are the diagonal of the scan; such cases are counted.
    """
    from rich.console import Console

    from medseg.labels import Labels
    from medseg.reports.evaluation import evaluate_folders
    from medseg.reports.progress import counting_bar
    from medseg.reports.tables import print_evaluation

    console = Console()
    with counting_bar(console, "measuring cases") as progress:
        evaluation = evaluate_folders(
            predictions,
            references,
            labels=None if labels is None else Labels.from_text(labels),
            tolerance_mm=tolerance,
            missing=cast("MissingPolicy", missing),
            num_threads=threads,
            progress=progress,
        )
    print_evaluation(evaluation, console)
    if output is not None:
        evaluation.write(output)
        console.print(f"written: {output / 'metrics.csv'}, summary.csv, metrics.json", highlight=False, soft_wrap=True)


@cli.command("demo", short_help="The whole way on a phantom, in minutes.")
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a verb; refusals become a message and exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["-sc"]:
            _complete(arguments)
        else:
            cli.main(args=arguments, prog_name="medseg", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except MedsegError as error:
        _show(error)
        sys.exit(EXIT_REFUSED)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


def _show(error: MedsegError) -> None:
    first, *rest = str(error).splitlines()
    click.secho(first, fg="red", bold=True, err=True)
    for line in rest:
        click.echo(line, err=True)


def _complete(arguments: Sequence[str]) -> None:
    """Shell completion: Hydra's script asks `medseg -sc query=SHELL` with the line in COMP_LINE."""
    words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) > 2 and words[1] == "train":
        from medseg.config import run_hydra

        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
        run_hydra("train", arguments, lambda experiment, folder: None)
    else:
        typed = words[1] if len(words) > 1 else ""
        click.echo(" ".join(name for name in cli.commands if name.startswith(typed)))


if __name__ == "__main__":
    main()
