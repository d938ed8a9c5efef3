"""The story of a training run, from top to bottom: find, survey, split, plan, prepare, build, loop, conclude."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import nn

from medseg.bundle import FOLDS_FILE, BundleInfo, forget_manifest, load_bundle, write_manifest
from medseg.bundle.manifest import made_now
from medseg.data.cases import Case, DataFolder
from medseg.data.splits import Split
from medseg.data.store import Store
from medseg.device import deterministic
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import memory_format
from medseg.program import command
from medseg.registry import make_config
from medseg.reports.crossvalidation import CrossValidation, print_crossvalidation, read_evaluation
from medseg.reports.evaluation import Evaluation
from medseg.reports.progress import counting_bar
from medseg.reports.tables import print_evaluation
from medseg.training.beginning import begin, found_cases, go_on, open_store, prepare
from medseg.training.card import device_in_words, write_card
from medseg.training.distributed import World, is_follower, is_launched, joined, remember
from medseg.training.engine import Watch
from medseg.training.experiment import Experiment, without_places, write_config
from medseg.training.folds import Folds, Sides, begin_folds, go_on_folds
from medseg.training.initial import load_initial, seen_before
from medseg.training.journal import HISTORY_FILE, Journal
from medseg.training.launching import launch
from medseg.training.lock import locked
from medseg.training.loop import Loop
from medseg.training.pictures import conclude_board
from medseg.training.postprocessing import forget_postprocessing, postprocess_run
from medseg.training.pretrained import load_pretrained
from medseg.training.sides import with_sides
from medseg.training.signals import save_signal_is_harmless
from medseg.training.state import can_resume
from medseg.training.validation import FINAL_FOLDER, final_validation

CROSSVALIDATION_FOLDER = "crossvalidation"
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""Of the log in a run's folder, as in configs/train.yaml."""


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


def train(experiment: Experiment, run: Path, console: Console | None = None, watch: Watch | None = None) -> TrainResult:
    """Train a model.

    Args:
        experiment: everything that states the run.
        run: the folder that will hold everything about it; with `experiment.resume`, the run that goes on.
        console: where the user reads; processes that `trainer.devices` starts write to the terminal.
        watch: told of each validation of a training in this process.
    Raises:
        MedsegError: what the data, the configuration or the machine refuse; E_NAN_LOSS if the loss stops being finite;
            E_PROCESS if one of several processes ends; E_OUTPUT if another training writes into the run.
    """
    if experiment.trainer.devices > 1 and not is_launched():
        say_shared_memory(experiment.trainer.device, console or Console())
        result: TrainResult = launch(_as_one_of_several, experiment.trainer.devices, experiment, run)
        return result
    run.mkdir(parents=True, exist_ok=True)
    remember(run)
    with joined() as world, locked(run, is_main=world.is_main):
        return _train_in(world, experiment, run, console or Console(), watch)


def follow() -> None:
    """What the processes beside the main one do: the same, from what it has settled, without what it writes."""
    with joined() as world:
        values, run = world.told(None)
        experiment = dataclasses.replace(make_config(Experiment, values, where=""), resume=run)
        _train_in(world, experiment, Path(run), Console(quiet=True))


def say_shared_memory(device: str, console: Console) -> None:
    """Warn before NCCL fails for want of it, minutes later and in its own words."""
    if device == "cpu" or ":" in device or torch.cuda.device_count() < 2:
        return
    from medseg.diagnosis import Status
    from medseg.diagnosis.places import shared_memory

    check = shared_memory()
    if check.status is not Status.OK:
        said = f"[yellow]warning[/]    {check.name}: {check.found}: {check.remedy}"
        console.print(said, highlight=False, soft_wrap=True)


def log_to(run: Path) -> None:
    """Have this process log into a run's folder, where nobody else has arranged it."""
    run.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=run / "train.log", level=logging.INFO, format=LOG_FORMAT)


def _as_one_of_several(experiment: Experiment, run: Path) -> TrainResult | None:
    if is_follower():
        follow()
        return None
    log_to(run)
    return train(experiment, run)


def _train_in(
    world: World, experiment: Experiment, run: Path, console: Console, watch: Watch | None = None
) -> TrainResult:
    checks: list[dict[str, Any]] = []
    with save_signal_is_harmless(), deterministic(experiment.trainer.deterministic):
        result = _train(experiment, run, console, world, watch, checks)
    if world.is_main:
        write_manifest(_whole(run), made={**made_now(), "checks": checks})
    return result


def _tell(world: World, experiment: Experiment, run: Path, device: torch.device, checks: list[dict[str, Any]]) -> None:
    """Everything that the others read stands on the disk: they begin now. `checks` takes what the machine is like."""
    if world.is_main:
        world.told([dataclasses.asdict(experiment), str(run.absolute())])
        checks += _checks(_whole(run).parent, experiment.trainer.device)
    world.compute_on(device)


def _checks(runs: Path, device: str) -> list[dict[str, Any]]:
    """The table of `medseg doctor`, for the manifest: made while the device is free, and never a training's end."""
    from medseg.diagnosis import diagnose  # decoders and packages, which a training that is refused does without
    from medseg.diagnosis.check import in_short, warn

    try:
        found: list[dict[str, Any]] = diagnose(runs, device).record()["checks"]
    except Exception as error:  # whatever drivers and packages of others raise
        logging.getLogger(__name__).warning("the machine could not be looked at", exc_info=True)
        return [dataclasses.asdict(warn("diagnosis", in_short(error), "medseg doctor says more"))]
    return found


def _whole(run: Path) -> Path:
    """The run that has the manifest: that of all folds where this is one of them."""
    return run.parent if (run.parent / FOLDS_FILE).is_file() else run


def _train(
    experiment: Experiment,
    run: Path,
    console: Console,
    world: World,
    watch: Watch | None,
    checks: list[dict[str, Any]],
) -> TrainResult:
    """One fold or several, begun or gone on with."""
    device = world.device(experiment.trainer.device)
    folder = None
    if experiment.resume is None:
        forget_manifest(_whole(run))
        folder = found_cases(experiment.data, console)
        experiment = with_sides(experiment, folder, console)
        write_config(experiment, run)
    store = open_store(experiment.data, run)
    if experiment.folds is not None:
        return _train_folds(experiment, run, device, console, store, folder, world, checks)
    if folder is not None:
        cases, split, info = begin(experiment, run, device, console, store, folder)
    else:
        cases, split, info = go_on(experiment, run, console, store if world.is_main else None)
    world.share_batch(info.plan.batch_size, experiment.trainer.accumulate)  # refused before anything is prepared
    _tell(world, experiment, run, device, checks)
    prepared = partial(prepare, experiment, info, cases, console=console, store=store)
    result = _train_fold(experiment, run, info, cases, split, prepared, device, console, world, watch)
    if (run.parent / FOLDS_FILE).is_file():
        again = command("train", f"resume={run.parent}")
        said = f"what all folds say together is older now; make it anew by: {again}"
        console.print(said, highlight=False, soft_wrap=True, markup=False)
    return result


def _train_folds(
    experiment: Experiment,
    run: Path,
    device: torch.device,
    console: Console,
    store: Store,
    folder: DataFolder | None,
    world: World,
    checks: list[dict[str, Any]],
) -> TrainResult:
    """The folds one after the other, with one plan and one preparation, and their cross-validation."""
    if folder is not None:
        folds = begin_folds(experiment, run, device, console, store, folder)
    else:
        folds = go_on_folds(experiment, run, console, store if world.is_main else None)
    world.share_batch(folds.info.plan.batch_size, experiment.trainer.accumulate)
    _tell(world, experiment, run, device, checks)
    preparation = folds.preparation(experiment, console, store)
    try:
        for place, fold in enumerate(folds.members, start=1):
            console.rule(f"fold {fold.number}: {place} of {len(folds.members)}")
            if fold.number in folds.finished:
                alone = command("train", f"resume={fold.run}")
                said = f"done before, and left as it is; a larger budget reaches it by: {alone}"
                console.print(said, highlight=False, soft_wrap=True, markup=False)
                continue
            settled = (fold.experiment, fold.run, folds.info, folds.cases, fold.split)
            _train_fold(*settled, preparation, device, console, world)
            if world.is_main:
                folds.finish(fold)
    except (KeyboardInterrupt, SystemExit):
        again = command("train", f"resume={run}")
        console.print(f"go on with this fold and the next ones: {again}", highlight=False, soft_wrap=True, markup=False)
        raise
    if not world.is_main:
        return TrainResult(run, -1.0, 0, 0.0, None)
    forget_manifest(run)  # also where no fold was left to train
    return conclude_folds(experiment, folds, device, console)


def _train_fold(
    experiment: Experiment,
    run: Path,
    info: BundleInfo,
    cases: Mapping[str, Case],
    split: Split,
    preparation: Sides,
    device: torch.device,
    console: Console,
    world: World,
    watch: Watch | None = None,
) -> TrainResult:
    """One training from the fresh network to the final validation."""
    torch.manual_seed(experiment.seed)
    model = info.build_model().to(device, memory_format=memory_format(info.plan.spatial_dims))  # type: ignore[call-overload]
    describe(console, run, info, model, device)
    outputs = info.labels.declared[-info.labels.num_outputs :]
    for line in [] if can_resume(run) else load_pretrained(model, experiment.model, outputs):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if experiment.trainer.initial is not None and not can_resume(run):
        initial = Path(experiment.trainer.initial)
        for line in load_initial(model, info, initial) + seen_before(initial, split, experiment.data.root):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    model, notes = world.with_whole_batches(model, device)
    for line in notes:
        console.print(line, highlight=False, soft_wrap=True)
    training, validation = world.main_first(lambda: preparation(split))

    loop = Loop(experiment, run, info, model, training, validation, device, world)
    loop.watch = watch
    if world.is_main:
        forget_manifest(_whole(run))  # nothing is refused any more, and its files change from here on
    counters = loop.counters
    since = counters.step
    with (
        nullcontext(str(run)) if world.is_main else TemporaryDirectory() as folder,  # the others' diary nobody reads
        Journal(Path(folder), console, loop.columns(), from_step=since, validates=counters.is_validating) as journal,
    ):
        journal.settings("configuration", without_places(experiment)[0])
        journal.settings("plan", info.plan.to_json())
        loop.run_to_the_end(journal)
    return conclude(experiment, run, loop, info, cases, split, console, world)


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
    world: World,
) -> TrainResult:
    """Curves, the final validation with the best weights on the scans' own grids, the card, where everything lies."""
    if world.is_main:
        from medseg.reports.curves import save_curves  # matplotlib: the first step need not wait for it

        save_curves(run / "curves.png", run / HISTORY_FILE)
        forget_postprocessing(run)
    validation = [cases[i] for i in split.val]
    evaluation = None
    if experiment.trainer.final_predictions:
        predictor = Predictor(load_bundle(run, device=loop.device), loop.window)
        with counting_bar(console, "final validation") as progress:
            reading = experiment.data.reading
            evaluation = final_validation(run, predictor, validation, loop.labels, reading, progress, world)
    counters = loop.counters
    if not world.is_main:
        return TrainResult(run, counters.best_score, counters.step, counters.minutes, None)
    if evaluation is not None:
        print_evaluation(evaluation, console)
        if experiment.trainer.postprocess == "auto":
            by_id = {case.case_id: case for case in validation}
            postprocess_run(run, [run / FINAL_FOLDER], by_id, loop.labels, console, reading=experiment.data.reading)
    conclude_board(run, experiment, info, loop.pictures, evaluation, best_dice=counters.best_score, console=console)
    write_card(experiment, run, info, [("", split, counters)], evaluation, device=loop.device)
    page = ""
    if experiment.trainer.report:
        from medseg.reports.html.run import write_run_report

        device = device_in_words(loop.device, loop.precision)
        report = write_run_report(run, {"": run}, evaluation, {"device": device, "seed": experiment.seed})
        page = f"\nreport: {report}"
    console.print(
        f"done: {counters.step} steps in {counters.minutes:.1f} min, best validation Dice {counters.best_score:.4f}"
        f" at step {counters.best_step}\nrun: {run}{page}\nlook: {command('--logdir', run, program='tensorboard')}\n"
        f"use: {command('predict', run)} SCAN -o FOLDER",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return TrainResult(run, counters.best_score, counters.step, counters.minutes, evaluation)


def conclude_folds(experiment: Experiment, folds: Folds, device: torch.device, console: Console) -> TrainResult:
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
    write_card(experiment, run, folds.info, trainings, crossvalidation, device=device, survey=members[0].run)
    page = ""
    if experiment.trainer.report:
        from medseg.reports.html.run import write_run_report

        folders = {f"fold {fold.number}": fold.run for fold in members}
        facts = {"device": device_in_words(device, experiment.trainer.precision), "seed": experiment.seed}
        page = f"\nreport: {write_run_report(run, folders, crossvalidation, facts)}"
    minutes, steps = sum(c.minutes for c in done), sum(c.step for c in done)
    mean_dice = sum(c.best_score for c in done) / len(done)
    console.print(
        f"done: {len(done)} folds, {steps} steps in {minutes:.1f} min, mean of their best validation Dice "
        f"{mean_dice:.4f}\nrun: {run}{page}\nuse: {command('predict', run)} SCAN -o FOLDER",
        highlight=False,
        soft_wrap=True,
    )
    return TrainResult(run, mean_dice, steps, minutes, None if crossvalidation is None else crossvalidation.pooled)
