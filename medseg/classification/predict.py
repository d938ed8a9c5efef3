"""`medseg predict RUN IMAGES -o OUT` of a run that classifies: predictions.csv, and predictions.json about it."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

import medseg
from medseg.bundle import checkpoint_path, opened
from medseg.bundle.manifest import listed_file
from medseg.classification.bundle import CLASSIFICATION, Classifier, Thresholds, load_classifier
from medseg.classification.cases import find_images
from medseg.classification.evaluation import NEW, write_csv
from medseg.classification.images import ImageCase, open_image
from medseg.classification.loop import predict_logits, softmax
from medseg.classification.preparation import SURVEY_FILE, digest_of, read_digests
from medseg.classification.verbs import TABLE_FILE
from medseg.data.splits import SPLIT_FILE, read_split
from medseg.device import choose_device, choose_precision
from medseg.documents import check_format, parse_json
from medseg.errors import Code, MedsegError
from medseg.formats import Reading
from medseg.formats.atomic import make_folder, whole_file
from medseg.program import command
from medseg.reports.progress import counting_bar

DESCRIPTION_FILE = "predictions.json"
FORMAT = 1
PREFIX = "probability_"
"""Columns of the table: this and the name of a class."""
BATCH = 32
THREADS = 2
"""Images that are read at a time while the network works."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Probabilities of images.

    Args:
        cases: ids.
        classes: names of the columns.
        probabilities: shape (N, K).
        thresholds: by class and operating point, as chosen on the validation images of the training.
        bad: images that were left out, and why.
        sides: case → the side of the run's split that it was on ("train", "val", "test"), or "new"; None where the run
            does not tell.
    """

    cases: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: NDArray[np.float64]
    thresholds: Thresholds = field(default_factory=dict)
    bad: Mapping[str, MedsegError] = field(default_factory=dict)
    sides: Mapping[str, str] | None = None

    def write(self, folder: Path, model: Mapping[str, Any], references: Mapping[str, str] | None = None) -> None:
        """Write the table and its description.

        Args:
            folder: is made.
            model: what predicted, for the description.
            references: case → class, where it is known: a column more.
        Raises:
            MedsegError: E_OUTPUT.
        """
        make_folder(folder)
        points = [(name, point) for name, of_class in self.thresholds.items() for point in of_class]
        header = ["case", "class", *(PREFIX + name for name in self.classes)]
        header += [f"{name} at {point}" for name, point in points] + (["reference"] if references is not None else [])
        rows: list[list[object]] = [[*header]]
        for case, shares in zip(self.cases, self.probabilities, strict=True):
            row: list[object] = [case, self.classes[int(shares.argmax())], *(f"{share:.6f}" for share in shares)]
            for name, point in points:
                is_called = shares[self.classes.index(name)] >= self.thresholds[name][point]
                row.append("yes" if is_called else "no")
            rows.append([*row, references[case]] if references is not None else row)
        write_csv(folder / TABLE_FILE, rows)
        content = {
            "format": FORMAT,
            "medseg": medseg.__version__,
            "task": CLASSIFICATION,
            "classes": list(self.classes),
            "thresholds": {name: dict(points) for name, points in self.thresholds.items()},
            "sides": None if self.sides is None else dict(self.sides),
            "model": dict(model),
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "left_out": {case: {"code": str(e.code), "message": e.message} for case, e in self.bad.items()},
            "notice": "Research use only; not a medical device.",
        }
        with whole_file(folder / DESCRIPTION_FILE, ".json") as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_predictions(path: Path) -> Predictions:
    """Read the table of a folder, or one that another program wrote: case (or image), and `probability_CLASS` columns.

    Raises:
        MedsegError: E_MISSING, E_CONFIG for a table that is not understood, E_VERSION.
    """
    table = path / TABLE_FILE if path.is_dir() else path
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            classes = tuple(c.removeprefix(PREFIX) for c in columns if c.startswith(PREFIX))
            key = next((name for name in ("case", "image") if name in columns), None)
            if key is None or len(classes) < 2:
                raise ValueError(f"its columns are {', '.join(columns) or 'none'}")
            rows = list(reader)
        cases = tuple(row[key] for row in rows)
        shares = np.array([[float(row[PREFIX + name]) for name in classes] for row in rows], dtype=np.float64)
        shares = shares.reshape(len(rows), len(classes))
        if len(set(cases)) < len(cases):
            raise ValueError("a case stands there twice")
        if not np.isfinite(shares).all() or (shares < 0).any() or (np.abs(shares.sum(axis=1) - 1) > 1e-3).any():
            raise ValueError("a row's numbers are no probabilities with a sum of 1")
    except FileNotFoundError as error:
        raise MedsegError(Code.MISSING, "there are no predictions", where=table.name) from error
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise MedsegError(
            Code.CONFIG,
            "the table of predictions is not understood",
            where=table.name,
            expected=f"case, and {PREFIX}NAME for each class",
            got=str(error),
            remedy="give the folder that medseg predict wrote",
        ) from error
    description = table.parent / DESCRIPTION_FILE
    thresholds: Thresholds = {}
    sides: dict[str, str] | None = None
    if description.is_file():
        try:
            content = parse_json(description.read_text(encoding="utf-8"))
            check_format(content, FORMAT, where=description)
            thresholds = {
                str(name): {str(point): float(value) for point, value in points.items()}
                for name, points in content.get("thresholds", {}).items()
                if name in classes
            }
            stated = content.get("sides")
            sides = None if stated is None else {str(case): str(side) for case, side in stated.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise MedsegError(
                Code.CONFIG, "the description cannot be read", where=DESCRIPTION_FILE, got=str(error)
            ) from error
    return Predictions(cases, classes, shares, thresholds, sides=sides)


def known_images(run: Path) -> dict[str, str] | None:
    """Digest of an image → the side of the run's split that it is on; None where the run does not tell of all.

    Of an image on several sides it is "val", where the thresholds were chosen, before "train" before "test".

    Raises:
        MedsegError: E_RUN, E_CONFIG if survey or split cannot be read.
    """
    run = opened(run)
    if not (run / SURVEY_FILE).is_file() or not (run / SPLIT_FILE).is_file():
        return None
    digests, split = read_digests(run), read_split(run / SPLIT_FILE)
    side_of = {i: side for side in ("test", "train", "val") for i in getattr(split, side)}
    ordered = sorted(side_of, key=lambda i: ("test", "train", "val").index(side_of[i]))
    return {digests[i]: side_of[i] for i in ordered} if side_of.keys() <= digests.keys() else None


def model_facts(classifier: Classifier) -> dict[str, Any]:
    """What predicted, for descriptions: no path of a machine."""
    return {
        "run": classifier.run.resolve().name,
        "checkpoint": classifier.checkpoint,
        "sha256": listed_file(checkpoint_path(classifier.run, classifier.checkpoint)).sha256,
        "network": classifier.info.model.get("name"),
    }


def predict_prepared(
    classifier: Classifier, images: torch.Tensor, device: torch.device, precision: str
) -> NDArray[np.float64]:
    """Probabilities (N, K) of images as the network sees them."""
    if not len(images):
        return np.zeros((0, len(classifier.info.classes)))
    return softmax(predict_logits(classifier.model, images, device, precision, batch_size=BATCH))


def predict_cases(
    classifier: Classifier,
    cases: Sequence[ImageCase],
    reading: Reading,
    *,
    device: torch.device,
    precision: str,
    skip_bad: bool = False,
    batch_size: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Probabilities of images; a batch of them is in memory at a time.

    Args:
        classifier: the model.
        cases: what to predict.
        reading: as in `open_volume`.
        device: the model's.
        precision: bf16, fp16 or fp32.
        skip_bad: leave images out that cannot be used, and note them; else the first ends it.
        batch_size: images of a forward pass.
        progress: told of each batch.
    Raises:
        MedsegError: what the readers and `Sight.prepare` refuse.
    """

    known = known_images(classifier.run)

    def prepared(case: ImageCase) -> tuple[torch.Tensor, str] | MedsegError:
        try:
            volume = open_image(case, reading)
            side = NEW if known is None else known.get(digest_of(volume), NEW)
            return torch.from_numpy(classifier.info.sight.prepare(volume, where=case.case_id)), side
        except MedsegError as error:
            if not skip_bad:
                raise
            return error

    names: list[str] = []
    found: list[NDArray[np.float64]] = []
    bad: dict[str, MedsegError] = {}
    sides: dict[str, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(cases), batch_size):
            part = cases[start : start + batch_size]
            images: list[torch.Tensor] = []
            for case, image in zip(part, pool.map(prepared, part), strict=True):
                if isinstance(image, MedsegError):
                    bad[case.case_id] = image
                else:
                    images.append(image[0])
                    sides[case.case_id] = image[1]
                    names.append(case.case_id)
            if images:
                found.append(predict_prepared(classifier, torch.stack(images), device, precision))
            if progress is not None:
                progress(start + len(part), len(cases))
    classes = classifier.info.classes
    shares = np.concatenate(found) if found else np.zeros((0, len(classes)))
    told = None if known is None else sides
    return Predictions(tuple(names), classes, shares, classifier.thresholds, bad, told)


def classify_inputs(
    run: Path,
    inputs: Sequence[Path],
    output: Path,
    console: Console,
    *,
    checkpoint: str = "best",
    device: str = "auto",
    precision: str = "auto",
    reading: Reading,
    batch_size: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> Predictions:
    """Classify images and write the table.

    Args:
        run: a run that classifies.
        inputs: files, folders of images, an npz.
        output: folder of the table.
        console: where the user reads.
        checkpoint: "best" or "latest".
        device: as the user names it.
        precision: the same.
        reading: as in `open_volume`.
        batch_size: images of a forward pass; None: `BATCH`.
        skip_bad: leave images out that cannot be used; else the first ends it.
        overwrite: replace a table that is there.
    Raises:
        MedsegError: E_OUTPUT where a table is there already; what reading refuses.
    """
    if (output / TABLE_FILE).exists() and not overwrite:
        raise MedsegError(
            Code.OUTPUT,
            "there are predictions in this folder already",
            where=output.name,
            got=TABLE_FILE,
            remedy="choose another folder, or replace them: --overwrite",
        )
    chosen = choose_device(device)
    classifier = load_classifier(run, checkpoint=checkpoint, device=chosen)
    found = find_images(inputs, classifier.info.classes)
    cases = found.cases
    with counting_bar(console, "classifying") as progress:
        predictions = predict_cases(
            classifier,
            cases,
            reading,
            device=chosen,
            precision=choose_precision(precision, chosen),
            skip_bad=skip_bad,
            batch_size=batch_size or BATCH,
            progress=progress,
        )
    predictions.write(output, model_facts(classifier))
    counts = [
        f"{name} {n}"
        for name, n in zip(
            predictions.classes,
            np.bincount(predictions.probabilities.argmax(axis=1), minlength=len(predictions.classes)).tolist(),
            strict=True,
        )
    ]
    left_out = [*found.left_out, *(f"{case}: {e.code}: {e.message}" for case, e in predictions.bad.items())]
    for what in left_out:
        console.print(f"left out   {what}", highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"classified {len(predictions.cases)} of {len(cases)} images: {', '.join(counts)}\n"
        f"written: {output / TABLE_FILE}, {DESCRIPTION_FILE}\n"
        f"score them: {command('evaluate', output)} REFERENCES",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return predictions
