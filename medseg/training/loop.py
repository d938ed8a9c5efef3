"""Learning to segment: patches, their augmentation, the loss, and validations on whole volumes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import torch

from medseg.bundle import BundleInfo
from medseg.data.augment import Augmenter
from medseg.data.prepared import PreparedCase
from medseg.data.sampling import BatchItem, PatchSampler
from medseg.inference.sliding_window import WindowConfig
from medseg.losses.choice import build_loss
from medseg.losses.deep_supervision import DeepSupervision
from medseg.models import SegmentationModel
from medseg.training.beginning import SURVEY_FILE
from medseg.training.class_weights import with_class_weights
from medseg.training.distributed import World
from medseg.training.engine import Engine, Score
from medseg.training.experiment import Experiment
from medseg.training.journal import DICE_PREFIX, Journal
from medseg.training.pictures import Pictures
from medseg.training.validation import validate


class Loop(Engine):
    """Trains a network on patches of prepared cases."""

    score_name = "Dice"

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
        config, plan = experiment.trainer, info.plan
        super().__init__(
            config,
            run,
            model,
            device,
            optimizer=experiment.optimizer,
            schedule=experiment.schedule,
            seed=experiment.seed,
            batch_size=plan.batch_size,
            spatial_dims=plan.spatial_dims,
            resumes=experiment.resume is not None,
            world=world,
        )
        self.segmenter, self.plan, self.labels, self.validation = model, plan, info.labels, validation
        at_once = -(-plan.batch_size // (self.world.size * config.accumulate))
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
            config.foreground_share,
            experiment.seed,
            mirror_padding=is_picture or any(margin),
            margin=margin,
            cut_size=self.augment.cut_size,
            annotated_only=bool(info.labels.ignore),
            even_classes=config.even_classes,
            share=(self.world.rank, self.world.size),
        )
        loss, weights_note = with_class_weights(
            experiment.loss, info.labels, run / SURVEY_FILE, {case.case_id for case in training}
        )
        if weights_note is not None:
            self.notes.append(weights_note)
        self.loss = DeepSupervision(build_loss(loss, info.labels)).to(device)
        self.pictures = Pictures(config, info, training, validation, device, self.precision)

    def columns(self) -> list[str]:
        """Losses, rates, and the Dice of the validation: its mean and each class's."""
        per_class = [DICE_PREFIX + name for name in self.labels.foreground]
        return ["train_loss", "lr", "samples_per_s", "val_loss", DICE_PREFIX + "mean", *per_class]

    def batches(self, first_step: int) -> Generator[BatchItem, None, None]:
        """Patches and their labels, made ahead by a thread."""
        return self.sampler.prefetch(first_step)

    def vary(self, image: torch.Tensor, target: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Augmented patches, cut to the network's size."""
        return self.augment(image, target, step, self.sampler.indices)

    def measure(self, journal: Journal) -> Score:
        """Whole volumes: their Dice, and overlays for TensorBoard."""
        settings = (self.plan.patch_size, self.labels, self.loss, self.window)
        drawn = list(self.pictures.overlaid)
        result, kept = validate(self.segmenter, self.validation, *settings, keep=drawn, world=self.world)
        if self.world.is_main:
            self.pictures.draw(journal, self.segmenter, kept, self.counters.step)
        per_class = dict(zip(self.labels.foreground, (float(v) for v in result.per_class), strict=True))
        columns = {"val_loss": result.loss, DICE_PREFIX + "mean": result.mean}
        columns |= {DICE_PREFIX + name: value for name, value in per_class.items()}
        said = ", ".join(f"{name} {value:.3f}" for name, value in list(per_class.items())[:6])
        return Score(result.mean, columns, said)
