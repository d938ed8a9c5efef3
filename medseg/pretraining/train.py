"""The story of a pretraining, from top to bottom: find images, plan, prepare, build, loop, conclude."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from medseg.bundle import BundleInfo, forget_manifest, write_manifest
from medseg.bundle.manifest import made_now
from medseg.data.preparation import prepare_cases
from medseg.data.prepared import PreparedCase
from medseg.data.store import Store
from medseg.device import deterministic
from medseg.errors import Code, MedsegError
from medseg.inference.sliding_window import memory_format
from medseg.models import MODELS, SegmentationModel
from medseg.pretraining.cases import Settled, begin, go_on
from medseg.pretraining.experiment import PretrainingExperiment
from medseg.pretraining.loop import ReconstructionEngine, explained_by
from medseg.pretraining.methods import METHODS, Method
from medseg.program import command
from medseg.reports.progress import counting_bar
from medseg.training.beginning import open_store
from medseg.training.distributed import joined, remember
from medseg.training.experiment import without_places, write_config
from medseg.training.journal import HISTORY_FILE, Journal
from medseg.training.lock import locked
from medseg.training.pretrained import load_pretrained
from medseg.training.signals import save_signal_is_harmless
from medseg.training.state import can_resume


@dataclass(frozen=True)
class PretrainResult:
    """How a pretraining ended.

    Args:
        run: its folder.
        best_score: best share of the held-out images' variance that was explained.
        steps: optimizer steps done.
        minutes: minutes of the loop.
    """

    run: Path
    best_score: float
    steps: int
    minutes: float


def train(experiment: PretrainingExperiment, run: Path, console: Console | None = None) -> PretrainResult:
    """Train a network to reconstruct images.

    Args:
        experiment: everything that states the run.
        run: the folder that will hold everything about it; with `experiment.resume`, the run that goes on.
        console: where the user reads.
    Raises:
        MedsegError: what the data, the configuration or the machine refuse; E_CONFIG for several processes; E_NAN_LOSS
            if the loss stops being finite; E_OUTPUT if another training writes into the run.
    """
    run.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    remember(run)
    with joined() as world, locked(run, is_main=world.is_main):
        if world.size > 1:
            raise MedsegError(
                Code.CONFIG,
                "a pretraining runs in one process",
                where="torchrun",
                got=f"{world.size} processes",
                remedy="start it without torchrun",
            )
        device = world.device(experiment.trainer.device)
        with save_signal_is_harmless(), deterministic(experiment.trainer.deterministic):
            result = _train(experiment, run, device, console)
        write_manifest(run, made=made_now())
    return result


def _train(experiment: PretrainingExperiment, run: Path, device: torch.device, console: Console) -> PretrainResult:
    store = open_store(experiment.data, run)
    if experiment.resume is None:
        forget_manifest(run)
        write_config(experiment, run)
        settled = begin(experiment, run, device, console, store)
    else:
        settled = go_on(experiment, run, console, store)
    torch.manual_seed(experiment.seed)
    model, method = build(settled.info, experiment.method)
    model = model.to(device, memory_format=memory_format(settled.info.plan.spatial_dims))  # type: ignore[call-overload]
    describe(console, run, settled.info, model, method, device)
    for line in [] if can_resume(run) else load_pretrained(model, experiment.model):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    training, validation = prepare(experiment, settled, store, console)
    forget_manifest(run)  # nothing is refused any more, and its files change from here on
    engine = ReconstructionEngine(experiment, run, settled.info, model, method, training, validation, device)
    counters = engine.counters
    validates = counters.is_validating
    with Journal(run, console, engine.columns(), from_step=counters.step, validates=validates) as journal:
        journal.settings("configuration", without_places(experiment)[0])
        journal.settings("plan", settled.info.plan.to_json())
        engine.run_to_the_end(journal)
    return conclude(run, engine, console)


def build(info: BundleInfo, settings: Mapping[str, Any]) -> tuple[SegmentationModel, Method]:
    """The network that reconstructs, with fresh weights, and the method.

    Args:
        info: plan, and the segmenter that it begins.
        settings: name and settings of the method.
    Raises:
        MedsegError: E_CONFIG for a network that the method cannot use, and what building refuses.
    """
    plan = info.plan
    coarsest = tuple(math.prod(factors) for factors in zip(*plan.strides, strict=True))
    method = METHODS.build(settings, coarsest=coarsest)
    channels = plan.num_channels
    network = method.network(info.model)
    model = MODELS.build(network, in_channels=channels, num_classes=channels, spatial_dims=plan.spatial_dims)
    return model, method


def describe(
    console: Console, run: Path, info: BundleInfo, model: nn.Module, method: Method, device: torch.device
) -> None:
    """Say in a few lines what will be trained."""
    plan = info.plan
    weights = sum(p.numel() for p in model.parameters())
    patch = "×".join(str(p) for p in plan.patch_size)
    spacing = "×".join(f"{s:.4g}" for s in plan.spacing_mm)
    unit = "mm" if plan.orientation else "px"
    scheme = "/".join(dict.fromkeys(plan.normalisation))
    console.print(
        f"model      {info.model['name']}, {weights / 1e6:.2f} million weights, on {device.type}\n"
        f"method     {method.in_words(plan.patch_size)}\n"
        f"plan       patch {patch} at {spacing} {unit}, batch {plan.batch_size}, {scheme}"
        f" (reasons in {run / 'plan.yaml'})",
        highlight=False,
        soft_wrap=True,
    )


def prepare(
    experiment: PretrainingExperiment, settled: Settled, store: Store, console: Console
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """Training and validation images as the network sees them: found in the store, or prepared and kept there."""
    split, data = settled.split, experiment.data
    with counting_bar(console, "preparing the images") as progress:
        prepared = prepare_cases(
            [settled.cases[i] for i in (*split.train, *split.val)],
            settled.info.plan,
            settled.info.labels,
            num_threads=data.threads,
            store=store,
            in_memory=data.in_memory,
            reading=data.reading,
            progress=progress,
        )
    store.decoded.clear()
    for line in prepared.lines(store.folder):
        console.print(line, highlight=False, soft_wrap=True)
    return prepared.cases[: len(split.train)], prepared.cases[len(split.train) :]


def conclude(run: Path, engine: ReconstructionEngine, console: Console) -> PretrainResult:
    """Curves, and where everything lies."""
    from medseg.reports.curves import save_curves  # matplotlib: the first step need not wait for it

    save_curves(run / "curves.png", run / HISTORY_FILE)
    counters, explained = engine.counters, explained_by(engine.counters.best_score)
    begins = command("train", "data.root=LABELLED", f"trainer.initial={run}")
    console.print(
        f"done: {counters.step} steps in {counters.minutes:.1f} min, best explained variance of held-out images "
        f"{explained:.4f} at step {counters.best_step}\nrun: {run}\n"
        f"look: {command('--logdir', run, program='tensorboard')}\nuse: {begins}\n"
        "and compare it with a training from scratch: few steps of pretraining can make it worse",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return PretrainResult(run, explained, counters.step, counters.minutes)
