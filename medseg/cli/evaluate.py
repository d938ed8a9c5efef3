"""medseg evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from medseg.cli.reading import reading_options

if TYPE_CHECKING:
    from medseg.formats import Reading
    from medseg.reports.pairs import MissingPolicy


@click.command("evaluate", short_help="Compare label files with references.")
@click.argument("predictions", type=click.Path(path_type=Path))
@click.argument("references", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for metrics.csv, summary.csv, metrics.json."
)
@click.option(
    "--tolerance", default=2.0, show_default=True, help="Tolerance of the surface Dice in mm (pixels for pictures)."
)
@click.option("--metrics", metavar="NAMES",
              help="Metrics between commas, e.g. default,cldice; default, all, or names as in docs/metrics.md. Dice is "
              "always among them.")  # fmt: skip
@click.option(
    "--labels",
    help='Classes as {name: value}, e.g. "{liver: 1, spleen: 2}"; else those of predictions.json or dataset.json '
    "beside the predictions or the references, else one for each value. A value of several names makes regions of "
    'them, "{tumour: [1, 2], core: 2}"; "ignore" names a value that does not count.',
)
@click.option("--missing", default="error", show_default=True, type=click.Choice(["error", "count", "skip"]),
              help="A reference without a prediction: refuse, count it as a missed case, or leave it out.")  # fmt: skip
@click.option("--instances", is_flag=True,
              help="Each value of the label files is one object of one class (nuclei, lesions): panoptic quality (pq, "
              "sq, rq) and the counts of lesions are of these, not of connected components.")  # fmt: skip
@click.option("--probabilities", metavar="FOLDER", type=click.Path(path_type=Path),
              help="What medseg predict --probabilities wrote: also calibration (ECE), over the scan and near the "
              "structures.")  # fmt: skip
@click.option("--patients", metavar="TABLE", type=click.Path(path_type=Path),
              help="Whose each case is: a CSV with the columns case and patient (a manifest is one). Intervals are "
              "drawn over patients. Without it manifest.csv beside the references or BIDS names tell.")  # fmt: skip
@click.option("--report", is_flag=True, help="Also write report.html into the output folder: one page, for people.")
@click.option("--images", type=click.Path(path_type=Path),
              help="The scans, named by case, for the pictures of the report; without them: masks alone.")  # fmt: skip
@click.option("--threads", default=2, show_default=True, help="Cases measured at a time.")
@reading_options
def evaluate(
    predictions: Path,
    references: Path,
    output: Path | None,
    tolerance: float,
    metrics: str | None,
    labels: str | None,
    missing: str,
    instances: bool,
    probabilities: Path | None,
    patients: Path | None,
    report: bool,
    images: Path | None,
    threads: int,
    reading: Reading,
) -> None:
    """Measure how well PREDICTIONS agree with REFERENCES: two files, or two folders with the same case names.

    Dice, IoU, sensitivity, specificity, precision, HD, HD95, average surface distance, surface Dice, volume and
    volume error, per case and class, with mean, median, standard deviation and the mean's 95 % interval; by name also
    clDice, boundary IoU, lesions, instances and cells (--metrics).

    Of predicted classes (predictions.csv of a run of task=classification) against class folders, a CSV or an npz: ROC
    curves with areas, sensitivity and specificity at operating points, confusion, calibration.

    A missed structure never improves a mean: its
    Dice is 0 and its distances are the diagonal of the scan; such cases are counted.

    \b
      medseg evaluate labels references -o scores
      medseg evaluate labels references -o scores --report --images scans
      medseg evaluate nnunet_output labelsTs --labels "{liver: 1, tumour: 2}"
      medseg evaluate labels references --probabilities labels/probabilities -o scores
      medseg evaluate labels references --patients patients.csv -o scores
      medseg evaluate nuclei references --instances -o scores
    """
    if report and output is None:
        raise click.UsageError("--report needs a folder for the page: -o FOLDER")
    if images is not None and not report:
        raise click.UsageError("--images are for the pictures of --report")
    from rich.console import Console

    from medseg.classification.verbs import is_predictions, refuse_options
    from medseg.formats.label_table import table_of
    from medseg.labels import Labels
    from medseg.metrics.metric import metric_names
    from medseg.reports.evaluation import evaluate_folders
    from medseg.reports.progress import counting_bar
    from medseg.reports.tables import print_evaluation

    if is_predictions(predictions):
        from medseg.classification.scoring import evaluate_predictions

        others = {"--metrics": metrics, "--instances": instances, "--probabilities": probabilities, "--images": images}
        others["--missing count"] = missing == "count"
        refuse_options(others, "-o, --labels, --patients, --missing skip, --report")
        table = None if labels is None else table_of(labels)
        skip = missing == "skip"
        evaluate_predictions(predictions, references, Console(), output=output, labels=table, patients=patients,
                             skip_missing=skip, report=report)  # fmt: skip
        return
    if instances and metrics is None:
        metrics = "default,pq,sq,rq"
    names = None if metrics is None else metric_names(f"dice,{metrics}")
    console = Console()
    with counting_bar(console, "measuring cases") as progress:
        evaluation = evaluate_folders(
            predictions,
            references,
            labels=None if labels is None else Labels.from_mapping(table_of(labels)),
            tolerance_mm=tolerance,
            names=names,
            missing=cast("MissingPolicy", missing),
            num_threads=threads,
            progress=progress,
            reading=reading,
            instances=instances,
            probabilities=probabilities,
            patients=patients,
        )
    print_evaluation(evaluation, console)
    if output is not None:
        evaluation.write(output)
        written = f"{output / 'metrics.csv'}, summary.csv{', calibration.csv' if probabilities else ''}, metrics.json"
        if report:
            from medseg.reports.html.comparison import write_evaluation_report

            policy = cast("MissingPolicy", missing)
            with console.status("drawing the report"):
                page = write_evaluation_report(
                    output, evaluation, predictions, references, images=images, missing=policy, reading=reading
                )
            written += f", {page.name}"
        console.print(f"written: {written}", highlight=False, soft_wrap=True)
