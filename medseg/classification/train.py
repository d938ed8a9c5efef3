"""The story of a classifier's training, from top to bottom: begin, build, prepare, loop, conclude."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from medseg.bundle import forget_manifest, write_manifest
from medseg.bundle.manifest import made_now
from medseg.classification.beginning import PREPARED_FOLDER, Settled, begin, go_on, prepare
from medseg.classification.bundle import THRESHOLDS_FILE, ClassifierInfo, load_classifier, write_thresholds
from medseg.classification.card import write_card
from medseg.classification.evaluation import NEW, ClassificationEvaluation, thresholds_for
from medseg.classification.experiment import ClassificationExperiment
from medseg.classification.loop import ClassificationLoop
from medseg.classification.predict import Predictions, known_images, model_facts, predict_prepared
from medseg.classification.preparation import plain_counts, read_digests
from medseg.classification.tables import print_evaluation
from medseg.device import deterministic
from medseg.inference.sliding_window import memory_format
from medseg.models.classifiers import ClassificationModel
from medseg.program import command
from medseg.training.card import device_in_words
from medseg.training.distributed import joined, remember
from medseg.training.experiment import without_places, write_config
from medseg.training.journal import HISTORY_FILE, Journal
from medseg.training.lock import locked
from medseg.training.pretrained import load_pretrained
from medseg.training.signals import save_signal_is_harmless
from medseg.training.state import can_resume

VALIDATION_FOLDER, TEST_FOLDER = "validation", "test"
SIDES = ("train", "val", "test")


@dataclass(frozen=True)
class ClassificationResult:
    """How a run ended.

    Args:
        run: its folder.
        best_score: the best of a validation, as `trainer.score` has it.
        steps: optimizer steps done.
        minutes: minutes of the loop.
        validation: of the validation images, by the best weights.
        test: of the test images; None where there are none.
    """

    run: Path
    best_score: float
    steps: int
    minutes: float
    validation: ClassificationEvaluation
    test: ClassificationEvaluation | None


def train(experiment: ClassificationExperiment, run: Path, console: Console | None = None) -> ClassificationResult:
    """Train a classifier.

    Args:
        experiment: everything that states the run.
        run: the folder that will hold everything about it; with `experiment.resume`, the run that goes on.
        console: where the user reads.
    Raises:
        MedsegError: what the data, the configuration or the machine refuse; E_NAN_LOSS if the loss stops being finite;
            E_OUTPUT if another training writes into the run.
    """
    run.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    remember(run)
    with joined() as world, locked(run, is_main=world.is_main):
        device = world.device(experiment.trainer.device)
        with save_signal_is_harmless(), deterministic(experiment.trainer.deterministic):
            result = _train(experiment, run, device, console)
        write_manifest(run, made=made_now())
    return result


def _train(
    experiment: ClassificationExperiment, run: Path, device: torch.device, console: Console
) -> ClassificationResult:
    if experiment.resume is None:
        forget_manifest(run)
        write_config(experiment, run)
        settled = begin(experiment, run, console)
    else:
        settled = go_on(experiment, run, console)
    info, split = settled.info, settled.split
    torch.manual_seed(experiment.seed)
    model = info.build_model()
    # A run that ended before its first checkpoint begins again, with the weights that it began with
    goes_on = experiment.resume is not None and can_resume(run)
    notes = [] if goes_on else load_pretrained(model, experiment.model)
    model = model.to(device, memory_format=memory_format(info.sight.spatial_dims))  # type: ignore[call-overload]
    describe(console, info, model, device, notes)
    images, targets = prepare(experiment, settled, run, console)
    forget_manifest(run)  # nothing is refused any more, and its files change from here on
    num_training, num_validation = len(split.train), len(split.val)
    loop = ClassificationLoop(
        experiment,
        run,
        info,
        model,
        images,
        targets,
        range(num_training),
        range(num_training, num_training + num_validation),
        device,
    )
    counters = loop.counters
    with Journal(run, console, loop.columns(), from_step=counters.step, validates=counters.is_validating) as journal:
        journal.settings("configuration", without_places(experiment)[0])
        journal.settings("sight", info.sight.to_json())
        loop.run_to_the_end(journal)
    return conclude(experiment, run, settled, loop, images, targets, console)


def conclude(
    experiment: ClassificationExperiment,
    run: Path,
    settled: Settled,
    loop: ClassificationLoop,
    images: torch.Tensor,
    targets: torch.Tensor,
    console: Console,
) -> ClassificationResult:
    """Score validation and test images with the best weights, choose thresholds, write card and report."""
    split, info = settled.split, settled.info
    best = load_classifier(run, device=loop.device)
    points = experiment.trainer.operating_points
    sides = np.cumsum([len(split.train), len(split.val)])
    known, digests = known_images(run) or {}, read_digests(run)

    def evaluate(side: str, ids: Sequence[str], first: int, thresholds: Any) -> ClassificationEvaluation:
        chosen = slice(first, first + len(ids))
        shares = predict_prepared(best, images[chosen], loop.device, loop.precision)
        patients = {i: patient for i in ids if (patient := settled.cases[i].patient) is not None}
        truth = targets[chosen].numpy()
        # By their digests: a given split may have an image on two sides
        seen = {i: known.get(digests[i], NEW) for i in ids}
        taken, remarks = thresholds_for(ids, thresholds, seen) if thresholds else (None, ())
        evaluation = ClassificationEvaluation(
            ids, truth, shares, info.classes, patients, taken, points, experiment.seed, remarks
        )
        evaluation.write(run / side)
        names = {i: info.classes[k] for i, k in zip(ids, truth.tolist(), strict=True)}
        predictions = Predictions(tuple(ids), info.classes, shares, thresholds or {}, sides=seen)
        predictions.write(run / side, model_facts(best), names)
        console.rule(f"{side}: {len(ids)} images")
        print_evaluation(evaluation, console)
        return evaluation

    validation = evaluate(VALIDATION_FOLDER, split.val, int(sides[0]), None)
    thresholds = validation.choose_thresholds()
    write_thresholds(run / THRESHOLDS_FILE, thresholds, f"{len(split.val)} validation images")
    best = replace(best, thresholds=thresholds)
    test = evaluate(TEST_FOLDER, split.test, int(sides[1]), thresholds) if split.test else None
    shutil.rmtree(run / PREPARED_FOLDER, ignore_errors=True)
    from medseg.reports.curves import save_curves  # matplotlib: the first step need not wait for it

    save_curves(run / "curves.png", run / HISTORY_FILE)
    device = device_in_words(loop.device, loop.precision)
    write_card(
        experiment,
        run,
        best,
        counts={side: plain_counts((settled.cases[i] for i in getattr(split, side)), info.classes) for side in SIDES},
        split=split,
        evaluations={VALIDATION_FOLDER: validation} | ({TEST_FOLDER: test} if test is not None else {}),
        counters=loop.counters,
        device=device,
    )
    page = None
    if experiment.trainer.report:
        from medseg.classification.report import write_run_page

        seen = images[len(split.train) :]
        worst = experiment.trainer.worst_cases
        page = write_run_page(run, best, validation, test, seen, worst=worst, device=device, seed=experiment.seed)
    counters = loop.counters
    console.print(
        f"done: {counters.step} steps in {counters.minutes:.1f} min, best validation {loop.score_name} "
        f"{counters.best_score:.4f} at step {counters.best_step}\nrun: {run}\n"
        + (f"report: {page}\n" if page is not None else "")
        + f"look: {command('--logdir', run, program='tensorboard')}\nuse: {command('predict', run)} IMAGES -o FOLDER",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return ClassificationResult(run, counters.best_score, counters.step, counters.minutes, validation, test)


def describe(
    console: Console, info: ClassifierInfo, model: ClassificationModel, device: torch.device, notes: Sequence[str]
) -> None:
    """Say in a few lines what will be trained."""
    sight = info.sight
    weights = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    spacing = "" if sight.spacing_mm is None else f" at {'×'.join(f'{s:.4g}' for s in sight.spacing_mm)} mm"
    how = "scaled to fit with their aspect kept, and padded" if sight.spacing_mm is None else "cut or padded"
    colour = {1: "grey", 3: "colour"}.get(sight.num_channels, f"{sight.num_channels} channels")
    lines = [
        f"model      {info.model.get('network') or info.model['name']}, {weights:,} weights"
        + (f" ({frozen:,} of them frozen)" if frozen else "")
        + f", on {device.type}",
        *notes,
        f"sees       {'×'.join(map(str, sight.size))}{spacing}, {colour}, {sight.normalisation}; images are {how}",
    ]
    lines += [f"           {name}: {reason}" for name, reason in sight.reasons.items()]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)
