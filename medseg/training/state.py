"""What a run must remember to go on: weights, optimizer, counters. One safetensors file, no pickles."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medseg.bundle import MODEL_PREFIX, checkpoint_path, load_weights, read_checkpoint, write_checkpoint
from medseg.errors import Code, MedsegError
from medseg.training.averaging import WeightAverage

OPTIMIZER_PREFIX = "optimizer."
TRAINED_PREFIX = "trained."
"""The weights that training goes on with, where others predict: those under `MODEL_PREFIX` are their average then."""


@dataclass
class Counters:
    """How far a run is. Batches and augmentation are functions of (seed, step), so no random state is needed."""

    step: int = 0
    """Optimizer steps done."""
    minutes: float = 0.0
    """Minutes of the loop so far, over all its sittings."""
    validations: int = 0
    """Validations done."""
    best_dice: float = -1.0
    """Best mean foreground Dice of a validation."""
    best_step: int = 0
    """The step of it."""
    stale: int = 0
    """Validations since."""


def save_best(run: Path, model: nn.Module, counters: Counters) -> None:
    """Write the weights as the best checkpoint."""
    write_checkpoint(checkpoint_path(run, "best"), _weights(model), {"counters": asdict(counters)})


def save_latest(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    counters: Counters,
    average: WeightAverage | None,
) -> None:
    """Write the weights that predict, and all that `resume` needs, as the latest checkpoint."""
    tensors = _weights(model)
    if average is not None:
        tensors = {TRAINED_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
        tensors |= {MODEL_PREFIX + name: tensor for name, tensor in average.weights().items()}
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{OPTIMIZER_PREFIX}{index}.{name}"] = value
    metadata = {"counters": asdict(counters), "param_groups": state["param_groups"], "scaler": scaler.state_dict()}
    write_checkpoint(checkpoint_path(run, "latest"), tensors, metadata)


def resume_latest(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None,
) -> Counters:
    """Put the latest checkpoint's state into model, optimizer, loss scaler and average.

    A run that had no average begins one from its weights.

    Raises:
        MedsegError: E_CHECKPOINT or E_MODEL, from reading; E_CHECKPOINT if it holds no trainer state.
    """
    path = checkpoint_path(run, "latest")
    tensors, metadata = read_checkpoint(path)
    if "param_groups" not in metadata:
        raise MedsegError(Code.CHECKPOINT, "this checkpoint holds weights only", where=path)
    load_weights(model, tensors, where=path)
    if average is not None:
        average.load(model.state_dict())
    trained = {k.removeprefix(TRAINED_PREFIX): v for k, v in tensors.items() if k.startswith(TRAINED_PREFIX)}
    if trained:
        load_weights(model, {MODEL_PREFIX + name: tensor for name, tensor in trained.items()}, where=path)
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith(OPTIMIZER_PREFIX):
            index, name = key.removeprefix(OPTIMIZER_PREFIX).split(".", 1)
            state.setdefault(int(index), {})[name] = value
    # Fused optimizers walk moments and weights side by side in memory: the moments need the weights' layout.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        moments = state.get(number, {})
        for name, value in moments.items():
            if value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(value)
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in metadata["param_groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scaler.load_state_dict(metadata["scaler"])
    return Counters(**metadata["counters"])


def read_counters(run: Path) -> Counters:
    """How far a run is, by its latest checkpoint.

    Raises:
        MedsegError: E_CHECKPOINT, from reading.
    """
    _, metadata = read_checkpoint(checkpoint_path(run, "latest"))
    return Counters(**metadata["counters"])


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
