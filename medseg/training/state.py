"""What a run must remember to go on: weights, optimizer, counters. One safetensors file, no pickles.

`latest` is what a run goes on from, and `previous` the one before it, should `latest` be damaged. `best` follows from
`latest`: it is written after it, and made from it again where a kill came in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medseg.bundle import MODEL_PREFIX, checkpoint_path, load_weights, read_checkpoint, write_checkpoint
from medseg.bundle.checkpoint import remove_leftovers
from medseg.errors import Code, MedsegError
from medseg.registry import make_config
from medseg.training.averaging import WeightAverage

OPTIMIZER_PREFIX = "optimizer."
TRAINED_PREFIX = "trained."
"""The weights that training goes on with, where others predict: those under `MODEL_PREFIX` are their average then."""
LATEST, PREVIOUS, BEST = "latest", "previous", "best"


@dataclass
class Counters:
    """How far a run is. Batches and augmentation are functions of (seed, step), so no random state is needed."""

    step: int = 0
    """Optimizer steps done."""
    minutes: float = 0.0
    """Minutes of the loop so far, over all its sittings."""
    validations: int = 0
    """Validations done."""
    best_score: float = -1.0
    """The best of a validation: of a segmentation the mean foreground Dice."""
    best_step: int = 0
    """The step of it."""
    stale: int = 0
    """Validations since."""
    is_validating: bool = False
    """A validation after this step was begun, and is not done."""
    loss_sum: float = 0.0
    """Of the training losses since the last entry in the history."""
    num_losses: int = 0
    """How many these are."""
    left_out: int = 0
    """Steps in a row, the last ones, that changed nothing because their loss was not finite."""


def predicting_weights(model: nn.Module, average: WeightAverage | None) -> Mapping[str, torch.Tensor]:
    """The weights that predict, by the names of the model's `state_dict`."""
    return model.state_dict() if average is None else average.weights()


def save_best(run: Path, model: nn.Module, average: WeightAverage | None, counters: Counters) -> None:
    """Write the weights that predict as the best checkpoint."""
    weights = {MODEL_PREFIX + name: tensor for name, tensor in predicting_weights(model, average).items()}
    write_checkpoint(checkpoint_path(run, BEST), weights, {"counters": asdict(counters)})


def save_latest(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    counters: Counters,
    average: WeightAverage | None,
) -> None:
    """Write the weights that predict, and all that `resume` needs, as the latest checkpoint; keep the one before."""
    tensors = {MODEL_PREFIX + name: tensor for name, tensor in predicting_weights(model, average).items()}
    if average is not None:
        tensors |= {TRAINED_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{OPTIMIZER_PREFIX}{index}.{name}"] = value
    metadata = {"counters": asdict(counters), "param_groups": state["param_groups"], "scaler": scaler.state_dict()}
    write_checkpoint(checkpoint_path(run, LATEST), tensors, metadata, keep=checkpoint_path(run, PREVIOUS))


def can_resume(run: Path) -> bool:
    """Whether a run has a checkpoint to go on from."""
    return any(checkpoint_path(run, name).exists() for name in (LATEST, PREVIOUS))


def resume_latest(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None,
) -> tuple[Counters, list[str]]:
    """Put the latest checkpoint's state into model, optimizer, loss scaler and average, and set the run's files right.

    A run that had no average begins one from its weights.

    Returns:
        How far the run is, and lines for the user where something was not as it should be.
    Raises:
        MedsegError: E_CHECKPOINT, E_VERSION or E_MODEL, from reading; E_CHECKPOINT if it holds no trainer state.
    """
    path, tensors, metadata, notes = _read_latest(run)
    counters = _counters_in(metadata, path)
    load_weights(model, tensors, where=path)
    if average is not None:
        average.load(model.state_dict())
    trained = {k.removeprefix(TRAINED_PREFIX): v for k, v in tensors.items() if k.startswith(TRAINED_PREFIX)}
    if trained:
        load_weights(model, {MODEL_PREFIX + name: tensor for name, tensor in trained.items()}, where=path)
    try:
        _load_optimizer(optimizer, tensors, metadata)
        scaler.load_state_dict(metadata["scaler"])
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise MedsegError(
            Code.CHECKPOINT,
            "the checkpoint's optimizer is not that of this run",
            where=path,
            got=f"{type(error).__name__}: {error}",
            remedy=f"begin a new run with these weights: trainer.initial={run}",
        ) from error
    remove_leftovers(path.parent)
    if path.stem == PREVIOUS:  # else the next save would keep the damaged one in its place
        path.replace(checkpoint_path(run, LATEST))
    best_weights = {name: tensor for name, tensor in tensors.items() if name.startswith(MODEL_PREFIX)}
    return counters, [*notes, *_settle_best(run, best_weights, counters)]


def read_counters(run: Path) -> Counters:
    """How far a run is, by its latest checkpoint, or by the previous one where that is damaged.

    Raises:
        MedsegError: E_CHECKPOINT or E_VERSION, from reading.
    """
    path, _, metadata, _ = _read_latest(run)
    return _counters_in(metadata, path)


def _read_latest(run: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """The latest checkpoint that is whole: where it lies, its tensors and metadata, and what is to be said of it."""
    path, previous = checkpoint_path(run, LATEST), checkpoint_path(run, PREVIOUS)
    try:
        return path, *read_checkpoint(path), []
    except MedsegError as error:
        if not previous.exists():
            raise
        try:
            tensors, metadata = read_checkpoint(previous)
        except MedsegError as other:
            for found in (error, other):
                if found.code is Code.VERSION:
                    raise found from None
            raise MedsegError(
                Code.CHECKPOINT,
                "the latest checkpoint and the previous one are both damaged",
                where=path,
                got=error.got,
                remedy=f"begin a new run with the best weights so far: trainer.initial={run}",
            ) from error
        step = metadata.get("counters", {}).get("step")
        # Another version's SHA-256 may be of other things: a flipped bit in the format looks like its checkpoint.
        what = error.message.replace("the checkpoint", "the latest checkpoint")
        if error.code is Code.VERSION:
            what = "the latest checkpoint is damaged, or of another version of medseg"
        note = f"warning    {what}; going on from the one before it, of step {step}"
        return previous, tensors, metadata, [note]


def _counters_in(metadata: Mapping[str, Any], path: Path) -> Counters:
    if "param_groups" not in metadata:
        raise MedsegError(
            Code.CHECKPOINT,
            "this checkpoint holds weights only",
            where=path,
            expected="weights, optimizer and counters",
            remedy="begin a new run with these weights: trainer.initial=RUN",
        )
    try:
        return make_config(Counters, metadata["counters"], where="counters")  # with types checked
    except (MedsegError, KeyError, AttributeError) as error:
        raise MedsegError(
            Code.CHECKPOINT, "the checkpoint's counters cannot be read", where=path, got=f"{error}"
        ) from error


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """Put moments and settings into an optimizer."""
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


def _settle_best(run: Path, weights: Mapping[str, torch.Tensor], counters: Counters) -> list[str]:
    """See that the best checkpoint is the one that the counters name, and the counters those of the one that is there.

    Args:
        run: the run.
        weights: what predicts after the step of the counters, under `MODEL_PREFIX`.
        counters: of the checkpoint that the run goes on from; set right in place.
    Returns:
        Lines for the user.
    """
    path = checkpoint_path(run, BEST)
    try:
        found = make_config(Counters, read_checkpoint(path)[1]["counters"], where="counters")
    except (MedsegError, KeyError, AttributeError):  # it is not there, damaged, or was not written by a training
        found = Counters()
    if found.best_score >= counters.best_score:
        # Later than the checkpoint that the run goes on from, if that is an earlier one: better is kept.
        counters.best_score, counters.best_step = found.best_score, found.best_step
        return []
    if counters.best_step == counters.step and not counters.is_validating:
        write_checkpoint(path, weights, {"counters": asdict(counters)})  # killed between the two
        return []
    counters.best_score, counters.best_step = found.best_score, found.best_step
    return ["warning    the best checkpoint is missing or damaged: the best one from here on takes its place"]
