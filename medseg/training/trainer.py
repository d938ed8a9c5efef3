"""What every training states of its loop, whatever it learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from medseg.device import Determinism
from medseg.errors import Code, MedsegError

DEFAULT_MAX_STEPS = 20_000
"""Steps of a training that states no budget at all."""


@dataclass(frozen=True)
class TrainerConfig:
    """The loop."""

    positive: ClassVar[tuple[str, ...]] = (
        "max_steps",
        "max_minutes",
        "num_validations",
        "patience",
        "devices",
        "accumulate",
        "log_steps",
    )
    """Keys that must be above 0 where they are set."""

    max_steps: int | None = None
    """Optimizer steps; null with no time budget means 20000."""
    max_minutes: float | None = None
    """Time budget of the loop with its validations, in minutes; the schedule then runs over time. Whichever of both
    ends first counts."""
    num_validations: int = 10
    """Validations, evenly spread over the training; the last one is at its end. Under a time budget there are fewer
    where they would take more than a fifth of it."""
    patience: int | None = None
    """Stop early after this many validations in a row without a better score (of a segmentation: the Dice on whole
    volumes); null never stops early. The weights of the best validation are kept either way. A score that falls while
    the training loss still does may want more variation: augment=strong."""
    ema: float | None = 0.999
    """Predict with an exponential moving average of the weights: the share of it that remains at each step, shorter
    at the beginning; null predicts with the weights of the last step."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the network; auto: in long trainings on CUDA."""
    gradient_clip: float = 12.0
    """Largest norm of the gradient."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    devices: int = 1
    """Processes of this machine that train together, each on a GPU of its own where there are GPUs; they share
    the plan's batch, so the result is that of one process. torchrun starts them on several machines."""
    accumulate: int = 1
    """Parts that a batch is computed in one after the other, for batches that do not fit into the memory at once; their
    gradients are added up. What a loss forms over the batch (Dice) is then formed over each part."""
    precision: str = "auto"
    """auto (bf16 where the processor has it), bf16, fp16 or fp32."""
    on_nan_loss: Literal["stop", "skip"] = "stop"
    """What a training loss that is not finite does: end the run, or leave that step out and go on (20 in a row end it).
    Skipping makes a GPU wait at each step. Such weights are never saved either way."""
    deterministic: Determinism = "off"
    """Whether the same seed gives the same weights, bit for bit, on a GPU too: strict takes deterministic algorithms
    and refuses operations that have none, and time budgets; warn goes on with a warning; off is the fastest. CPUs need
    none of it (docs/reproducibility.md)."""
    save_minutes: float = 5.0
    """The latest checkpoint is written at least this often, and before and after each validation; also when the process
    gets SIGUSR1, and when SIGTERM or Ctrl-C end it. The one before it is kept, should it be damaged."""
    log_steps: int = 10
    """Steps between entries of the training loss."""

    def __post_init__(self) -> None:
        for name in self.positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise MedsegError(Code.CONFIG, "must be positive", where=f"trainer.{name}", got=value)
        if self.ema is not None and not 0 < self.ema < 1:
            raise MedsegError(
                Code.CONFIG, "a decay lies between 0 and 1", where="trainer.ema", expected="such as 0.999", got=self.ema
            )
        if self.deterministic == "strict" and self.max_minutes is not None:
            raise MedsegError(
                Code.CONFIG,
                "a training by the clock is never the same twice",
                where="trainer.deterministic=strict",
                got=f"trainer.max_minutes={self.max_minutes:g}",
                remedy="set trainer.max_steps instead",
            )

    @property
    def steps(self) -> float:
        """Budget in steps; infinite where only time bounds it."""
        if self.max_steps is not None:
            return self.max_steps
        return DEFAULT_MAX_STEPS if self.max_minutes is None else float("inf")

    @property
    def minutes(self) -> float:
        """Budget in minutes; infinite where only steps bound it."""
        return float("inf") if self.max_minutes is None else self.max_minutes
