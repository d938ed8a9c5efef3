"""Steps and validations until the budget is used up."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medseg.bundle import BundleInfo, checkpoint_path
from medseg.data.augment import Augmenter
from medseg.data.prepared import PreparedCase
from medseg.data.sampling import BatchItem, PatchSampler
from medseg.device import choose_precision, explicit_padding, keep_freed_memory
from medseg.errors import Code, MedsegError
from medseg.inference.sliding_window import WindowConfig, autocast, memory_format
from medseg.losses.choice import build_loss
from medseg.losses.deep_supervision import DeepSupervision
from medseg.models import SegmentationModel
from medseg.program import command
from medseg.reports.overlay import figure_to_array, overlay_figure
from medseg.training.averaging import WeightAverage
from medseg.training.beginning import SURVEY_FILE
from medseg.training.class_weights import with_class_weights
from medseg.training.compiling import Forward, wants_compiling
from medseg.training.experiment import Experiment
from medseg.training.feeding import on_device
from medseg.training.journal import DICE_PREFIX, Journal
from medseg.training.optimizers import OPTIMIZERS
from medseg.training.schedules import SCHEDULES, Schedule
from medseg.training.signals import StopSignals
from medseg.training.state import Counters, resume_latest, save_best, save_latest
from medseg.training.validation import validate
from medseg.volume import Volume

VALIDATION_SHARE = 0.2
"""Largest share of a time budget that validations may take."""


class Loop:
    """Steps and validations until the budget of steps or minutes is used up."""

    def __init__(
        self,
        experiment: Experiment,
        run: Path,
        info: BundleInfo,
        model: SegmentationModel,
        training: Sequence[PreparedCase],
        validation: Sequence[PreparedCase],
        device: torch.device,
    ) -> None:
        self.config, plan = experiment.trainer, info.plan
        self.run, self.plan, self.labels, self.model, self.device = run, plan, info.labels, model, device
        self.validation = validation
        self.precision = choose_precision(self.config.precision, device)
        self.window = WindowConfig(batch_size=plan.batch_size, precision=self.precision)
        is_picture = not plan.orientation
        labelled = model.output_size(plan.patch_size)
        margin = tuple((p - q) // 2 for p, q in zip(plan.patch_size, labelled, strict=True))
        self.augment = Augmenter(
            experiment.augment,
            patch_size=plan.patch_size,
            spacing_mm=plan.spacing_mm,
            is_picture=is_picture,
            mirroring=info.mirroring,
            seed=experiment.seed,
        )
        self.sampler = PatchSampler(
            training,
            plan.patch_size,
            plan.batch_size,
            self.config.foreground_share,
            experiment.seed,
            mirror_padding=is_picture or any(margin),
            margin=margin,
            cut_size=self.augment.cut_size,
            annotated_only=bool(info.labels.ignore),
            even_classes=self.config.even_classes,
        )
        self.notes: list[str] = []
        loss, weights_note = with_class_weights(
            experiment.loss, info.labels, run / SURVEY_FILE, {case.case_id for case in training}
        )
        if weights_note is not None:
            self.notes.append(weights_note)
        self.loss: nn.Module = DeepSupervision(build_loss(loss, info.labels)).to(device)
        self.optimizer = OPTIMIZERS.build(experiment.optimizer, parameters=model.parameters())
        self.schedule: Schedule = SCHEDULES.build(experiment.schedule)
        self.base_lr = float(self.optimizer.param_groups[0]["lr"])
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.average = None if self.config.ema is None else WeightAverage(model, self.config.ema)
        is_compiled = wants_compiling(self.config.compile, device, steps=self.config.steps, minutes=self.config.minutes)
        self.forward = Forward(model, compiled=is_compiled, must=self.config.compile == "on")
        if device.type == "cpu":
            keep_freed_memory()
        self.counters = Counters()
        if experiment.resume is not None and checkpoint_path(run, "latest").exists():
            self.counters = resume_latest(run, model, self.optimizer, self.scaler, self.average)
            # A larger budget moves the evenly spread validations: those due by now count as done.
            self.counters.validations = int(self.progress() * self.config.num_validations + 1e-9)
        self.last_dice = math.nan
        self.validated_at, self.validation_seconds = time.monotonic(), 0.0
        self.saved_at = time.monotonic()
        fixed = [case.case_id for case in validation]
        num_shown = self.config.overlay_cases
        self.shown = fixed[:: max(1, len(fixed) // max(1, num_shown))][:num_shown]

    def columns(self) -> list[str]:
        """Columns of history.csv."""
        per_class = [DICE_PREFIX + name for name in self.labels.foreground]
        return ["train_loss", "lr", "samples_per_s", "val_loss", DICE_PREFIX + "mean", *per_class]

    def progress(self) -> float:
        """Share of the budget that is used, by steps or by minutes, whichever is further."""
        return max(self.counters.step / self.config.steps, self.counters.minutes / self.config.minutes)

    def is_out_of_patience(self) -> bool:
        """Whether the last validations brought nothing better."""
        return self.config.patience is not None and self.counters.stale >= self.config.patience

    def run_to_the_end(self, journal: Journal) -> None:
        """Train until the budget is used up or the patience is at its end."""
        self.model.train()
        started = time.monotonic() - 60 * self.counters.minutes
        mark, mark_step = time.monotonic(), self.counters.step
        recent, num_recent = torch.zeros((), device=self.device), 0
        for note in self.notes:
            journal.say(note)
        batches = self.feed()
        with StopSignals() as stop, closing(batches):
            while self.progress() < 1 and stop.received is None and not self.is_out_of_patience():
                step, image, label = next(batches)
                recent += self.train_step(step, image, label)
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
                    self.check_weights()
                    self.validate(journal)
                    mark, mark_step = time.monotonic(), self.counters.step
                    self.counters.minutes = (time.monotonic() - started) / 60
                    self.save()
                    if self.is_out_of_patience():
                        journal.say(
                            f"stopping early: no validation Dice above {self.counters.best_dice:.4f} (step "
                            f"{self.counters.best_step}) in the last {self.counters.stale} validations, and "
                            f"trainer.patience={self.config.patience}"
                        )
                elif time.monotonic() - self.saved_at > 60 * self.config.save_minutes:
                    self.check_finite(float(recent))
                    self.check_weights()
                    self.save()
            if stop.received is not None:
                self.check_finite(float(recent))
                self.check_weights()
                self.save()
                journal.say(f"stopped by {stop.received.name} at step {self.counters.step}; go on with:")
                journal.say("  " + command("train", f"resume={self.run}"))
        stop.raise_received()
        if not checkpoint_path(self.run, "best").exists():  # the budget was made smaller before the first validation
            self.validate(journal)
            self.save()

    def feed(self) -> Generator[BatchItem, None, None]:
        """Batches from the next step on, made ahead by a thread, on the device."""
        return on_device(self.sampler.prefetch(self.counters.step), self.device)

    def train_step(self, step: int, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """One optimizer step on a batch; returns the loss, detached and still on the device.

        Nothing in it waits for a GPU.
        """
        self.set_rates()
        image, label = self.augment(image, label, step)
        image = image.contiguous(memory_format=memory_format(self.plan.spatial_dims))
        self.optimizer.zero_grad(set_to_none=True)
        with explicit_padding(self.device):  # also on the way back, where checkpointed parts are computed again
            with autocast(self.device, self.precision):
                outputs = self.forward(image)
            loss: torch.Tensor = self.loss(outputs, label)
            torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(step)
        return loss.detach()

    def set_rates(self) -> None:
        """Give the optimizer what the schedule says of this moment."""
        factor, momentum = self.schedule(self.progress()), self.schedule.momentum(self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * factor
            if momentum is not None and "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif momentum is not None and "momentum" in group:
                group["momentum"] = momentum

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
            raise self._not_finite("the training loss is not finite any more", loss)

    def check_weights(self) -> None:
        """End the run where an update has made weights that are not finite: the loss tells it one step later.

        Raises:
            MedsegError: E_NAN_LOSS.
        """
        norm = float(nn.utils.get_total_norm([p.detach() for p in self.model.parameters()]))
        if not math.isfinite(norm):
            raise self._not_finite("the weights are not finite any more", norm)

    def _not_finite(self, message: str, got: float) -> MedsegError:
        return MedsegError(
            Code.NAN_LOSS,
            message,
            where=f"step {self.counters.step}",
            got=got,
            remedy="lower optimizer.lr, or set trainer.precision=fp32; the best checkpoint is kept",
        )

    def is_time_to_validate(self) -> bool:
        """Whether the next of the evenly spread validations is due.

        Under a time budget slow validations are spaced out, so that they take at most `VALIDATION_SHARE` of it.
        """
        due = (self.counters.validations + 1) / self.config.num_validations
        rested = time.monotonic() - self.validated_at
        if self.config.max_minutes is not None and rested < self.validation_seconds * (1 / VALIDATION_SHARE - 1):
            return self.progress() >= 1
        return self.progress() >= min(due, 1.0)

    def validate(self, journal: Journal) -> None:
        """Whole volumes: record Dice and overlays, keep the best weights."""
        with nullcontext() if self.average is None else self.average.applied():
            self.validate_as_is(journal)

    def validate_as_is(self, journal: Journal) -> None:
        """`validate` with the weights that the model has."""
        started = time.monotonic()
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
        self.validated_at = time.monotonic()
        self.validation_seconds = self.validated_at - started

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
        save_latest(self.run, self.model, self.optimizer, self.scaler, self.counters, self.average)
        self.saved_at = time.monotonic()
