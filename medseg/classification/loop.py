"""Learning to classify: batches of whole images, their augmentation, the loss, and validations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medseg.classification.bundle import ClassifierInfo
from medseg.classification.experiment import ClassificationExperiment
from medseg.data.augment import AugmentConfig, Augmenter, Mirroring
from medseg.data.sampling import BatchItem
from medseg.inference.sliding_window import autocast
from medseg.metrics.classification import confusion, macro_auc, summarise
from medseg.models.classifiers import ClassificationModel
from medseg.training.engine import Engine, Score
from medseg.training.journal import Journal
from medseg.training.optimizers import learning_rate

TURN_DEGREES = 15.0
"""Largest angle that images are turned by, unless augment.rotation_degrees says otherwise: whole images have an up."""
TIE_SHARE = 1e-5
"""Of the loss in the score: it decides where all images are told apart, or as many as before."""
SCORES = {"auc": "AUC", "balanced_accuracy": "balanced accuracy", "loss": "exp(-loss)"}


class ClassificationLoop(Engine):
    """Trains a classifier on prepared images.

    Args:
        experiment: what states the run.
        run: its folder.
        info: classes and sight.
        model: on its device.
        images: of training and validation, float32 (N, C, *size), in the computer's memory.
        targets: their classes (N).
        training: which of them train.
        validation: which of them validate.
        device: the model's.
    """

    def __init__(
        self,
        experiment: ClassificationExperiment,
        run: Path,
        info: ClassifierInfo,
        model: ClassificationModel,
        images: torch.Tensor,
        targets: torch.Tensor,
        training: Sequence[int],
        validation: Sequence[int],
        device: torch.device,
    ) -> None:
        config = experiment.trainer
        groups, settings = parameter_groups(model, experiment.optimizer, config.backbone_lr_factor, device)
        super().__init__(
            config,
            run,
            model,
            device,
            optimizer=settings,
            schedule=experiment.schedule,
            seed=experiment.seed,
            batch_size=config.batch_size,
            spatial_dims=info.sight.spatial_dims,
            resumes=experiment.resume is not None,
            parameters=groups,
        )
        self.classifier, self.images, self.targets = model, images, targets
        self.training, self.validation = torch.tensor(training), torch.tensor(validation)
        self.augment = augmenter(experiment.augment, info, experiment.seed)
        weights = None
        if config.class_weights == "auto":
            weights = inverse_shares(targets[self.training], len(info.classes))
            shown = ", ".join(f"{n} {w:.3g}" for n, w in zip(info.classes, weights.tolist(), strict=True))
            self.notes.append(f"weights    of the classes in the loss: {shown}")
        self.loss = CrossEntropy(weights, config.label_smoothing).to(device)
        self.judged_by = config.score
        self.score_name = SCORES[config.score]

    def columns(self) -> list[str]:
        """Losses, rates, and what a validation finds."""
        return ["train_loss", "lr", "samples_per_s", "val_loss", "val_auc", "val_balanced_accuracy", "val_accuracy"]

    def batches(self, first_step: int) -> Generator[BatchItem, None, None]:
        """Whole images and their classes: each image once before any comes again, in an order that follows from the
        seed."""
        step = first_step
        while True:
            chosen = self.training[batch_indices(len(self.training), self.batch_size, self.seed, step)]
            yield step, self.images[chosen], self.targets[chosen]
            step += 1

    def vary(self, image: torch.Tensor, target: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Augmented images; their classes stay."""
        unused = torch.zeros((image.shape[0], *image.shape[2:]), dtype=torch.uint8, device=image.device)
        varied, _ = self.augment(image, unused, step)
        return varied, target

    def measure(self, journal: Journal) -> Score:
        """The validation images: area under the ROC curves, recall, loss."""
        logits = predict_logits(
            self.classifier, self.images[self.validation], self.device, self.precision, batch_size=self.batch_size
        )
        truth = self.targets[self.validation]
        loss = float(self.loss(logits.to(self.device), truth.to(self.device)))
        probabilities, classes = softmax(logits), truth.numpy()
        area = macro_auc(probabilities, classes)
        matrix = confusion(classes, probabilities.argmax(axis=1), probabilities.shape[1])
        accuracy, balanced, *_ = (float(value) for value in summarise(matrix))
        columns = {"val_loss": loss, "val_auc": area, "val_balanced_accuracy": balanced, "val_accuracy": accuracy}
        likelihood = math.exp(-loss)
        value = {"auc": area, "balanced_accuracy": balanced, "loss": likelihood}[self.judged_by]
        value -= TIE_SHARE * (1 - likelihood)
        said = f"AUC {area:.3f}, balanced accuracy {balanced:.3f}, loss {loss:.3f}"
        return Score(0.0 if math.isnan(value) else value, columns, said)


class CrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy in float32, whatever the network computes in.

    Args:
        weights: of the classes; None: all the same.
        smoothing: share of a target that is spread over all classes.

    Source:
        Szegedy et al., Rethinking the Inception Architecture, CVPR 2016, section 7, for the smoothing.
    """

    def __init__(self, weights: torch.Tensor | None, smoothing: float) -> None:
        super().__init__(weights, label_smoothing=smoothing)

    def forward(self, scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Scores (N, K), classes (N) → the mean over the batch."""
        return super().forward(scores.float(), classes)


def parameter_groups(
    model: ClassificationModel, optimizer: Mapping[str, Any], factor: float, device: torch.device
) -> tuple[list[Any], dict[str, Any]]:
    """What is trained, in two groups: all that lies before the head, with a learning rate of its own, and the head.

    Frozen weights are left out.

    Args:
        model: the network.
        optimizer: name and settings.
        factor: learning rate before the head, as a multiple of the head's.
        device: of the weights.
    Returns:
        Parameters, or groups of them; and the optimizer's settings.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if factor == 1:
        return trained, dict(optimizer)
    lr = learning_rate(optimizer, device)
    head = {id(parameter) for parameter in model.stages[-1][1].parameters()}
    before = [parameter for parameter in trained if id(parameter) not in head]
    groups: list[Any] = [{"params": before, "lr": lr * factor}] if before else []
    groups.append({"params": [parameter for parameter in trained if id(parameter) in head], "lr": lr})
    return groups, {**optimizer, "lr": lr}


def augmenter(config: AugmentConfig, info: ClassifierInfo, seed: int) -> Augmenter:
    """What varies whole images: by `TURN_DEGREES` at most, and pictures from left to right alone, unless told."""
    sight = info.sight
    is_picture = sight.spacing_mm is None and sight.spatial_dims == 2
    if config.rotation_degrees is None:
        config = dataclasses.replace(config, rotation_degrees=TURN_DEGREES)
    axes = config.mirror_axes
    if axes is None:
        axes = (1,) if is_picture and not any(_is_sided(name) for name in info.classes) else ()
    return Augmenter(
        config,
        patch_size=sight.size,
        spacing_mm=sight.spacing_mm or (1.0,) * sight.spatial_dims,
        is_picture=is_picture,
        mirroring=Mirroring(tuple(axes)),
        seed=seed,
    )


def _is_sided(name: str) -> bool:
    return bool({"left", "right"} & set(name.lower().replace("_", " ").replace("-", " ").split()))


def inverse_shares(targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Weights of the classes: the inverse of their shares, so that a batch's mean stays of the same size."""
    counts = torch.bincount(targets, minlength=num_classes).float()
    present = counts > 0
    weights = torch.where(present, counts.sum() / counts.clamp(min=1), torch.zeros_like(counts))
    return weights / present.sum()


def batch_indices(num_images: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Which images a step sees: places `step · batch_size` and on, in one shuffled round after the other."""
    places = torch.arange(step * batch_size, (step + 1) * batch_size)
    rounds = torch.div(places, num_images, rounding_mode="floor")
    chosen = torch.empty_like(places)
    for number in range(int(rounds[0]), int(rounds[-1]) + 1):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        order = torch.randperm(num_images, generator=generator)
        inside = rounds == number
        chosen[inside] = order[places[inside] % num_images]
    return chosen


def predict_logits(
    model: ClassificationModel, images: torch.Tensor, device: torch.device, precision: str, *, batch_size: int
) -> torch.Tensor:
    """Scores of prepared images, float32 (N, K), in the computer's memory; the model's mode stays what it was."""
    was_training = model.training
    model.eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            with autocast(device, precision):
                found.append(model(images[start : start + batch_size].to(device)).float().cpu())
    model.train(was_training)
    return torch.cat(found)


def softmax(logits: torch.Tensor) -> NDArray[np.float64]:
    """Probabilities of scores (N, K)."""
    shares: NDArray[np.float64] = logits.double().softmax(dim=1).numpy()
    return shares
