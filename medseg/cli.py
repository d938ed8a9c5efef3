"""The verbs. Imports nothing heavy before it knows the verb: `medseg --help` must answer at once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

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
  medseg inspect FOLDER                           what lies in a folder of DICOM or images, and what is wrong
  medseg convert SERIES scan.nii.gz               DICOM, SEG and RTSTRUCT to NIfTI, and labels back to DICOM
  medseg train data.root=FOLDER                   train on your own cases
  medseg predict RUN SCAN... -o OUT               label scans the model has never seen
  medseg evaluate PREDICTIONS REFERENCES -o OUT   honest numbers, per case and class

For research use only; not a medical device."""

TRAIN_HELP = """Train a model: `medseg train key=value ...` (Hydra).

`medseg train --help` shows the groups, all keys and examples."""


T = TypeVar("T")


def reading_options(command: Callable[..., T]) -> Callable[..., T]:
    """The options of how DICOM is read, the same for every verb that reads it."""
    for option in (
        click.option("--without-preamble", is_flag=True, help='Try DICOM on files without "DICM" at byte 128.'),
        click.option("--resample-irregular", is_flag=True,
                     help="Mend gantry tilt, gaps and uneven spacing of a DICOM series instead of refusing it."),
        click.option("--series", metavar="UID", help="SeriesInstanceUID to read where DICOM files hold several."),
    ):  # fmt: skip
        command = option(command)
    return command


class Verbs(click.Group):
    """Verbs in the order of use, not of the alphabet."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of the verbs."""
        return list(self.commands)


@click.group(cls=Verbs, help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="medseg")
def cli() -> None:
    """The program."""


@cli.command("inspect", short_help="Show what lies in a folder of DICOM or images.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of tables.")
@click.option("--pictures", metavar="FOLDER", type=click.Path(path_type=Path),
              help="Also save a picture (PNG) of each scan: three planes, with what was drawn on them. This reads the "
                   "voxels, and finds more that is wrong than the headers tell.")  # fmt: skip
@click.option("--paths", is_flag=True, help="Show in which folder each series lies (names of folders may be names).")
@click.option("--series", metavar="UID", help="Show only this series (its UID, or the name that the table gives it).")
@click.option("--resample-irregular", is_flag=True, help="Judge and draw series as this option of convert reads them.")
@click.option("--without-preamble", is_flag=True, help='Try DICOM on files without "DICM" at byte 128.')
def inspect(
    path: Path,
    as_json: bool,
    pictures: Path | None,
    paths: bool,
    series: str | None,
    resample_irregular: bool,
    without_preamble: bool,
) -> None:
    """Show what lies at PATH, without changing anything: which scans, who drew on them, what is wrong with them.

    PATH is a tree or zip of DICOM files, a NIfTI file or a picture, or a folder of these. Series are named by
    modality and a digest of their UID, patients by a digest: nothing about the patient is shown. The exit status is 0
    also where scans are broken; --json says which.

    \b
      medseg inspect EXPORT
      medseg inspect EXPORT --pictures pictures     look before you train
      medseg inspect EXPORT --paths                 where each series lies
      medseg inspect EXPORT --json > inventory.json
    """
    from rich.console import Console

    from medseg.reports.inventory import inspect_path

    inspect_path(
        path,
        Console(),
        as_json=as_json,
        pictures=pictures,
        paths=paths,
        series=series,
        resample_irregular=resample_irregular,
        without_preamble=without_preamble,
    )


@cli.command("convert", short_help="Convert DICOM, SEG and RTSTRUCT to NIfTI, labels to DICOM, nnU-Net models.")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--image", metavar="SERIES", type=click.Path(path_type=Path),
              help="The scan that a SEG, an RTSTRUCT or a label belongs to.")  # fmt: skip
@click.option("--format", "form", metavar="FORMAT",
              help="nifti, dicom-seg or rtstruct; else what the ending of OUT says.")  # fmt: skip
@click.option("--labels", metavar="TABLE",
              help="Which structures become which classes, or which value has which name (see above).")  # fmt: skip
@click.option("--separate", is_flag=True, help="One NIfTI file for each structure, in the folder OUT.")
@click.option("--orientation", metavar="LETTERS",
              help="Where the axes of an nnU-Net model's training files ran to; RAS if not given.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace files that exist already.")
@reading_options
def convert(
    source: Path,
    target: Path,
    image: Path | None,
    form: str | None,
    labels: str | None,
    separate: bool,
    orientation: str | None,
    overwrite: bool,
    series: str | None,
    resample_irregular: bool,
    without_preamble: bool,
) -> None:
    """Convert IN to OUT, without moving a voxel. What IN is, is decided by its content.

    A DICOM series (a folder, a zip, a file) becomes one NIfTI file; a tree of series becomes a folder: one file for
    each series, and a label file (..._seg.nii.gz) of what was drawn on it. What cannot be converted is listed, all else
    is written.

    \b
      medseg convert SERIES scan.nii.gz
      medseg convert EXPORT nifti_folder
      medseg convert export.zip nifti_folder --labels "{tumour: [GTV-1, gtv]}"

    A SEG or RTSTRUCT file becomes a label file on the grid of its images, which are --image, or found beside it; a SEG
    without --image keeps its own grid. All structures are taken in the order of their numbers, or those that --labels
    names; where they overlap, the later one in --labels takes the voxel.

    \b
      medseg convert seg.dcm label.nii.gz --image SERIES
      medseg convert rtstruct.dcm label.nii.gz --labels "{tumour: [GTV-1, gtv], lung: Lung}"
      medseg convert rtstruct.dcm folder --separate

    A label file becomes a SEG or RTSTRUCT on the DICOM series that it lies on. Names come from --labels, from
    label.json or predictions.json beside it, else structure_1 and so on.

    \b
      medseg convert label.nii.gz label.seg.dcm --image SERIES --labels "{liver: 1, spleen: 2}"
      medseg convert label.nii.gz label.rtstruct.dcm --image SERIES

    A model that nnU-Net v2 trained (the folder with plans.json, or a checkpoint in it) becomes a run for medseg
    predict. nnU-Net does not write down how its training files lay in the patient: --orientation does, as RAS or LPS.

    \b
      medseg convert nnUNetTrainer__nnUNetPlans__3d_fullres/fold_0 RUN --orientation LPS
    """
    from rich.console import Console

    from medseg.conversion import Options
    from medseg.conversion import convert as convert_path
    from medseg.formats import Reading
    from medseg.formats.dicom.export import form_named

    reading = Reading(series, channels=True, resample_irregular=resample_irregular, without_preamble=without_preamble)
    options = Options(
        reading, image, None if form is None else form_named(form), labels, separate, overwrite, orientation
    )
    convert_path(source, target, Console(), options)


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
@click.option("--format", "forms", default="nifti", show_default=True, metavar="LIST",
              help="What to write: nifti, dicom-seg, rtstruct, or several with commas. DICOM needs DICOM.")  # fmt: skip
@click.option("--preview", is_flag=True, help="Also save an overlay picture (PNG) of each case.")
@click.option("--overwrite", is_flag=True, help="Replace label files that exist already.")
@reading_options
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
    forms: str,
    preview: bool,
    overwrite: bool,
    series: str | None,
    resample_irregular: bool,
    without_preamble: bool,
) -> None:
    """Label scans with the model of RUN (a folder that medseg train made).

    Each INPUT is a file (NIfTI, PNG, TIFF, enhanced DICOM), a folder or zip with one DICOM series, a tree of many
    series, or a folder of many cases. The model is loaded once. Each label file lies on exactly its scan's grid, in
    the smallest integer type, and carries the values that the training labels had. predictions.json beside them says
    which value means what, and what is to be known of each case (lossy sources, what was resampled).

    \b
      medseg predict runs/2026-01-31_10-00-00_unet scan.nii.gz -o labels
      medseg predict RUN patient7/CT_series patient8/CT_series -o labels --preview
      medseg predict RUN folder_of_scans -o labels
      medseg predict RUN export.zip -o labels --format nifti,dicom-seg,rtstruct
    """
    from rich.console import Console

    from medseg.formats import Reading
    from medseg.formats.dicom.export import forms_of
    from medseg.inference.folder import predict_inputs, refuse_swapped
    from medseg.inference.predictor import Predictor
    from medseg.reports.overlay import save_overlay

    wanted = forms_of(forms)
    refuse_swapped(run, inputs)
    predictor = Predictor.from_run(
        run, checkpoint=checkpoint, device=device, precision=precision, step=step, mirror=mirror, batch_size=batch_size
    )
    predict_inputs(
        predictor,
        inputs,
        output,
        Console(),
        forms=wanted,
        reading=Reading(series, resample_irregular=resample_irregular, without_preamble=without_preamble),
        overwrite=overwrite,
        draw_preview=save_overlay if preview else None,
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
