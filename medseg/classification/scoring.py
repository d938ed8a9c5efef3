"""`medseg evaluate OUT REFERENCES` of predicted classes: probabilities against class folders, CSV or npz."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from medseg.classification.cases import find_classified
from medseg.classification.evaluation import (
    CONFUSION_FILE,
    METRICS_FILE,
    POINTS_FILE,
    ROC_FILE,
    ClassificationEvaluation,
    thresholds_for,
)
from medseg.classification.images import ImageCase
from medseg.classification.predict import Predictions, read_predictions
from medseg.classification.tables import print_evaluation
from medseg.data.layouts import name_some
from medseg.data.manifest import read_patients
from medseg.errors import Code, MedsegError

POINTS = ("youden", "sensitivity>=0.95", "specificity>=0.95")
"""Scored by cross-fitting where no thresholds, and so no points, came with the predictions."""


def evaluate_predictions(
    predictions: Path,
    references: Path,
    console: Console,
    *,
    output: Path | None = None,
    labels: Mapping[str, object] | None = None,
    patients: Path | None = None,
    skip_missing: bool = False,
    report: bool = False,
) -> ClassificationEvaluation:
    """Compare a table of predictions with the classes that are, print and write the numbers.

    Args:
        predictions: the folder that medseg predict wrote, or its table.
        references: class folders, CSV or npz.
        console: where the user reads.
        output: folder for what is written.
        labels: class → value, for an npz.
        patients: a table whose each case is.
        skip_missing: leave references without a prediction out, instead of refusing them.
        report: whether `output` gets a page.
    Raises:
        MedsegError: E_MISSING, E_LABEL, and what reading refuses.
    """
    found = read_predictions(predictions)
    cases = find_classified(references, to_train=False).cases
    if labels is not None:
        names = {str(value): str(name) for name, value in labels.items()}
        cases = tuple(replace(case, class_name=names.get(str(case.class_name), case.class_name)) for case in cases)
    if patients is not None:
        of_case = dict(read_patients(patients))
        cases = tuple(replace(case, patient=of_case.get(case.case_id, case.patient)) for case in cases)
    evaluation = compare(found, cases, skip_missing=skip_missing, console=console)
    print_evaluation(evaluation, console)
    if output is not None:
        evaluation.write(output)
        written = f"{output / METRICS_FILE}, {POINTS_FILE}, {CONFUSION_FILE}, {ROC_FILE}"
        if report:
            from medseg.classification.report import write_page  # matplotlib: half a second that others need not wait
            from medseg.reports.html.page import REPORT_FILE

            page = write_page(
                output / REPORT_FILE,
                title=f"Evaluation: {', '.join(found.classes[:8])}",
                subtitle=f"{len(evaluation.cases)} images against their references.",
                evaluations={"images": ("Images", evaluation, "Predictions against references.")},
            )
            written += f", {page.name}"
        console.print(f"written: {written}", highlight=False, soft_wrap=True, markup=False)
    return evaluation


def compare(
    predictions: Predictions, references: tuple[ImageCase, ...], *, skip_missing: bool, console: Console
) -> ClassificationEvaluation:
    """Match predictions with references by the names of their cases.

    The thresholds that came with the predictions are taken where no case had a part in choosing them; else new ones are
    cross-fitted.

    Raises:
        MedsegError: E_MISSING where a reference has no prediction, E_LABEL for a class that the model does not know.
    """
    row_of = {case: number for number, case in enumerate(predictions.cases)}
    absent = [case.case_id for case in references if case.case_id not in row_of]
    if absent and (not skip_missing or len(absent) == len(references)):
        raise MedsegError(
            Code.MISSING,
            f"{len(absent)} of {len(references)} references have no prediction",
            where=name_some(absent),
            expected="the same names of cases on both sides",
            got=f"{len(row_of)} predictions, such as {next(iter(row_of), 'none')}",
            remedy="predict these images too, or leave them out: --missing skip. Predictions are named by the files, "
            "without their endings: name the cases of a CSV so too",
        )
    if absent:
        said = f"left out   {len(absent)} references without a prediction: {name_some(absent)}"
        console.print(said, highlight=False, soft_wrap=True, markup=False)
    scored = [case for case in references if case.case_id in row_of]
    unknown = sorted({str(case.class_name) for case in scored} - set(predictions.classes))
    if unknown:
        raise MedsegError(
            Code.LABEL,
            "the references have classes that the predictions do not know",
            expected=", ".join(predictions.classes),
            got=name_some(unknown),
            remedy='name the classes alike; those of an npz by --labels "{normal: 0, pneumonia: 1}"',
        )
    rows = [row_of[case.case_id] for case in scored]
    ids = [case.case_id for case in scored]
    points = tuple(dict.fromkeys(point for of_class in predictions.thresholds.values() for point in of_class))
    thresholds, remarks = thresholds_for(ids, predictions.thresholds, predictions.sides)
    return ClassificationEvaluation(
        ids,
        np.array([predictions.classes.index(str(case.class_name)) for case in scored], dtype=np.int64),
        predictions.probabilities[rows],
        predictions.classes,
        {case.case_id: case.patient for case in scored if case.patient is not None},
        thresholds,
        points or POINTS,
        remarks=remarks,
    )
