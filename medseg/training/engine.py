"""Steps and validations until the budget is used up, whatever is learnt: budget, clock, signals, checkpoints, averages,
precision, processes, history."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import nn

from medseg.bundle import checkpoint_path
from medseg.data.sampling import BatchItem
from medseg.device import choose_precision, explicit_padding, keep_freed_memory
from medseg.inference.sliding_window import autocast, memory_format
from medseg.losses.processes import together
from medseg.models.compiling import Forward
from medseg.program import command
from medseg.training.averaging import WeightAverage
from medseg.training.compiling import wants_compiling
from medseg.training.distributed import World, without_sync
from medseg.training.feeding import on_device
from medseg.training.finite import check_weights, not_finite
from medseg.training.journal import Journal
from medseg.training.optimizers import OPTIMIZERS
from medseg.training.schedules import SCHEDULES, Schedule
from medseg.training.signals import TrainingSignals
from medseg.training.state import Counters, can_resume, resume_latest, save_best, save_latest
from medseg.training.trainer import TrainerConfig

VALIDATION_SHARE = 0.2
"""Largest share of a time budget that validations may take."""
MAX_LEFT_OUT = 20
"""Steps in a row whose loss is not finite, after which trainer.on_nan_loss=skip gives up: a bad case now and then is
not drawn that often."""
Watch = Callable[[float, float], None]
"""Told of each validation: the share of the budget that is used, and the score. What it raises ends the run."""


@dataclass(frozen=True)
class Score:
    """What a validation found.

    Args:
        value: decides which weights are the best: between -1 and 1, larger is better.
        columns: what history.csv gets, by its columns; `val_loss` among them.
        said: the same in words, for the user.
        shown: what the user reads in place of the value; None: the value.
    """

    value: float
    columns: Mapping[str, float]
    said: str
    shown: float | None = None


class Engine(ABC):
    """Steps and validations until the budget of steps or minutes is used up. What is learnt is said by a subclass:
    `loss`, which it sets, and the methods that are abstract here.

    Args:
        config: budget, precision, saving, …
        run: the run's folder.
        model: on its device.
        device: that one.
        optimizer: name and settings.
        schedule: the same.
        seed: of everything random.
        batch_size: samples of a batch over all processes.
        spatial_dims: of the images.
        resumes: go on from the run's latest checkpoint, if there is one.
        parameters: what is trained, or groups of it with `lr` of their own; None: all of the model.
        world: the processes.
    Raises:
        MedsegError: E_CONFIG for settings that do not fit; what reading a checkpoint refuses.
    """

    loss: nn.Module
    """Of (outputs, targets)."""
    score_name: str
    """Of the value of a `Score`, as the user reads it."""
    watch: Watch | None = None

    def __init__(
        self,
        config: TrainerConfig,
        run: Path,
        model: nn.Module,
        device: torch.device,
        *,
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any],
        seed: int,
        batch_size: int,
        spatial_dims: int,
        resumes: bool,
        parameters: Iterable[Any] | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self.config, self.run, self.model, self.device, self.seed = config, run, model, device, seed
        self.batch_size = batch_size
        self.memory_format = memory_format(spatial_dims)
        self.precision = choose_precision(config.precision, device)
        self.parts = self.world.share_batch(batch_size, config.accumulate)
        self.notes: list[str] = []
        trained = list(model.parameters() if parameters is None else parameters)
        self.optimizer = OPTIMIZERS.build(optimizer, parameters=trained)
        self.schedule: Schedule = SCHEDULES.build(schedule)
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.average = None if config.ema is None else WeightAverage(model, config.ema)
        is_compiled = wants_compiling(config.compile, device, steps=config.steps, minutes=config.minutes)
        self.network = self.world.network(model, device)
        self.forward = Forward(self.network, compiled=is_compiled, must=config.compile == "on")
        if device.type == "cpu":
            keep_freed_memory()
        self.counters = Counters()
        if self.world.told(resumes and can_resume(run)):  # files may change their names meanwhile
            self.counters, notes = self.world.main_first(
                lambda: resume_latest(run, model, self.optimizer, self.scaler, self.average)
            )
            self.notes += notes
            if not self.counters.is_validating:
                # A larger budget moves the evenly spread validations: those due by now count as done.
                self.counters.validations = int(self.progress() * config.num_validations + 1e-9)
        self.recent = torch.full((), self.counters.loss_sum, device=device)
        self.is_left_out, self.last_score = False, math.nan
        self.validated_at, self.validation_seconds = time.monotonic(), 0.0
        self.saved_at = time.monotonic()

    @abstractmethod
    def columns(self) -> list[str]:
        """Columns of history.csv, after those of step and minutes."""

    @abstractmethod
    def batches(self, first_step: int) -> Generator[BatchItem, None, None]:
        """(step, images, targets) from a step on, in the computer's memory: functions of (seed, step)."""

    def vary(self, image: torch.Tensor, target: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch on the device, as a function of (seed, step)."""
        return image, target

    @abstractmethod
    def measure(self, journal: Journal) -> Score:
        """A validation, with the weights that predict."""

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
                step, image, target = next(batches)
                self.note_loss(self.train_step(step, image, target), journal)
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
            self.watch(self.progress(), self.last_score)
        self.mark, self.mark_step = time.monotonic(), self.counters.step
        if self.is_out_of_patience():
            journal.say(
                f"stopping early: no validation {self.score_name} above {self.counters.best_score:.4f} "
                f"(step {self.counters.best_step}) in the last {self.counters.stale} validations, and "
                f"trainer.patience={self.config.patience}"
            )

    def feed(self) -> Generator[BatchItem, None, None]:
        """Batches from the next step on, on the device."""
        return on_device(self.batches(self.counters.step), self.device)

    def train_step(self, step: int, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One optimizer step on a batch; returns the loss, detached and still on the device.

        Nothing in it waits for a GPU, unless trainer.on_nan_loss=skip asks what the loss is.
        """
        self.set_rates()
        # What a network draws itself (dropout) follows from (seed, step) too: no random state is to be saved.
        torch.manual_seed((self.seed * 1_000_003 + step + (self.world.rank << 40)) % 2**63)
        image, target = self.vary(image, target, step)
        image = image.contiguous(memory_format=self.memory_format)
        self.optimizer.zero_grad(set_to_none=True)
        # A batch normalisation takes what it sees into its running statistics before anybody knows the loss.
        kept = [buffer.clone() for buffer in self.model.buffers()] if self.config.on_nan_loss == "skip" else []
        losses = [self.add_gradients(image, target, number) for number in range(len(self.parts))]
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

    def add_gradients(self, image: torch.Tensor, target: torch.Tensor, part: int) -> torch.Tensor:
        """Add the gradients of a part of the batch, weighted by its share of it; returns its loss, so weighted."""
        (own, share), is_last = self.parts[part], part == len(self.parts) - 1
        # Padded also on the way back, where checkpointed parts are computed again
        with explicit_padding(self.device), together(self.world.group), without_sync(self.network, is_last=is_last):
            with autocast(self.device, self.precision):
                outputs = self.forward(image[own])
            loss: torch.Tensor = self.loss(outputs, target[own])
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
            raise not_finite(
                f"the training loss was not finite {MAX_LEFT_OUT} times in a row", float(loss), counters.step
            )

    def set_rates(self) -> None:
        """Give the optimizer what the schedule says of this moment."""
        factor, momentum = self.schedule(self.progress()), self.schedule.momentum(self.progress())
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
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
        samples_per_s = (counters.step - self.mark_step) * self.batch_size / seconds
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        values = {"train_loss": loss, "lr": lr, "samples_per_s": samples_per_s}
        journal.record(counters.step, counters.minutes, values)
        score = "" if math.isnan(self.last_score) else f" {self.score_name} {self.last_score:.3f}"
        journal.advance(self.progress(), f"step {counters.step} loss {loss:.3f}{score} {samples_per_s:.1f} samples/s")
        self.recent, counters.num_losses = torch.zeros_like(self.recent), 0
        self.mark, self.mark_step = time.monotonic(), counters.step

    def check_finite(self, loss: float) -> None:
        """End the run at a loss that is not finite, before such weights are saved.

        Raises:
            MedsegError: E_NAN_LOSS.
        """
        if not math.isfinite(loss):
            raise not_finite("the training loss is not finite any more", loss, self.counters.step)

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
        """Measure and record; whether these weights are the best so far."""
        with nullcontext() if self.average is None else self.average.applied():
            return self.validate_as_is(journal)

    def validate_as_is(self, journal: Journal) -> bool:
        """`validate` with the weights that the model has."""
        started = time.monotonic()
        found = self.measure(journal)
        counters = self.counters
        # A slow validation may skip turns that are due by now: they are done by this one.
        counters.validations = max(counters.validations + 1, int(self.progress() * self.config.num_validations + 1e-9))
        self.last_score = shown = found.value if found.shown is None else found.shown
        journal.record(counters.step, counters.minutes, found.columns)
        # Done again after a checkpoint was lost, the best one comes out as it was.
        is_again = (found.value, counters.step) == (counters.best_score, counters.best_step)
        is_best = found.value > counters.best_score or is_again
        counters.stale = 0 if is_best else counters.stale + 1
        if is_best:
            counters.best_score, counters.best_step = found.value, counters.step
        mark = " [green]best so far[/]" if is_best else ""
        journal.say(
            f"{counters.minutes:6.1f} min  step {counters.step:>6}  validation {self.score_name} {shown:.4f}  "
            f"({found.said}){mark}"
        )
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
        check_weights(self.model, self.average, self.counters.step)
        if self.world.is_main:
            save_latest(self.run, self.model, self.optimizer, self.scaler, self.counters, self.average)
        self.saved_at = time.monotonic()
