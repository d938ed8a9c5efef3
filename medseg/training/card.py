"""The model cards of a run and of a run of several folds: what the training knows, handed to the report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from medseg.bundle import BundleInfo
from medseg.data.facts import read_survey
from medseg.data.splits import Split
from medseg.device import choose_precision
from medseg.inference.postprocess import POSTPROCESSING_FILE
from medseg.reports.crossvalidation import CrossValidation
from medseg.reports.evaluation import Evaluation
from medseg.reports.model_card import Facts, Fit, write_model_card
from medseg.training.beginning import SURVEY_FILE
from medseg.training.experiment import Experiment
from medseg.training.optimizers import learning_rate
from medseg.training.sides import in_words
from medseg.training.state import Counters


def write_card(
    experiment: Experiment,
    run: Path,
    info: BundleInfo,
    trainings: Sequence[tuple[str, Split, Counters]],
    evaluation: Evaluation | CrossValidation | None,
    *,
    device: torch.device,
    survey: Path | None = None,
) -> Path:
    """Write the model card of a run.

    Args:
        experiment: what stated the run.
        run: its folder.
        info: plan and model.
        trainings: of each fold its name ("" where there is one only), cases and counters.
        evaluation: of the validation cases on their own grids; None if they were not predicted.
        device: what it ran on.
        survey: folder with the survey.json of the run, by default the run.
    """
    found = read_survey((survey or run) / SURVEY_FILE)
    fits = [
        Fit(name, split, counters.step, counters.minutes, counters.best_score, counters.best_step)
        for name, split, counters in trainings
    ]
    num_weights = sum(p.numel() for p in info.build_model().parameters())
    settings = _settings(experiment, info, device)
    postprocessed = (run / POSTPROCESSING_FILE).is_file()
    return write_model_card(run, info, Facts(found, fits, settings, evaluation, num_weights, postprocessed))


def device_in_words(device: torch.device, precision: str) -> str:
    """What a training ran on: the processor's kind and the precision; no name of a machine.

    Args:
        device: that it ran on.
        precision: as `trainer.precision` has it.
    """
    precision = choose_precision(precision, device)
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    else:
        kind = f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return f"{kind}, {precision}"


def _settings(experiment: Experiment, info: BundleInfo, device: torch.device) -> Mapping[str, object]:
    trainer, augment = experiment.trainer, experiment.augment
    budget = [f"{trainer.max_minutes:g} minutes"] if trainer.max_minutes is not None else []
    budget += [f"{trainer.steps:g} steps"] if trainer.steps < float("inf") else []
    begun = {} if trainer.initial is None else {"begun with": "the weights of another run (fine-tuning)"}
    rate = learning_rate(experiment.optimizer, device)
    axes = ", ".join(map(str, info.mirror_axes)) or "none"
    varied = f"{augment.rotation_probability:.0%} of the patches turned, {augment.scale_probability:.0%} scaled"
    sides = {} if not info.swap else {"left and right": f"{in_words(info.swap)} (change places where mirrored)"}
    return {
        **begun,
        "loss": experiment.loss["name"],
        "optimizer": f"{experiment.optimizer['name']}, learning rate {rate:g}",
        "schedule": experiment.schedule["name"],
        "budget of a training": ", whichever ends first: ".join(budget),
        "weights": "of the last step" if trainer.ema is None else f"averaged over steps (decay {trainer.ema:g})",
        "augmentation": f"{varied}; mirrored axes: {axes}",
        **sides,
        "seed": experiment.seed,
        "device": device_in_words(device, trainer.precision),
    }
