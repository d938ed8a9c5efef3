"""`report.html` of classification: curves, decisions and confusion of each set of images, worst cases, the card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from markupsafe import Markup

from medseg.bundle import checkpoint_path
from medseg.bundle.manifest import listed_file
from medseg.classification.bundle import Classifier
from medseg.classification.card import CARD_FILE
from medseg.classification.evaluation import RATIOS, ClassificationEvaluation
from medseg.classification.figures import confusion_figure, course_figure, roc_figure, save_attention
from medseg.classification.tables import TITLES, notes_on
from medseg.formats.atomic import whole_file
from medseg.metrics.classification_intervals import Estimate
from medseg.reports.curves import Curve, read_history
from medseg.reports.html.figures import drawing, reliability_figure, to_svg
from medseg.reports.html.page import REPORT_FILE, markdown, render_template
from medseg.reports.html.pictures import Picture, picture_of_file
from medseg.reports.html.tables import Cell, Column, ReportTable, Tile

MAX_CASES = 2000
"""Of the table of cases; predictions.csv has all."""
WORST_FOLDER = "worst"
DEFINITIONS = (
    ("AUC", "Area under the ROC curve: how often an image with the class scores higher than one without it (ties count "
     "half). Interval: DeLong's variance (Obuchowski's where patients have several images) on the logit scale; where "
     "all are told apart, Newcombe's. The mean over classes: bootstrap within each class."),
    ("sensitivity, specificity", "Share of the images with the class that are called so; of those without it that are "
     "not. Interval: Wilson's, or a bootstrap over patients where some have several images (Wilson's over the "
     "number of patients where all of them have the same share)."),
    ("PPV, NPV", "Share of the images called so that have the class; of those not called so that do not. Both depend "
     "on how common the class is: among other patients they are others."),
    ("operating points", "youden: where sensitivity + specificity is largest; sensitivity>=X: the best specificity at "
     "which sensitivity is at least X; specificity>=X: the other way round. A threshold is never scored on the images "
     "that it was chosen on."),
    ("balanced accuracy, macro F1, Cohen's kappa", "Mean recall of the classes; mean of their F1; agreement beyond "
     "chance. Intervals: percentiles of a bootstrap over patients."),
    ("Brier score", "Squared distance of the probabilities from what is, summed over the classes: 0 is best, 2 worst."),
    ("expected calibration error", "Mean distance between the probability of the predicted class and how often it is "
     "right, in 15 bins (Guo et al., ICML 2017)."),
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What the page says of one set of images."""

    anchor: str
    title: str
    tiles: Sequence[Tile]
    remarks: Sequence[str]
    note: str
    roc: Markup
    confusion: Markup | None
    reliability: Markup
    decisions: ReportTable
    cases: ReportTable
    how_chosen: str


def part_of(
    name: str, title: str, evaluation: ClassificationEvaluation, note: str, pictured: Mapping[str, str]
) -> Part:
    """One set of images.

    Args:
        name: letters; the prefix of ids in the page.
        title: heading.
        evaluation: of these images.
        note: what these images are.
        pictured: case → anchor of its picture.
    """
    confusion = confusion_figure(evaluation)
    return Part(
        name,
        title,
        _tiles(evaluation),
        [*(f"{c}: {why}" for c, why in evaluation.undefined.items()), *notes_on(evaluation)],
        note,
        to_svg(roc_figure(evaluation), f"{name}roc", "ROC curves"),
        None if confusion is None else to_svg(confusion, f"{name}confusion", "confusion matrix"),
        to_svg(
            reliability_figure({"all images": evaluation.calibration}, "images"), f"{name}rel", "reliability diagram"
        ),
        _decisions(name, evaluation),
        _cases(name, evaluation, pictured),
        evaluation.how_chosen,
    )


def draw_worst(
    folder: Path, classifier: Classifier, evaluation: ClassificationEvaluation, images: torch.Tensor, number: int
) -> list[Picture]:
    """Pictures of the images whose class got the least probability, also as PNG files in a folder.

    Args:
        folder: is made.
        classifier: the model.
        evaluation: of the images.
        images: as the network sees them, in the order of the evaluation's cases.
        number: how many.
    """
    pictures = []
    for place, index in enumerate(evaluation.worst(number), start=1):
        shares = evaluation.probabilities[index]
        truth, predicted = int(evaluation.truth[index]), int(evaluation.predicted[index])
        case, names = evaluation.cases[index], evaluation.classes
        said = f"{names[truth]}, which got {shares[truth]:.1%}; taken for {names[predicted]} ({shares[predicted]:.1%})"
        path = folder / f"{place:02d}_{case.replace('/', '_')}.png"
        title = f"{case}\n{said}"
        save_attention(path, classifier, images[index], predicted, title)
        pictures.append(picture_of_file("worst", case, path, said))
    return pictures


def write_page(
    path: Path,
    *,
    title: str,
    subtitle: str,
    evaluations: Mapping[str, tuple[str, ClassificationEvaluation, str]],
    pictures: Sequence[Picture] = (),
    pictured: str = "",
    curves: Mapping[str, Curve] | None = None,
    manifest: Mapping[str, str] | None = None,
) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: of the page.
        title: its heading.
        subtitle: one sentence.
        evaluations: anchor → heading, evaluation, and what the images are.
        pictures: of the worst cases.
        pictured: of which set.
        curves: of the training.
        manifest: what the numbers come from.
    """
    anchors = {picture.case: f"#picture-{i}" for i, picture in enumerate(pictures)}
    card = path.parent / CARD_FILE
    with drawing():
        text = render_template(
            "classification.html.j2",
            title=title,
            subtitle=subtitle,
            parts=[part_of(name, heading, one, note, anchors) for name, (heading, one, note) in evaluations.items()],
            pictures=pictures,
            pictured=pictured,
            course=None if not curves else to_svg(course_figure(curves), "course", "training curves"),
            card=markdown(card.read_text(encoding="utf-8")) if card.is_file() else None,
            definitions=DEFINITIONS,
            manifest=manifest or {},
        )
    with whole_file(path, ".html") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_run_page(
    run: Path,
    classifier: Classifier,
    validation: ClassificationEvaluation,
    test: ClassificationEvaluation | None,
    images: torch.Tensor,
    *,
    worst: int,
    device: str,
    seed: int,
) -> Path:
    """The page of a run.

    Args:
        run: its folder.
        classifier: its best weights, with their thresholds.
        validation: of the validation images.
        test: of the test images.
        images: both as the network sees them, validation first.
        worst: how many cases are drawn.
        device: what it was trained on, in words.
        seed: of the run.
    """
    untouched = "Some of them are also on another side of the split: see above."
    untouched = untouched if test is not None and test.remarks else "No choice was made on them."
    sets = {"test": ("Test images", test, untouched)} if test is not None else {}
    best_chosen = "The best weights were chosen on these images: the numbers are somewhat too good."
    sets["validation"] = ("Validation images", validation, best_chosen)
    side = "test" if test is not None else "validation"
    evaluation = test if test is not None else validation
    seen = images[len(validation.cases) :] if test is not None else images[: len(validation.cases)]
    pictures = draw_worst(run / side / WORST_FOLDER, classifier, evaluation, seen, worst)
    info = classifier.info
    names = ", ".join(info.classes) if len(info.classes) <= 8 else f"{len(info.classes)} classes"
    counts = ", ".join(f"{len(one.cases)} {name} images" for name, (_, one, _) in sets.items() if one is not None)
    manifest = {
        "best checkpoint, SHA-256": listed_file(checkpoint_path(run, classifier.checkpoint)).sha256,
        "device": device,
        "seed": str(seed),
    }
    return write_page(
        run / REPORT_FILE,
        title=f"{info.model.get('network') or info.model['name']}: {names}",
        subtitle=f"Whole images into {len(info.classes)} classes. {counts}.",
        evaluations={name: (title, one, note) for name, (title, one, note) in sets.items() if one is not None},
        pictures=pictures,
        pictured=f"the {side} set",
        curves=read_history(run / "history.csv"),
        manifest=manifest,
    )


def _tiles(evaluation: ClassificationEvaluation) -> list[Tile]:
    patients = f"of {evaluation.num_patients} patients" if evaluation.patients else ""
    found = [Tile("images", str(len(evaluation.cases)), patients)]
    for name, one in evaluation.aucs.items():
        if name == "macro" or len(evaluation.aucs) <= 2 or len(evaluation.shown) <= 4:
            found.append(_tile("mean AUC" if name == "macro" else f"AUC {name}", one))
    for name in ("balanced_accuracy", "accuracy", "brier", "ece"):
        one = evaluation.summary[name]
        found.append(_tile(TITLES[name], one))
    return found


def _tile(title: str, one: Estimate) -> Tile:
    interval = one.reason if math.isnan(one.low) else f"95 % CI {one.low:.3f}–{one.high:.3f}"
    return Tile(title, "–" if math.isnan(one.value) else f"{one.value:.3f}", interval)


def _decisions(name: str, evaluation: ClassificationEvaluation) -> ReportTable:
    columns = [Column("class", False), Column("decided", False), Column("threshold"), Column("TP"), Column("FP")]
    columns += [Column("TN"), Column("FN"), *(Column(TITLES[ratio]) for ratio in RATIOS)]
    rows = []
    for row in evaluation.decisions:
        counts = (row.counts.tp, row.counts.fp, row.counts.tn, row.counts.fn)
        cells = [Cell(row.class_name), Cell(row.point, row.note)]
        cells.append(Cell("" if math.isnan(row.threshold) else f"{row.threshold:.3f}"))
        cells += [Cell("–" if row.note else str(n)) for n in counts]
        for ratio in RATIOS:
            one = row.values[ratio]
            interval = "" if math.isnan(one.low) else f"{one.low:.3f}–{one.high:.3f}"
            cells.append(Cell("–" if math.isnan(one.value) else f"{one.value:.3f}", interval))
        rows.append(cells)
    return ReportTable(f"{name}-decisions", columns, rows)


def _cases(name: str, evaluation: ClassificationEvaluation, pictured: Mapping[str, str]) -> ReportTable:
    shown = evaluation.classes[:10]
    columns = [Column("image", False), Column("is", False), Column("predicted", False)]
    columns += [Column(class_name) for class_name in shown]
    order = evaluation.worst(len(evaluation.cases))
    rows = []
    for index in order[:MAX_CASES]:
        case, truth, predicted = evaluation.cases[index], evaluation.truth[index], evaluation.predicted[index]
        cells = [Cell(case, href=pictured.get(case, "")), Cell(evaluation.classes[truth])]
        cells.append(Cell(evaluation.classes[predicted], warn=bool(truth != predicted)))
        cells += [Cell(f"{share:.3f}") for share in evaluation.probabilities[index, : len(shown)]]
        rows.append(cells)
    more = f"The {MAX_CASES} worst of {len(order)}; predictions.csv has all." if len(order) > MAX_CASES else ""
    return ReportTable(f"{name}-cases", columns, rows, note=more, is_long=True)
