"""What TensorBoard shows of a run beside its curves: overlays, filters, feature maps, how far the result moves with the
image, histograms, hyper-parameters, and a projector of what the network makes of each case.

Nothing here changes a training: the network is looked at in eval mode, and no random number is drawn.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from medseg.bundle import BundleInfo, load_bundle
from medseg.data.prepared import PreparedCase
from medseg.errors import MedsegError
from medseg.explain.equivariance import shift_table
from medseg.explain.layers import layer_table
from medseg.explain.maps import MapPlaces, feature_maps, first_filters, map_of, map_places, plane
from medseg.explain.pictures import filter_grid, image_grid, map_grid, thumbnail
from medseg.explain.tile import start_around
from medseg.explain.tracing import evaluating
from medseg.inference.sliding_window import autocast
from medseg.models import SegmentationModel
from medseg.reports.evaluation import Evaluation
from medseg.training.experiment import Experiment, SegmentationTrainerConfig, without_places
from medseg.training.journal import TENSORBOARD_FOLDER, Journal
from medseg.volume import Volume

MAX_MAPS = 16
"""Maps of a layer in one picture: TensorBoard keeps those of each validation."""
THUMBNAIL = 48
"""Pixels along the side of a case's picture in the projector."""
EMBEDDING_SECONDS = 30.0
"""Most that the projector's vectors may take: beyond it cases are left out."""
EMBEDDING = "bottleneck"
"""Name of the vectors in the projector."""
HYPERPARAMETERS = ("model", "loss", "optimizer", "schedule", "augment", "trainer")
"""Groups of the configuration that the table of hyper-parameters has, besides the plan, the fold and the seed."""
UNDRAWN = (MedsegError, RuntimeError, TypeError, ValueError, IndexError)
"""What a network of somebody's own may raise where it cannot be followed. A picture must not end a run."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Patch:
    """A piece of a case as the network sees it in training.

    Args:
        image: shape (C, *patch_size).
        share: where along the first axis the middle of the structure lies, as a share; None in 2D.
    """

    image: Tensor
    share: float | None


class Pictures:
    """Draws what TensorBoard gets at each validation.

    Args:
        config: how much of it.
        info: what the model is.
        training: cases that train.
        validation: cases that validate; some of them are the fixed ones.
        device: where the network is.
        precision: what it predicts in.
    """

    def __init__(
        self,
        config: SegmentationTrainerConfig,
        info: BundleInfo,
        training: Sequence[PreparedCase],
        validation: Sequence[PreparedCase],
        device: torch.device,
        precision: str,
    ) -> None:
        self.config, self.info, self.device, self.precision = config, info, device, precision
        self.training, self.validation = training, validation
        self.overlaid = {case.case_id: case for case in spread(validation, config.overlay_cases)}
        self._mapped = {
            case.case_id: patch_of(case, info.plan.patch_size) for case in spread(validation, config.map_cases)
        }
        self._moving = next(iter(spread(validation, config.map_cases)), None)
        self._places: MapPlaces | None = None

    def draw(self, journal: Journal, model: SegmentationModel, predicted: Mapping[str, np.ndarray], step: int) -> None:
        """Everything that a validation shows.

        Args:
            journal: where to.
            model: with the weights that were validated.
            predicted: class indices of the cases in `overlaid`.
            step: of the training.
        """
        for case_id, case in self.overlaid.items():
            if case_id in predicted:
                journal.picture(f"validation/{case_id}", self._overlay(case, predicted[case_id]), step)
        if self._mapped:
            try:
                self._draw_inside(journal, model, step)
            except UNDRAWN as error:
                journal.say(f"no feature maps for TensorBoard: {str(error).splitlines()[0]}")
                self._mapped = {}
        if self.config.histograms:
            for name, weight in model.named_parameters():
                journal.board.add_histogram(f"weights/{name}", weight.detach().float().cpu().numpy(), step)

    def _overlay(self, case: PreparedCase, predicted: np.ndarray) -> np.ndarray:
        # Here, for matplotlib takes half a second of imports, and the first step need not wait for it
        from medseg.reports.overlay import figure_to_array, overlay_figure

        labels = self.info.labels
        figure = overlay_figure(
            Volume(case.image.numpy(), case.grid),
            reference=Volume(labels.to_values(case.label.numpy()), case.grid),
            predicted=Volume(labels.to_values(predicted), case.grid),
            labels=labels,
            title=case.case_id,
        )
        return figure_to_array(figure)

    def _draw_inside(self, journal: Journal, model: SegmentationModel, step: int) -> None:
        """The first filters, and the maps of the fixed cases: early, coarsest and last."""
        is_first = self._places is None
        places = self._places = self._places or map_places(model, layer_table(model, self.info.plan.patch_size))
        try:
            name, weights = first_filters(model)
        except MedsegError:  # a transformer cuts the image into pieces
            pass
        else:
            journal.picture(f"filters/{name}", filter_grid(weights), step)
        wanted = (*places.stages[:1], places.coarsest, places.before_scores)
        layers = tuple(dict.fromkeys(name for name in wanted if name))
        for case_id, patch in self._mapped.items():
            if is_first:
                journal.picture(f"maps/{case_id}/image", image_grid(plane(patch.image, patch.share)), step)
            with autocast(self.device, self.precision):
                maps = feature_maps(model, patch.image.to(self.device), layers)
            for name, found in maps.items():
                picture = map_grid(torch.nan_to_num(plane(found, patch.share)[:MAX_MAPS].float()))
                journal.picture(f"maps/{case_id}/{name}", picture, step)
        if self._moving is not None:
            for voxels, share in self._equivariance(model, self._moving).items():
                journal.board.add_scalar(f"equivariance/moved by {voxels}", share, step)

    def _equivariance(self, model: SegmentationModel, case: PreparedCase) -> dict[int, float]:
        """How much of the result moves with the patch: voxels along the last axis → share of the voxels, far from the
        borders, that keep their class. Strides leave only multiples of the divisor exact."""
        size, step = self.info.plan.patch_size, model.divisor[-1]
        shifts = [n for n in sorted({1, step}) if n < model.output_size(size)[-1]]
        room = (*size[:-1], size[-1] + step)
        image, _ = case.cut(start_around(_place_of(case), room, case.shape), room)
        along_last = [(*(0 for _ in size[1:]), n) for n in shifts]
        overlapping = bool(self.info.labels.regions)
        with autocast(self.device, self.precision):
            found = shift_table(model, image.to(self.device), size, along_last, overlapping=overlapping)
        return {n: shift.agreement_middle for n, shift in zip(shifts, found, strict=True)}


def spread(cases: Sequence[T], number: int) -> list[T]:
    """At most so many of them, evenly over their order."""
    return list(cases[:: max(1, len(cases) // max(1, number))][:number])


def patch_of(case: PreparedCase, size: tuple[int, ...]) -> Patch:
    """The patch of a case around a voxel of its most frequent structure; around its middle where it has none."""
    place = _place_of(case)
    start = start_around(place, size, case.shape)
    image, _ = case.cut(start, size)
    return Patch(image, (place[0] - start[0] + 0.5) / size[0] if len(size) == 3 else None)


def _place_of(case: PreparedCase) -> list[int]:
    """A voxel of its most frequent structure; the middle where it has none."""
    largest = max(case.locations[1:], key=len, default=())
    middle = largest[len(largest) // 2] if len(largest) else [n // 2 for n in case.shape]
    return [int(i) for i in middle]


def conclude_board(
    run: Path,
    experiment: Experiment,
    info: BundleInfo,
    pictures: Pictures,
    evaluation: Evaluation | None,
    *,
    best_dice: float,
    console: Console,
) -> None:
    """What TensorBoard gets at the end: the run's row in the table of hyper-parameters, and the projector.

    Args:
        run: its folder, with its best checkpoint.
        experiment: what states the run.
        info: what its model is.
        pictures: the cases.
        evaluation: the final validation; None if it was not asked for.
        best_dice: best mean Dice of a validation in training.
        console: where the user reads.
    """
    scores = {"best validation Dice": best_dice}
    dice: Mapping[str, float] = {}
    if evaluation is not None:
        dice = {case: mean for case, mean in evaluation.case_means("dice").items() if not math.isnan(mean)}
        scores["Dice"] = evaluation.mean("dice")
    with SummaryWriter(str(run / TENSORBOARD_FOLDER)) as board:
        write_hyperparameters(board, experiment, info, scores)
        if not experiment.trainer.embedding_cases:
            return
        try:
            model = load_bundle(run, device=pictures.device).model
            write_embeddings(board, model, pictures, dice, number=experiment.trainer.embedding_cases)
        except UNDRAWN as error:
            said = f"no projector for TensorBoard: {str(error).splitlines()[0]}"
            console.print(said, highlight=False, soft_wrap=True, markup=False)


@torch.no_grad()
def write_embeddings(
    board: SummaryWriter, model: SegmentationModel, pictures: Pictures, dice: Mapping[str, float], *, number: int
) -> int:
    """What the network makes of each case at its coarsest, for TensorBoard's projector: the mean of the maps.

    Args:
        board: the run's events; an earlier projector in their folder goes.
        model: with the weights to look through, on the device.
        pictures: the cases, validation first.
        dice: of the cases that have one, by id.
        number: most cases.
    Returns:
        How many were looked at; with fewer than two nothing is written.
    """
    started, size = time.monotonic(), pictures.info.plan.patch_size
    layer = map_places(model, layer_table(model, size)).coarsest
    sides = [("validation", case) for case in spread(pictures.validation, number)]
    sides += [("training", case) for case in spread(pictures.training, number - len(sides))]
    vectors, rows, thumbnails = [], [], []
    for side, case in sides:
        if time.monotonic() - started > EMBEDDING_SECONDS:
            break
        patch = patch_of(case, size)
        with evaluating(model), autocast(pictures.device, pictures.precision):
            maps = map_of(model, patch.image[None].to(pictures.device), layer)
        vectors.append(maps[0].float().flatten(1).mean(dim=1).cpu())
        rows.append([case.case_id, side, f"{dice[case.case_id]:.4f}" if case.case_id in dice else ""])
        thumbnails.append(thumbnail(plane(patch.image, patch.share), THUMBNAIL))
    if len(vectors) < 2:
        return len(vectors)
    for earlier in Path(board.log_dir).glob(f"*/{EMBEDDING}"):
        shutil.rmtree(earlier)
    images = torch.from_numpy(np.stack(thumbnails)).permute(0, 3, 1, 2).float() / 255
    try:
        board.add_embedding(torch.stack(vectors), rows, images, 0, EMBEDDING, ["case", "side", "Dice"])
    except BaseException:  # TensorBoard writes its files piece by piece: on a full disk half a picture would stay
        for unfinished in Path(board.log_dir).glob(f"*/{EMBEDDING}"):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return len(vectors)


def write_hyperparameters(
    board: SummaryWriter, experiment: Experiment, info: BundleInfo, scores: Mapping[str, float]
) -> None:
    """The run's row in TensorBoard's table of hyper-parameters; the runs of a sweep stand there together.

    Args:
        board: the run's events.
        experiment: what states it.
        info: what its model is.
        scores: at the end, by name; what is not finite is left out.
    """
    scores = {f"Final/{name}": value for name, value in scores.items() if math.isfinite(value)}
    # Not the first summary: it describes all runs, and each would write it for itself. Without it TensorBoard looks at
    # the runs that are there and puts the keys in which they differ in front.
    _, *of_this_run = hparams(hyperparameters(experiment, info), scores)  # type: ignore[no-untyped-call]
    for summary in of_this_run:
        board._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
    for name, value in scores.items():
        board.add_scalar(name, value, 0)


def hyperparameters(experiment: Experiment, info: BundleInfo) -> dict[str, str | float]:
    """The keys of a configuration that a sweep may vary, and what was planned.

    Lists and what is not set are texts; places on the machine are not among them.
    """
    values, _ = without_places(experiment)
    plan = info.plan
    found: dict[str, str | float] = {
        "fold": experiment.fold,
        "seed": experiment.seed,
        "plan.patch_size": "×".join(str(n) for n in plan.patch_size),
        "plan.batch_size": plan.batch_size,
        "plan.spacing": "×".join(f"{s:.4g}" for s in plan.spacing_mm),
    }
    for group in HYPERPARAMETERS:
        found = {**found, **_flat(values[group], group)}
    return found


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, str | float]:
    found: dict[str, str | float] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}"
        if isinstance(value, Mapping):
            found |= _flat(value, key)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = value
        else:
            found[key] = "none" if value is None else str(value)
    return found
