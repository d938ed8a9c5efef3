"""The story of a training run, from top to bottom: find, survey, split, plan, prepare, build, loop, conclude."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from medseg.bundle import BundleInfo, checkpoint_path, load_bundle
from medseg.data.augment import Augmenter, mirrored_axes
from medseg.data.cases import Case, DataFolder, find_cases
from medseg.data.plan import Plan, make_plan, with_model, with_patch
from medseg.data.preprocess import PreparedCase, prepare_cases
from medseg.data.sampling import PatchSampler
from medseg.data.splits import Split, make_split, read_split, write_split
from medseg.data.survey import Survey, summary_lines, survey
from medseg.device import choose_device, choose_precision
from medseg.errors import Code, MedsegError
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import WindowConfig, autocast, memory_format
from medseg.losses import LOSSES
from medseg.losses.deep_supervision import DeepSupervision
from medseg.models import MODELS, SegmentationModel
from medseg.reports.curves import save_curves
from medseg.reports.evaluation import Evaluation
from medseg.reports.overlay import figure_to_array, overlay_figure
from medseg.reports.progress import counting_bar
from medseg.reports.tables import print_evaluation
from medseg.training.experiment import Experiment
from medseg.training.journal import DICE_PREFIX, HISTORY_FILE, Journal
from medseg.training.optimizers import OPTIMIZERS
from medseg.training.schedules import SCHEDULES, Schedule
from medseg.training.signals import StopSignals
from medseg.training.state import Counters, resume_latest, save_best, save_latest
from medseg.training.validation import final_validation, validate
from medseg.volume import Volume

SPLIT_FILE = "split.json"
"""Which cases train and validate, in a run's folder."""


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
        cases, split, info = go_on(experiment, run)
    plan = info.plan

    model = info.build_model().to(device, memory_format=memory_format(plan.spatial_dims))  # type: ignore[call-overload]
    describe(console, run, info, model, device)
    training, validation = prepare(experiment, info, cases, split, console)

    loop = Loop(experiment, run, plan, info, model, training, validation, device)
    with Journal(run, console, loop.columns(), from_step=loop.counters.step) as journal:
        journal.settings("configuration", dataclasses.asdict(experiment))
        journal.settings("plan", plan.to_json())
        loop.run_to_the_end(journal)
    return conclude(experiment, run, loop, [cases[i] for i in split.val], console)


def begin(
    experiment: Experiment, run: Path, device: torch.device, console: Console
) -> tuple[dict[str, Case], Split, BundleInfo]:
    """Find the cases, split them, read each once, say what was found, plan; and write all that down.

    Test cases are not looked at, and validation cases shape neither the plan nor the normalisation.
    """
    data = experiment.data
    folder = found_cases(experiment)
    split = make_split(folder.cases, data.split, experiment.seed)
    if experiment.trainer.overfit_cases is not None:
        few = split.train[: experiment.trainer.overfit_cases]
        split = dataclasses.replace(split, train=few, val=few, rule=f"overfitting on {len(few)} case(s)")
    used = {*split.train, *split.val}
    with counting_bar(console, "reading every case once") as progress:
        found = survey(
            dataclasses.replace(folder, cases=tuple(c for c in folder.cases if c.case_id in used)),
            data.labels,
            num_threads=data.num_threads,
            progress=progress,
            training=split.train,
        )
    for line in summary_lines(found):
        console.print(line, highlight=False, soft_wrap=True)
    sizes = f"{len(split.train)} to train, {len(split.val)} to validate"
    sizes += f", {len(split.test)} set aside to test" if split.test else ""
    console.print(f"split      {sizes} ({split.rule})", highlight=False, soft_wrap=True)
    training = dataclasses.replace(found, cases=tuple(c for c in found.cases if c.case_id in split.train))
    info = plan_run(experiment, training, device)
    write_split(run / SPLIT_FILE, split)
    (run / "survey.json").write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
    info.plan.write(run / "plan.yaml")
    info.write(run)
    return {case.case_id: case for case in folder.cases}, split, info


def go_on(experiment: Experiment, run: Path) -> tuple[dict[str, Case], Split, BundleInfo]:
    """What a run decided when it began: a resumed run keeps its split and plan, also where the folder has grown.

    Raises:
        MedsegError: E_MISSING if a case of the split is not in the folder any more; E_RUN if this is no run.
    """
    info, split = BundleInfo.read(run), read_split(run / SPLIT_FILE)
    cases = {case.case_id: case for case in found_cases(experiment).cases}
    gone = [case for case in (*split.train, *split.val) if case not in cases]
    if gone:
        raise MedsegError(
            Code.MISSING,
            f"{len(gone)} case(s) of the run are not in the data folder any more",
            where=", ".join(gone[:10]),
            remedy="put them back, or begin a new run",
        )
    return cases, split, info


def found_cases(experiment: Experiment) -> DataFolder:
    """The cases of `data.root`."""
    data = experiment.data
    if data.root is None:
        raise MedsegError(
            Code.CONFIG,
            "no data were named",
            where="data.root",
            expected="a folder of cases",
            remedy="medseg train data.root=FOLDER; try it on a phantom with: medseg demo",
        )
    return find_cases(Path(data.root), manifest=None if data.manifest is None else Path(data.manifest))


def plan_run(experiment: Experiment, found: Survey, device: torch.device) -> BundleInfo:
    """The plan and the complete settings of the model: each takes from the other what the user has set there.

    Raises:
        MedsegError: E_MODEL if a patch size that was asked for does not fit the network; names the nearest that do.
    """
    config, settings = experiment.data.plan, dict(experiment.model)
    part = MODELS.part(str(settings["name"]))
    shared = [f.name for f in dataclasses.fields(part.config) if f.name in ("widths", "kernels", "strides")]
    given = {name: settings[name] for name in shared if settings.get(name) is not None}
    if given and config.num_stages is None:
        config = dataclasses.replace(config, num_stages=len(next(iter(given.values()))))
    plan = with_model(make_plan(found, config, device=device.type), given)
    settings |= {name: plan.to_json()[name] for name in shared if name not in given}
    mirrored = mirrored_axes(experiment.augment, spatial_dims=plan.spatial_dims, is_picture=not plan.orientation)
    info = BundleInfo(settings, plan, found.labels, found.channel_names, mirrored)
    model = info.build_model()
    patch = model.next_size(plan.patch_size)
    if config.patch_size is None and patch != plan.patch_size:
        reason = f"{plan.reasons['patch_size']}; enlarged to what the network takes"
        info = dataclasses.replace(info, plan=with_patch(plan, patch, reason))
    model.output_size(info.plan.patch_size)
    return info


def prepare(
    experiment: Experiment, info: BundleInfo, cases: Mapping[str, Case], split: Split, console: Console
) -> tuple[list[PreparedCase], list[PreparedCase]]:
    """All training and validation cases in memory, as the network sees them."""
    wanted = list(dict.fromkeys([*split.train, *split.val]))
    with counting_bar(console, "preparing the cases") as progress:
        prepared = prepare_cases(
            [cases[i] for i in wanted],
            info.plan,
            info.labels,
            seed=experiment.seed,
            num_threads=experiment.data.num_threads,
            progress=progress,
        )
    by_id = {case.case_id: case for case in prepared}
    return [by_id[i] for i in split.train], [by_id[i] for i in split.val]


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


class Loop:
    """Steps and validations until the budget of steps or minutes is used up."""

    def __init__(
        self,
        experiment: Experiment,
        run: Path,
        plan: Plan,
        info: BundleInfo,
        model: SegmentationModel,
        training: Sequence[PreparedCase],
        validation: Sequence[PreparedCase],
        device: torch.device,
    ) -> None:
        self.config = experiment.trainer
        self.run, self.plan, self.labels, self.model, self.device = run, plan, info.labels, model, device
        self.validation = validation
        self.precision = choose_precision(self.config.precision, device)
        self.window = WindowConfig(batch_size=plan.batch_size, precision=self.precision)
        is_picture = not plan.orientation
        labelled = model.output_size(plan.patch_size)
        margin = tuple((p - q) // 2 for p, q in zip(plan.patch_size, labelled, strict=True))
        self.sampler = PatchSampler(
            training,
            plan.patch_size,
            plan.batch_size,
            self.config.foreground_share,
            experiment.seed,
            mirror_padding=is_picture or any(margin),
            margin=margin,
        )
        self.augment = Augmenter(
            experiment.augment, spacing_mm=plan.spacing_mm, is_picture=is_picture, seed=experiment.seed
        )
        self.loss: nn.Module = DeepSupervision(LOSSES.build(experiment.loss)).to(device)
        self.optimizer = OPTIMIZERS.build(experiment.optimizer, parameters=model.parameters())
        self.schedule: Schedule = SCHEDULES.build(experiment.schedule)
        self.base_lr = float(self.optimizer.param_groups[0]["lr"])
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.counters = Counters()
        if experiment.resume is not None and checkpoint_path(run, "latest").exists():
            self.counters = resume_latest(run, model, self.optimizer, self.scaler)
            # A larger budget moves the evenly spread validations: those due by now count as done.
            self.counters.validations = int(self.progress() * self.config.num_validations + 1e-9)
        self.last_dice = math.nan
        self.saved_at = time.monotonic()
        fixed = [case.case_id for case in validation]
        self.shown = fixed[:: max(1, len(fixed) // self.config.overlay_cases)][: self.config.overlay_cases]

    def columns(self) -> list[str]:
        """Columns of history.csv."""
        per_class = [DICE_PREFIX + name for name in self.labels.foreground]
        return ["train_loss", "lr", "samples_per_s", "val_loss", DICE_PREFIX + "mean", *per_class]

    def progress(self) -> float:
        """Share of the budget that is used, by steps or by minutes, whichever is further."""
        return max(self.counters.step / self.config.steps, self.counters.minutes / self.config.minutes)

    def run_to_the_end(self, journal: Journal) -> None:
        """Train until the budget is used up or the patience is at its end."""
        self.model.train()
        started = time.monotonic() - 60 * self.counters.minutes
        mark, mark_step = time.monotonic(), self.counters.step
        recent, num_recent = torch.zeros((), device=self.device), 0
        batches = self.sampler.prefetch(self.counters.step)
        with StopSignals() as stop, closing(batches):
            while self.progress() < 1 and stop.received is None:
                step, image, label = next(batches)
                recent += self.train_step(step, image.to(self.device), label.to(self.device))
                num_recent += 1
                self.counters.step = step + 1
                self.counters.minutes = (time.monotonic() - started) / 60
                if self.counters.step % self.config.log_steps == 0:
                    seconds = max(time.monotonic() - mark, 1e-9)
                    speed = (self.counters.step - mark_step) * self.plan.batch_size / seconds
                    self.log_training(journal, float(recent) / num_recent, speed)
                    recent, num_recent = torch.zeros_like(recent), 0
                    mark, mark_step = time.monotonic(), self.counters.step
                if self.is_time_to_validate():
                    self.check_finite(float(recent))
                    self.validate(journal)
                    mark, mark_step = time.monotonic(), self.counters.step
                    self.counters.minutes = (time.monotonic() - started) / 60
                    self.save()
                    if self.config.patience is not None and self.counters.stale >= self.config.patience:
                        journal.say(f"no better Dice for {self.counters.stale} validations: stopping early")
                        return
                elif time.monotonic() - self.saved_at > 60 * self.config.save_minutes:
                    self.save()
            if stop.received is not None:
                self.save()
                again = shlex.quote(f"resume={self.run}")
                journal.say(f"stopped by {stop.received.name} at step {self.counters.step}; go on with:")
                journal.say(f"  medseg train {again}")
        stop.raise_received()

    def train_step(self, step: int, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """One optimizer step on a batch; returns the loss, detached and still on the device."""
        factor = self.schedule(self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * factor
        image, label = self.augment(image, label, step)
        image = image.contiguous(memory_format=memory_format(self.plan.spatial_dims))
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            outputs = self.model(image)
        loss: torch.Tensor = self.loss(outputs, label)
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def log_training(self, journal: Journal, loss: float, samples_per_s: float) -> None:
        """Record the mean loss of the last steps and move the bar."""
        self.check_finite(loss)
        lr = self.optimizer.param_groups[0]["lr"]
        values = {"train_loss": loss, "lr": lr, "samples_per_s": samples_per_s}
        journal.record(self.counters.step, self.counters.minutes, values)
        dice = "" if math.isnan(self.last_dice) else f" Dice {self.last_dice:.3f}"
        journal.advance(
            self.progress(), f"step {self.counters.step} loss {loss:.3f}{dice} {samples_per_s:.1f} samples/s"
        )

    def check_finite(self, loss: float) -> None:
        """End the run at a loss that is not finite, before such weights are saved.

        Raises:
            MedsegError: E_NAN_LOSS.
        """
        if not math.isfinite(loss):
            raise MedsegError(
                Code.NAN_LOSS,
                "the training loss is not finite any more",
                where=f"step {self.counters.step}",
                got=loss,
                remedy="lower optimizer.lr, or set trainer.precision=fp32; the best checkpoint is kept",
            )

    def is_time_to_validate(self) -> bool:
        """Whether the next of the evenly spread validations is due."""
        due = (self.counters.validations + 1) / self.config.num_validations
        return self.progress() >= min(due, 1.0)

    def validate(self, journal: Journal) -> None:
        """Whole volumes: record Dice and overlays, keep the best weights."""
        result, kept = validate(
            self.model, self.validation, self.plan.patch_size, self.labels, self.loss, self.window, keep=self.shown
        )
        counters = self.counters
        # A slow validation may skip turns that are due by now: they are done by this one.
        counters.validations = max(counters.validations + 1, int(self.progress() * self.config.num_validations + 1e-9))
        self.last_dice = result.mean
        per_class = dict(zip(self.labels.foreground, (float(v) for v in result.per_class), strict=True))
        values = {"val_loss": result.loss, DICE_PREFIX + "mean": result.mean}
        values |= {DICE_PREFIX + name: value for name, value in per_class.items()}
        journal.record(counters.step, counters.minutes, values)
        is_best = result.mean > counters.best_dice
        counters.stale = 0 if is_best else counters.stale + 1
        if is_best:
            counters.best_dice, counters.best_step = result.mean, counters.step
            save_best(self.run, self.model, counters)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in list(per_class.items())[:6])
        mark = " [green]best so far[/]" if is_best else ""
        journal.say(
            f"{counters.minutes:6.1f} min  step {counters.step:>6}  validation Dice {result.mean:.4f}  ({shown}){mark}"
        )
        self.draw(journal, kept)

    def draw(self, journal: Journal, kept: Mapping[str, np.ndarray]) -> None:
        """Overlays of the fixed validation cases, for TensorBoard."""
        for case in self.validation:
            if case.case_id not in kept:
                continue
            figure = overlay_figure(
                Volume(case.image.numpy(), case.grid),
                reference=Volume(self.labels.to_values(case.label.numpy()), case.grid),
                predicted=Volume(self.labels.to_values(kept[case.case_id]), case.grid),
                labels=self.labels,
                title=case.case_id,
            )
            journal.picture(f"validation/{case.case_id}", figure_to_array(figure), self.counters.step)

    def save(self) -> None:
        """Write the latest checkpoint."""
        save_latest(self.run, self.model, self.optimizer, self.scaler, self.counters)
        self.saved_at = time.monotonic()


def conclude(
    experiment: Experiment, run: Path, loop: Loop, validation: Sequence[Case], console: Console
) -> TrainResult:
    """Curves, the final validation with the best weights on the scans' own grids, and where everything lies."""
    save_curves(run / "curves.png", run / HISTORY_FILE)
    evaluation = None
    if experiment.trainer.final_predictions:
        predictor = Predictor(load_bundle(run, device=loop.device), loop.window)
        with counting_bar(console, "final validation") as progress:
            evaluation = final_validation(run, predictor, validation, loop.labels, progress)
        print_evaluation(evaluation, console)
    counters = loop.counters
    console.print(
        f"done: {counters.step} steps in {counters.minutes:.1f} min, best validation Dice {counters.best_dice:.4f}"
        f" at step {counters.best_step}\nrun: {run}\nlook: tensorboard --logdir {run}\n"
        f"use: medseg predict {run} SCAN -o FOLDER",
        highlight=False,
        soft_wrap=True,
    )
    return TrainResult(run, counters.best_dice, counters.step, counters.minutes, evaluation)
