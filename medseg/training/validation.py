"""Whole volumes through the network: the periodic validation on what the network sees, and the final one on the
scans' own grids."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from medseg.bundle import BundleInfo
from medseg.data.cases import Case, load_image, load_label_values
from medseg.data.prepared import PreparedCase, cut
from medseg.data.splits import patients_of
from medseg.formats import STRICT, Reading, open_label, write_label
from medseg.formats.label_table import written_names
from medseg.inference.folder import label_name, write_predictions_table
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import WindowConfig, sliding_window_logits
from medseg.labels import Labels
from medseg.losses.deep_supervision import centre_crop
from medseg.metrics.case import measure_case
from medseg.metrics.masks import State
from medseg.models import SegmentationModel
from medseg.models.compiling import Forward
from medseg.reports.evaluation import Evaluation, Row, evaluate_pair
from medseg.reports.extremes import extremes
from medseg.training.distributed import World, divide

FINAL_FOLDER = "validation"


@dataclass(frozen=True)
class ValidationResult:
    """Dice of the validation cases on the network's own grid.

    Args:
        dice: per case, one value per foreground class or region; NaN where reference and prediction are both empty.
        losses: the loss of one patch of each case.
    """

    dice: dict[str, tuple[float, ...]]
    losses: dict[str, float]

    @property
    def loss(self) -> float:
        """Mean loss of one patch per case."""
        return float(np.mean(list(self.losses.values())))

    @property
    def per_class(self) -> np.ndarray:
        """Mean over cases for each class, NaN where no case has it."""
        return _mean(np.array(list(self.dice.values()), dtype=float), axis=0)

    @property
    def mean(self) -> float:
        """Mean over cases of the mean over their classes."""
        per_case = _mean(np.array(list(self.dice.values()), dtype=float), axis=1)
        return float(np.nan_to_num(_mean(per_case, axis=0)))


def validate(
    model: SegmentationModel,
    cases: Sequence[PreparedCase],
    patch_size: tuple[int, ...],
    labels: Labels,
    loss: torch.nn.Module,
    config: WindowConfig,
    *,
    keep: Sequence[str] = (),
    world: World | None = None,
) -> tuple[ValidationResult, dict[str, np.ndarray]]:
    """Predict whole prepared cases by sliding window. Of several processes each predicts some, and all get one result.

    Args:
        model: put into eval mode for it, and back.
        cases: with labels.
        patch_size: the tile.
        labels: the classes.
        loss: applied to the middle tile of each case, as a comparison with the training loss.
        config: tiling.
        keep: ids of cases whose predictions are returned, for pictures; the main process has them.
        world: the processes.
    Returns:
        The result, and the kept predictions (uint8 class indices, as the case's prepared label).
    """
    world = world or World()
    first = [number for number, case in enumerate(cases) if case.case_id in keep]
    own = divide([case.label.numel() for case in cases], world.size, first)[world.rank]
    result, kept = _predict(model, [cases[i] for i in own], patch_size, labels, loss, config, keep)
    dice: dict[str, Sequence[float]] = {}
    losses: dict[str, float] = {}
    for own_dice, own_losses in world.gather([result.dice, result.losses]):
        dice, losses = dice | own_dice, losses | own_losses
    ids = [case.case_id for case in cases]
    return ValidationResult({i: tuple(dice[i]) for i in ids}, {i: losses[i] for i in ids}), kept


def _predict(
    model: SegmentationModel,
    cases: Sequence[PreparedCase],
    patch_size: tuple[int, ...],
    labels: Labels,
    loss: torch.nn.Module,
    config: WindowConfig,
    keep: Sequence[str],
) -> tuple[ValidationResult, dict[str, np.ndarray]]:
    """`validate` in one process."""
    was_training = model.training
    model.eval()
    dice: dict[str, tuple[float, ...]] = {}
    losses: dict[str, float] = {}
    kept: dict[str, np.ndarray] = {}
    forward = Forward(model, compiled=False, must=False)
    for case in cases:
        logits = sliding_window_logits(model, case.image, patch_size, labels.num_outputs, config, forward=forward)
        predicted = labels.decode(logits).cpu().numpy()
        results = measure_case(
            predicted,
            case.label.numpy(),
            case.grid,
            num_classes=labels.num_classes,
            regions=labels.regions,
            names=["dice"],
        )
        dice[case.case_id] = tuple(r.values["dice"] for r in results)
        size = tuple(min(p, s) for p, s in zip(patch_size, logits.shape[1:], strict=True))
        start = [(s - n) // 2 for s, n in zip(logits.shape[1:], size, strict=True)]
        middle = cut(logits, start, size)[None]
        losses[case.case_id] = float(loss(middle, centre_crop(case.label, size)[None].to(logits.device)))
        if case.case_id in keep:
            kept[case.case_id] = predicted
    model.train(was_training)
    return ValidationResult(dice, losses), kept


def final_validation(
    run: Path,
    predictor: Predictor,
    cases: Sequence[Case],
    labels: Labels,
    reading: Reading = STRICT,
    progress: Callable[[int, int], None] | None = None,
    world: World | None = None,
) -> Evaluation | None:
    """Predict the validation cases from their files, onto their own grids; write labels, metrics and pictures.

    Everything lands in `run/validation/`: one label file per case, metrics.csv, summary.csv, metrics.json and
    overlays of the worst, the median and the best case. Of several processes each predicts some of the cases.

    Returns:
        The evaluation; None but for the main process.
    """
    world = world or World()
    folder = run / FINAL_FOLDER
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)  # a resumed run may validate others best and worst
        (folder / "overlays").mkdir(parents=True)
    world.barrier()
    channels = predictor.bundle.info.channels
    rows: list[Row] = []
    frame = ""
    own = cases[world.rank :: world.size]
    for done, case in enumerate(own, start=1):
        image = load_image(case, channels=channels, reading=reading)
        predicted = predictor.predict(image)
        write_label(folder / label_name(case.case_id, image), predicted, written_names(labels))
        reference = load_label_values(case, image.grid, reading)
        rows += evaluate_pair(predicted, reference, labels, case=case.case_id)
        frame = image.grid.frame
        if progress is not None:
            progress(done, len(own))
    rows, frame = _rows_of_all(rows, frame, cases, world)
    if not world.is_main:
        return None
    write_predictions_table(folder, labels)
    evaluation = Evaluation(tuple(rows), labels, frame=frame, patients=patients_of(cases))
    evaluation.write(folder)
    _draw_extremes(folder, evaluation, {case.case_id: case for case in cases}, predictor.bundle.info, reading)
    return evaluation


def _rows_of_all(rows: list[Row], frame: str, cases: Sequence[Case], world: World) -> tuple[list[Row], str]:
    """The rows of all processes in the order of the cases, and the unit, which one without cases does not know."""
    if world.size == 1:
        return rows, frame
    plain = [[row.case, row.class_name, row.state, row.values] for row in rows]
    gathered = world.gather([plain, frame])
    order = {case.case_id: number for number, case in enumerate(cases)}
    found = [Row(case, name, State(state), values) for rows, _ in gathered for case, name, state, values in rows]
    return sorted(found, key=lambda row: order[row.case]), next((unit for _, unit in gathered if unit), "")


def _draw_extremes(
    folder: Path, evaluation: Evaluation, cases: Mapping[str, Case], info: BundleInfo, reading: Reading
) -> None:
    from medseg.reports.overlay import save_overlay  # matplotlib: the first step need not wait for it

    num_ranked = sum(not np.isnan(mean) for mean in evaluation.case_means("dice").values())
    for name, case_id in extremes(evaluation).items():
        case = cases[case_id]
        image = load_image(case, channels=info.channels, reading=reading)
        save_overlay(
            folder / "overlays" / f"{name}_{case.case_id}.png",
            image,
            labels=info.labels,
            reference=load_label_values(case, image.grid, reading),
            predicted=open_label(folder / label_name(case.case_id, image)),
            title=f"{case.case_id} ({name} of {num_ranked})",
        )


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean that leaves NaN out; NaN where nothing is left, without a warning."""
    present = ~np.isnan(values)
    count = present.sum(axis)
    total = np.where(present, values, 0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
