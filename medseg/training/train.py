"""The story of a training run, from top to bottom: find, survey, split, plan, prepare, build, loop, conclude."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from medseg.bundle import BundleInfo, load_bundle
from medseg.data.cases import Case
from medseg.device import choose_device
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import memory_format
from medseg.program import command
from medseg.reports.curves import save_curves
from medseg.reports.evaluation import Evaluation
from medseg.reports.progress import counting_bar
from medseg.reports.tables import print_evaluation
from medseg.training.beginning import begin, go_on, prepare
from medseg.training.experiment import Experiment
from medseg.training.journal import HISTORY_FILE, Journal
from medseg.training.loop import Loop
from medseg.training.validation import final_validation


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        run: its folder.
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
    torch.manual_seed(experiment.seed)
    device = choose_device(experiment.trainer.device)

    if experiment.resume is None:
        cases, split, info = begin(experiment, run, device, console)
    else:
        cases, split, info = go_on(experiment, run, console)

    model = info.build_model().to(device, memory_format=memory_format(info.plan.spatial_dims))  # type: ignore[call-overload]
    describe(console, run, info, model, device)
    training, validation = prepare(experiment, info, cases, split, console)

    loop = Loop(experiment, run, info, model, training, validation, device)
    with Journal(run, console, loop.columns(), from_step=loop.counters.step) as journal:
        journal.settings("configuration", _without_paths(experiment))
        journal.settings("plan", info.plan.to_json())
        loop.run_to_the_end(journal)
    return conclude(experiment, run, loop, [cases[i] for i in split.val], console)


def _without_paths(experiment: Experiment) -> dict[str, object]:
    """The configuration without places on this machine: event files get around, and paths may hold patients' names."""
    values = dataclasses.asdict(experiment)
    del values["data"]["root"], values["data"]["manifest"], values["resume"]
    return values


def describe(console: Console, run: Path, info: BundleInfo, model: nn.Module, device: torch.device) -> None:
    """Say in a few lines what will be trained."""
    plan = info.plan
    weights = sum(p.numel() for p in model.parameters())
    patch = "×".join(str(p) for p in plan.patch_size)
    spacing = "×".join(f"{s:.4g}" for s in plan.spacing_mm)
    unit = "mm" if plan.orientation else "px"
    console.print(
        f"model      {info.model['name']}, {weights / 1e6:.2f} million weights, on {device.type}\n"
        f"plan       patch {patch} at {spacing} {unit}, batch {plan.batch_size}, {plan.normalisation}"
        f" (reasons in {run / 'plan.yaml'})",
        highlight=False,
        soft_wrap=True,
    )


def conclude(
    experiment: Experiment, run: Path, loop: Loop, validation: Sequence[Case], console: Console
) -> TrainResult:
    """Curves, the final validation with the best weights on the scans' own grids, and where everything lies."""
    save_curves(run / "curves.png", run / HISTORY_FILE)
    evaluation = None
    if experiment.trainer.final_predictions:
        predictor = Predictor(load_bundle(run, device=loop.device), loop.window)
        with counting_bar(console, "final validation") as progress:
            evaluation = final_validation(run, predictor, validation, loop.labels, experiment.data.reading, progress)
        print_evaluation(evaluation, console)
    counters = loop.counters
    console.print(
        f"done: {counters.step} steps in {counters.minutes:.1f} min, best validation Dice {counters.best_dice:.4f}"
        f" at step {counters.best_step}\nrun: {run}\nlook: {command('--logdir', run, program='tensorboard')}\n"
        f"use: {command('predict', run)} SCAN -o FOLDER",
        highlight=False,
        soft_wrap=True,
    )
    return TrainResult(run, counters.best_dice, counters.step, counters.minutes, evaluation)
