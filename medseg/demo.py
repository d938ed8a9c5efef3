"""`medseg demo`: the whole way on an embedded phantom, over the roads that everybody's data go."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from medseg.config import compose
from medseg.data.cases import find_inputs, load_image
from medseg.errors import Code, MedsegError
from medseg.formats import open_label
from medseg.inference.ensemble import Ensemble
from medseg.inference.folder import predict_inputs
from medseg.phantom import write_phantoms
from medseg.program import command
from medseg.reports.evaluation import Evaluation, evaluate_folders
from medseg.reports.overlay import save_overlay
from medseg.reports.progress import counting_bar
from medseg.reports.tables import print_evaluation
from medseg.training.train import train

OVERRIDES = ("experiment=demo",)
"""What differs from `medseg train`'s defaults stands in configs/experiment/demo.yaml."""


def run_demo(output: Path, *, minutes: float, seed: int, console: Console | None = None) -> Evaluation:
    """Make a phantom data set, train, predict the held-out DICOM series, score it and draw it.

    Args:
        output: folder for everything; must not exist or be an earlier demo's.
        minutes: time budget of the training.
        seed: of the phantom and the training.
        console: where the user reads.
    Returns:
        The evaluation of the held-out case.
    Raises:
        MedsegError: E_OUTPUT if the folder holds something else.
    """
    console = console or Console()
    started = time.monotonic()
    data = output / "data"
    if output.exists() and any(output.iterdir()) and not data.is_dir():
        raise MedsegError(
            Code.OUTPUT, "the folder is not empty and not a demo's", where=output, remedy="give another with -o"
        )
    console.rule("1 of 4: a phantom data set")
    with counting_bar(console, "drawing phantoms") as progress:
        phantom = write_phantoms(data, seed=seed, progress=progress)
    console.print(
        f"training cases: {phantom.train}\nheld-out case:  {phantom.test} (a DICOM series)",
        highlight=False,
        soft_wrap=True,
    )

    console.rule("2 of 4: medseg train")
    run = output / "runs" / time.strftime("%Y-%m-%d_%H-%M-%S")
    overrides = [*OVERRIDES, f"data.root='{phantom.train}'", f"trainer.max_minutes={minutes}", f"seed={seed}"]
    experiment = compose("train", overrides)
    train(experiment, run, console)

    console.rule("3 of 4: medseg predict")
    predictions = output / "predictions" / run.name
    series = [phantom.test / case for case in phantom.test_cases]
    labels = predict_inputs(Ensemble.from_run(run), series, predictions, console).files

    console.rule("4 of 4: medseg evaluate")
    evaluation = evaluate_folders(predictions, phantom.test_labels)
    evaluation.write(predictions / "evaluation")
    print_evaluation(evaluation, console)
    case = find_inputs(series)[0]
    picture = predictions / "overlay.png"
    save_overlay(
        picture,
        load_image(case),
        labels=evaluation.labels,
        reference=open_label(phantom.test_labels / labels[0].name),
        predicted=open_label(labels[0]),
        title=f"{case.case_id}: never seen in training, read from DICOM",
    )
    console.print(
        f"mean Dice {evaluation.mean('dice'):.4f} on the held-out scan,"
        f" {time.monotonic() - started:.0f} s in all\n"
        f"picture: {picture}\nlabels:  {labels[0]}\nmetrics: {predictions / 'evaluation'}\n"
        f"next:    {command('train', 'data.root=YOUR_FOLDER')}",
        highlight=False,
        soft_wrap=True,
    )
    return evaluation
