"""The story of a training run, from top to bottom: find, survey, split, plan, prepare, build, loop, conclude."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from medseg.bundle import FOLDS_FILE, BundleInfo, forget_manifest, load_bundle, write_manifest
from medseg.data.cases import Case
from medseg.data.splits import Split
from medseg.data.store import Store
from medseg.device import choose_device, deterministic
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import memory_format
from medseg.program import command
from medseg.reports.crossvalidation import CrossValidation, print_crossvalidation, read_evaluation
from medseg.reports.curves import save_curves
from medseg.reports.evaluation import Evaluation
from medseg.reports.html.run import write_run_report
from medseg.reports.progress import counting_bar
from medseg.reports.tables import print_evaluation
from medseg.training.beginning import begin, go_on, open_store, prepare
from medseg.training.card import device_in_words, write_card
from medseg.training.experiment import Experiment, without_places, write_config
from medseg.training.folds import Folds, Sides, begin_folds, go_on_folds
from medseg.training.initial import load_initial, seen_before
from medseg.training.journal import HISTORY_FILE, Journal
from medseg.training.loop import Loop
from medseg.training.postprocessing import forget_postprocessing, postprocess_run
from medseg.training.signals import save_signal_is_harmless
from medseg.training.state import can_resume
from medseg.training.validation import FINAL_FOLDER, final_validation

CROSSVALIDATION_FOLDER = "crossvalidation"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        run: its folder; of several folds the one that holds theirs, and what follows is of all of them.
        best_dice: best mean foreground Dice of a validation on whole volumes.
        steps: optimizer steps done.
        minutes: minutes of the loop.
        evaluation: the final validation on the scans' own grids; None if it was not asked for.
    """

    run: Path
    best_dice: float
    steps: int
    minutes: float
    evaluation: Evaluation | None


def train(experiment: Experiment, run: Path, console: Console | None = None) -> TrainResult:
    """Train a model.

    Args:
        experiment: everything that states the run.
        run: the folder that will hold everything about it; with `experiment.resume`, the run that goes on.
        console: where the user reads.
    Raises:
        MedsegError: what the data, the configuration or the machine refuse; E_NAN_LOSS if the loss stops being finite.
    """
    console = console or Console()
    run.mkdir(parents=True, exist_ok=True)
    with save_signal_is_harmless(), deterministic(experiment.trainer.deterministic):
        result = _train(experiment, run, console)
    write_manifest(_whole(run))
    return result


def _whole(run: Path) -> Path:
    """The run that has the manifest: that of all folds where this is one of them."""
    return run.parent if (run.parent / FOLDS_FILE).is_file() else run


def _train(experiment: Experiment, run: Path, console: Console) -> TrainResult:
    """One fold or several, begun or gone on with."""
    device = choose_device(experiment.trainer.device)
    if experiment.resume is None:
        forget_manifest(_whole(run))
        write_config(experiment, run)
    store = open_store(experiment.data, run)
    if experiment.folds is not None:
        return _train_folds(experiment, run, device, console, store)
    if experiment.resume is None:
        cases, split, info = begin(experiment, run, device, console, store)
    else:
        cases, split, info = go_on(experiment, run, console)
    prepared = partial(prepare, experiment, info, cases, console=console, store=store)
    result = _train_fold(experiment, run, info, cases, split, prepared, device, console)
    if (run.parent / FOLDS_FILE).is_file():
        again = command("train", f"resume={run.parent}")
        said = f"what all folds say together is older now; make it anew by: {again}"
        console.print(said, highlight=False, soft_wrap=True, markup=False)
    return result


def _train_folds(
    experiment: Experiment, run: Path, device: torch.device, console: Console, store: Store
) -> TrainResult:
    """The folds one after the other, with one plan and one preparation, and their cross-validation."""
    if experiment.resume is None:
        folds = begin_folds(experiment, run, device, console, store)
    else:
        folds = go_on_folds(experiment, run, console)
    preparation = folds.preparation(experiment, console, store)
    try:
        for place, fold in enumerate(folds.members, start=1):
            console.rule(f"fold {fold.number}: {place} of {len(folds.members)}")
            if fold.number in folds.finished:
                alone = command("train", f"resume={fold.run}")
                said = f"done before, and left as it is; a larger budget reaches it by: {alone}"
                console.print(said, highlight=False, soft_wrap=True, markup=False)
                continue
            _train_fold(fold.experiment, fold.run, folds.info, folds.cases, fold.split, preparation, device, console)
            folds.finish(fold)
    except (KeyboardInterrupt, SystemExit):
        again = command("train", f"resume={run}")
        console.print(f"go on with this fold and the next ones: {again}", highlight=False, soft_wrap=True, markup=False)
        raise
    forget_manifest(run)  # also where no fold was left to train
    return conclude_folds(experiment, folds, console)


def _train_fold(
    experiment: Experiment,
    run: Path,
    info: BundleInfo,
    cases: Mapping[str, Case],
    split: Split,
    preparation: Sides,
    device: torch.device,
    console: Console,
) -> TrainResult:
    """One training from the fresh network to the final validation."""
    torch.manual_seed(experiment.seed)
    model = info.build_model().to(device, memory_format=memory_format(info.plan.spatial_dims))  # type: ignore[call-overload]
    describe(console, run, info, model, device)
    if experiment.trainer.initial is not None and not can_resume(run):
        initial = Path(experiment.trainer.initial)
        for line in load_initial(model, info, initial) + seen_before(initial, split, experiment.data.root):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    training, validation = preparation(split)

    loop = Loop(experiment, run, info, model, training, validation, device)
    forget_manifest(_whole(run))  # nothing is refused any more, and its files change from here on
    counters = loop.counters
    with Journal(run, console, loop.columns(), from_step=counters.step, validates=counters.is_validating) as journal:
        journal.settings("configuration", without_places(experiment)[0])
        journal.settings("plan", info.plan.to_json())
        loop.run_to_the_end(journal)
    return conclude(experiment, run, loop, info, cases, split, console)


def describe(console: Console, run: Path, info: BundleInfo, model: nn.Module, device: torch.device) -> None:
    """Say in a few lines what will be trained."""
    plan = info.plan
    weights = sum(p.numel() for p in model.parameters())
    patch = "×".join(str(p) for p in plan.patch_size)
    spacing = "×".join(f"{s:.4g}" for s in plan.spacing_mm)
    unit = "mm" if plan.orientation else "px"
    scheme = "/".join(dict.fromkeys(plan.normalisation))
    console.print(
        f"model      {info.model['name']}, {weights / 1e6:.2f} million weights, on {device.type}\n"
        f"plan       patch {patch} at {spacing} {unit}, batch {plan.batch_size}, {scheme}"
        f" (reasons in {run / 'plan.yaml'})",
        highlight=False,
        soft_wrap=True,
    )


def conclude(
    experiment: Experiment,
    run: Path,
    loop: Loop,
    info: BundleInfo,
    cases: Mapping[str, Case],
    split: Split,
    console: Console,
) -> TrainResult:
    """Curves, the final validation with the best weights on the scans' own grids, the card, where everything lies."""
    save_curves(run / "curves.png", run / HISTORY_FILE)
    forget_postprocessing(run)
    validation = [cases[i] for i in split.val]
    evaluation = None
    if experiment.trainer.final_predictions:
        predictor = Predictor(load_bundle(run, device=loop.device), loop.window)
        with counting_bar(console, "final validation") as progress:
            evaluation = final_validation(run, predictor, validation, loop.labels, experiment.data.reading, progress)
        print_evaluation(evaluation, console)
        if experiment.trainer.postprocess == "auto":
            by_id = {case.case_id: case for case in validation}
            postprocess_run(run, [run / FINAL_FOLDER], by_id, loop.labels, console, reading=experiment.data.reading)
    counters = loop.counters
    device = device_in_words(loop.device, loop.precision)
    write_card(experiment, run, info, [("", split, counters)], evaluation, device=device)
    page = ""
    if experiment.trainer.report:
        report = write_run_report(run, {"": run}, evaluation, {"device": device, "seed": experiment.seed})
        page = f"\nreport: {report}"
    console.print(
        f"done: {counters.step} steps in {counters.minutes:.1f} min, best validation Dice {counters.best_dice:.4f}"
        f" at step {counters.best_step}\nrun: {run}{page}\nlook: {command('--logdir', run, program='tensorboard')}\n"
        f"use: {command('predict', run)} SCAN -o FOLDER",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return TrainResult(run, counters.best_dice, counters.step, counters.minutes, evaluation)


def conclude_folds(experiment: Experiment, folds: Folds, console: Console) -> TrainResult:
    """The cross-validation of all folds, their post-processing and card, and where everything lies."""
    run, labels, members = folds.run, folds.info.labels, folds.members
    done = [folds.finished[fold.number] for fold in members]
    crossvalidation = None
    forget_postprocessing(run)
    if experiment.trainer.final_predictions:
        evaluations = {fold.number: read_evaluation(fold.run / FINAL_FOLDER, labels) for fold in members}
        crossvalidation = CrossValidation(evaluations)
        crossvalidation.write(run / CROSSVALIDATION_FOLDER)
        console.rule("all folds")
        print_crossvalidation(crossvalidation, console)
        if experiment.trainer.postprocess == "auto":
            by_id = {i: folds.cases[i] for fold in members for i in fold.split.val}
            predicted = [fold.run / FINAL_FOLDER for fold in members]
            postprocess_run(run, predicted, by_id, labels, console, reading=experiment.data.reading)
    trainings = [(f"fold {f.number}", f.split, counters) for f, counters in zip(members, done, strict=True)]
    write_card(experiment, run, folds.info, trainings, crossvalidation, survey=members[0].run)
    page = ""
    if experiment.trainer.report:
        folders = {f"fold {fold.number}": fold.run for fold in members}
        page = f"\nreport: {write_run_report(run, folders, crossvalidation, {'seed': experiment.seed})}"
    minutes, steps = sum(c.minutes for c in done), sum(c.step for c in done)
    mean_dice = sum(c.best_dice for c in done) / len(done)
    console.print(
        f"done: {len(done)} folds, {steps} steps in {minutes:.1f} min, mean of their best validation Dice "
        f"{mean_dice:.4f}\nrun: {run}{page}\nuse: {command('predict', run)} SCAN -o FOLDER",
        highlight=False,
        soft_wrap=True,
    )
    return TrainResult(run, mean_dice, steps, minutes, None if crossvalidation is None else crossvalidation.pooled)
