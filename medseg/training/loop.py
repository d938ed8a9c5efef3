"""Steps and validations until the budget is used up."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from signal import Signals

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
from medseg.losses.processes import together
from medseg.models import SegmentationModel
from medseg.models.compiling import Forward
from medseg.program import command
from medseg.training.averaging import WeightAverage
from medseg.training.beginning import SURVEY_FILE
from medseg.training.class_weights import with_class_weights
from medseg.training.compiling import wants_compiling
from medseg.training.distributed import World, without_sync
from medseg.training.experiment import Experiment
from medseg.training.feeding import on_device
from medseg.training.journal import DICE_PREFIX, Journal
from medseg.training.optimizers import OPTIMIZERS
from medseg.training.pictures import Pictures
from medseg.training.schedules import SCHEDULES, Schedule
from medseg.training.signals import TrainingSignals
from medseg.training.state import Counters, can_resume, resume_latest, save_best, save_latest
from medseg.training.validation import Watch, validate

VALIDATION_SHARE = 0.2
"""Largest share of a time budget that validations may take."""
MAX_LEFT_OUT = 20
"""Steps in a row whose loss is not finite, after which trainer.on_nan_loss=skip gives up: a bad case now and then is
not drawn that often."""


class Loop:
    """Steps and validations until the budget of steps or minutes is used up."""

    watch: Watch | None = None

    def __init__(
        self,
        experiment: Experiment,
        run: Path,
        info: BundleInfo,
        model: SegmentationModel,
        training: Sequence[PreparedCase],
        validation: Sequence[PreparedCase],
        device: torch.device,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self.config, plan = experiment.trainer, info.plan
        self.run, self.plan, self.labels, self.model, self.device = run, plan, info.labels, model, device
        self.seed = experiment.seed
        self.validation = validation
        self.precision = choose_precision(self.config.precision, device)
        self.parts = self.world.share_batch(plan.batch_size, self.config.accumulate)
        at_once = -(-plan.batch_size // (self.world.size * self.config.accumulate))
        self.window = WindowConfig(batch_size=at_once, precision=self.precision)
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
            share=(self.world.rank, self.world.size),
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
        self.network = self.world.network(model, device)
        self.forward = Forward(self.network, compiled=is_compiled, must=self.config.compile == "on")
        if device.type == "cpu":
            keep_freed_memory()
        self.counters = Counters()
        if self.world.told(experiment.resume is not None and can_resume(run)):  # files may change their names meanwhile
            self.counters, notes = self.world.main_first(
                lambda: resume_latest(run, model, self.optimizer, self.scaler, self.average)
            )
            self.notes += notes
            if not self.counters.is_validating:
                # A larger budget moves the evenly spread validations: those due by now count as done.
                self.counters.validations = int(self.progress() * self.config.num_validations + 1e-9)
        self.recent = torch.full((), self.counters.loss_sum, device=device)
        self.is_left_out, self.last_dice = False, math.nan
        self.validated_at, self.validation_seconds = time.monotonic(), 0.0
        self.saved_at = time.monotonic()
        self.pictures = Pictures(self.config, info, training, validation, device, self.precision)

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
        self.started = time.monotonic() - 60 * self.counters.minutes
        self.mark, self.mark_step = time.monotonic(), self.counters.step
        for note in self.notes:
            journal.say(note)
        with TrainingSignals(once=self.world.size == 1) as signals, closing(self.feed()) as batches:
            if self.counters.is_validating:  # it was killed meanwhile
                self.validate_and_save(journal)
            while self.progress() < 1 and not self.is_stopped(signals) and not self.is_out_of_patience():
                step, image, label = next(batches)
                self.note_loss(self.train_step(step, image, label), journal)
                self.counters.step = step + 1
                self.read_clock()
                if self.counters.step % self.config.log_steps == 0:
                    self.log_training(journal)
                validates, saves = self.turn(signals)
                if validates:
                    self.validate_and_save(journal)
                elif saves:
                    self.save()
            if self.is_stopped(signals) and signals.received is not None:
                self.save()
                journal.say(f"stopped by {signals.received.name} at step {self.counters.step}")
                again = command("train", f"resume={self.run}")  # not for the log: its folders may be named for patients
                journal.console.print(f"go on with: {again}", highlight=False, soft_wrap=True, markup=False)
        self.world.barrier()  # torchrun ends them all when the first one leaves
        signals.raise_received()
        if self.world.told(not checkpoint_path(self.run, "best").exists()):
            self.validate_and_save(journal)  # the budget was made smaller before the first validation
            self.world.barrier()  # what is read next is there

    def is_stopped(self, signals: TrainingSignals) -> bool:
        """Whether a signal has asked any of the processes to stop."""
        (number,) = self.world.highest(signals.received or 0)
        if number:
            signals.received = Signals(int(number))
        return bool(number)

    def read_clock(self) -> None:
        """How long it took so far: rates and budgets go by the main process's clock."""
        (self.counters.minutes,) = self.world.of_main((time.monotonic() - self.started) / 60)

    def turn(self, signals: TrainingSignals) -> tuple[bool, bool]:
        """Whether all processes validate now, and whether they save."""
        is_old = time.monotonic() - self.saved_at > 60 * self.config.save_minutes
        (saves,) = self.world.highest(signals.take_save() or (is_old and self.world.is_main))
        (validates,) = self.world.of_main(self.is_time_to_validate())
        return bool(validates), bool(saves)

    def validate_and_save(self, journal: Journal) -> None:
        """A validation, and what is left of it if the process is killed at any moment.

        The steps are saved before it, so that a kill during a long one costs none of them; what it found is saved in
        `latest` first, from which `best` can be made again.
        """
        self.counters.is_validating = True
        self.save()
        is_best = self.validate(journal)
        self.counters.is_validating = False
        self.read_clock()
        self.save()
        if is_best and self.world.is_main:
            save_best(self.run, self.model, self.average, self.counters)
        if self.watch is not None:
            self.watch(self.progress(), self.last_dice)
        self.mark, self.mark_step = time.monotonic(), self.counters.step
        if self.is_out_of_patience():
            journal.say(
                f"stopping early: no validation Dice above {self.counters.best_dice:.4f} (step "
                f"{self.counters.best_step}) in the last {self.counters.stale} validations, and "
                f"trainer.patience={self.config.patience}"
            )

    def feed(self) -> Generator[BatchItem, None, None]:
        """Batches from the next step on, made ahead by a thread, on the device."""
        return on_device(self.sampler.prefetch(self.counters.step), self.device)

    def train_step(self, step: int, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """One optimizer step on a batch; returns the loss, detached and still on the device.

        Nothing in it waits for a GPU, unless trainer.on_nan_loss=skip asks what the loss is.
        """
        self.set_rates()
        # What a network draws itself (dropout) follows from (seed, step) too: no random state is to be saved.
        torch.manual_seed((self.seed * 1_000_003 + step + (self.world.rank << 40)) % 2**63)
        image, label = self.augment(image, label, step, self.sampler.indices)
        image = image.contiguous(memory_format=memory_format(self.plan.spatial_dims))
        self.optimizer.zero_grad(set_to_none=True)
        # A batch normalisation takes what it sees into its running statistics before anybody knows the loss.
        kept = [buffer.clone() for buffer in self.model.buffers()] if self.config.on_nan_loss == "skip" else []
        losses = [self.add_gradients(image, label, number) for number in range(len(self.parts))]
        loss = self.world.mean(losses[0] if len(losses) == 1 else torch.stack(losses).sum())
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        if self.config.on_nan_loss == "skip":
            # Under a loss scaler infinite gradients are its own affair: it leaves the step out and scales by less.
            told = loss if self.scaler.is_enabled() else loss + norm
            self.is_left_out = not bool(torch.isfinite(told))
        if self.is_left_out:
            for buffer, before in zip(self.model.buffers(), kept, strict=True):
                buffer.copy_(before)
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None and not self.is_left_out:
            self.average.update(step)
        return loss

    def add_gradients(self, image: torch.Tensor, label: torch.Tensor, part: int) -> torch.Tensor:
        """Add the gradients of a part of the batch, weighted by its share of it; returns its loss, so weighted."""
        (own, share), is_last = self.parts[part], part == len(self.parts) - 1
        # Padded also on the way back, where checkpointed parts are computed again
        with explicit_padding(self.device), together(self.world.group), without_sync(self.network, is_last=is_last):
            with autocast(self.device, self.precision):
                outputs = self.forward(image[own])
            loss: torch.Tensor = self.loss(outputs, label[own])
            loss = loss if share == 1 else loss * share
            torch.autograd.backward(self.scaler.scale(loss))
        return loss.detach()

    def note_loss(self, loss: torch.Tensor, journal: Journal) -> None:
        """Add the loss of a step to those that the history will hold the mean of.

        Raises:
            MedsegError: E_NAN_LOSS after `MAX_LEFT_OUT` steps in a row that were left out.
        """
        counters = self.counters
        if not self.is_left_out:
            self.recent += loss
            counters.num_losses, counters.left_out = counters.num_losses + 1, 0
            return
        counters.left_out += 1
        journal.say(f"warning    step {counters.step + 1} is left out: its loss or gradient is not finite")
        if counters.left_out >= MAX_LEFT_OUT:
            raise self._not_finite(f"the training loss was not finite {MAX_LEFT_OUT} times in a row", float(loss))

    def set_rates(self) -> None:
        """Give the optimizer what the schedule says of this moment."""
        factor, momentum = self.schedule(self.progress()), self.schedule.momentum(self.progress())
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * factor
            if momentum is not None and "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif momentum is not None and "momentum" in group:
                group["momentum"] = momentum

    def log_training(self, journal: Journal) -> None:
        """Record the mean loss of the last steps and move the bar."""
        counters = self.counters
        if not counters.num_losses:  # all were left out
            return
        loss = float(self.recent) / counters.num_losses
        self.check_finite(loss)
        seconds = max(time.monotonic() - self.mark, 1e-9)
        samples_per_s = (counters.step - self.mark_step) * self.plan.batch_size / seconds
        lr = self.optimizer.param_groups[0]["lr"]
        values = {"train_loss": loss, "lr": lr, "samples_per_s": samples_per_s}
        journal.record(counters.step, counters.minutes, values)
        dice = "" if math.isnan(self.last_dice) else f" Dice {self.last_dice:.3f}"
        journal.advance(self.progress(), f"step {counters.step} loss {loss:.3f}{dice} {samples_per_s:.1f} samples/s")
        self.recent, counters.num_losses = torch.zeros_like(self.recent), 0
        self.mark, self.mark_step = time.monotonic(), counters.step

    def check_finite(self, loss: float) -> None:
        """End the run at a loss that is not finite, before such weights are saved.

        Raises:
            MedsegError: E_NAN_LOSS.
        """
        if not math.isfinite(loss):
            raise self._not_finite("the training loss is not finite any more", loss)

    def check_weights(self) -> None:
        """End the run where an update has made weights that are not finite: the loss tells it one step later.

        Running statistics and the average of the weights are saved too, and looked at as well.

        Raises:
            MedsegError: E_NAN_LOSS.
        """
        average = {} if self.average is None else self.average.weights()
        saved = (tensor.detach() for tensor in (*self.model.state_dict().values(), *average.values()))
        floats = [tensor for tensor in saved if tensor.is_floating_point() and tensor.numel()]
        largest = float(nn.utils.get_total_norm(floats, norm_type=math.inf))  # of squares the sum may overflow
        if not math.isfinite(largest):
            raise self._not_finite("the weights are not finite any more", largest)

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

    def validate(self, journal: Journal) -> bool:
        """Whole volumes: record Dice and overlays; whether these weights are the best so far."""
        with nullcontext() if self.average is None else self.average.applied():
            return self.validate_as_is(journal)

    def validate_as_is(self, journal: Journal) -> bool:
        """`validate` with the weights that the model has."""
        started = time.monotonic()
        settings = (self.plan.patch_size, self.labels, self.loss, self.window)
        drawn = list(self.pictures.overlaid)
        result, kept = validate(self.model, self.validation, *settings, keep=drawn, world=self.world)
        counters = self.counters
        # A slow validation may skip turns that are due by now: they are done by this one.
        counters.validations = max(counters.validations + 1, int(self.progress() * self.config.num_validations + 1e-9))
        self.last_dice = result.mean
        per_class = dict(zip(self.labels.foreground, (float(v) for v in result.per_class), strict=True))
        values = {"val_loss": result.loss, DICE_PREFIX + "mean": result.mean}
        values |= {DICE_PREFIX + name: value for name, value in per_class.items()}
        journal.record(counters.step, counters.minutes, values)
        # Done again after a checkpoint was lost, the best one comes out as it was.
        is_again = (result.mean, counters.step) == (counters.best_dice, counters.best_step)
        is_best = result.mean > counters.best_dice or is_again
        counters.stale = 0 if is_best else counters.stale + 1
        if is_best:
            counters.best_dice, counters.best_step = result.mean, counters.step
        shown = ", ".join(f"{name} {value:.3f}" for name, value in list(per_class.items())[:6])
        mark = " [green]best so far[/]" if is_best else ""
        journal.say(
            f"{counters.minutes:6.1f} min  step {counters.step:>6}  validation Dice {result.mean:.4f}  ({shown}){mark}"
        )
        if self.world.is_main:
            self.pictures.draw(journal, self.model, kept, counters.step)
        self.validated_at = time.monotonic()
        self.validation_seconds = self.validated_at - started
        return is_best

    def save(self) -> None:
        """Write the latest checkpoint, and keep the one before it.

        Raises:
            MedsegError: E_NAN_LOSS in place of saving what is not finite; E_OUTPUT.
        """
        self.counters.loss_sum = float(self.recent)
        self.check_finite(self.counters.loss_sum)
        self.check_weights()
        if self.world.is_main:
            save_latest(self.run, self.model, self.optimizer, self.scaler, self.counters, self.average)
        self.saved_at = time.monotonic()
