"""Learning to reconstruct: patches of images, what is hidden of them, the loss, and validations on held-out images."""

from __future__ import annotations

import math
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from medseg.bundle import BundleInfo
from medseg.data.augment import Augmenter
from medseg.data.prepared import PreparedCase
from medseg.data.sampling import BatchItem, PatchSampler
from medseg.explain.tracing import evaluating
from medseg.inference.sliding_window import autocast, tile_starts
from medseg.models import SegmentationModel
from medseg.pretraining.experiment import PretrainingExperiment
from medseg.pretraining.methods import Hidden, Method
from medseg.pretraining.reconstruction import Fit, ReconstructionLoss, target_of
from medseg.training.distributed import World
from medseg.training.engine import Engine, Score
from medseg.training.journal import Journal
from medseg.training.pictures import spread

MAX_PATCHES = 4
"""Patches of a case that a validation reconstructs, evenly spread over those that cover it."""
EXPLAINED = "val_explained"
"""Column of the share of the variance that the reconstruction explains."""


@dataclass(frozen=True, eq=False)
class Shown:
    """One patch of a validation case, as a picture shows it. All are float32 (C, *P) in the computer's memory.

    Args:
        case_id: the case.
        image: as it is.
        seen: what the network got to see.
        reconstruction: what it made of it, smaller than P where its convolutions are not padded.
        asked: 1 where it was asked; (1, *P).
        spacing_mm: sides of a voxel.
        orientation: where the axes lead, such as "SPL"; "" of pictures.
    """

    case_id: str
    image: torch.Tensor
    seen: torch.Tensor
    reconstruction: torch.Tensor
    asked: torch.Tensor
    spacing_mm: tuple[float, ...]
    orientation: str


def as_score(explained: float) -> float:
    """The explained share of the variance as a score: below 0, where a network begins, it has no least value, and is
    brought into the same order above the -1 of no score at all."""
    return explained if explained > 0 else explained / (1 - explained)


def explained_by(score: float) -> float:
    """The share that `as_score` was given."""
    return score if score > 0 else score / (1 + score)


class ReconstructionEngine(Engine):
    """The loop of a pretraining.

    Args:
        experiment: what states it.
        run: its folder.
        info: plan, and the segmenter that it begins.
        model: the network that reconstructs, one output for each channel.
        method: what is hidden.
        training: cases that train.
        validation: cases that are held out.
        device: where the model is.
        world: the processes.
    """

    score_name = "explained variance"

    def __init__(
        self,
        experiment: PretrainingExperiment,
        run: Path,
        info: BundleInfo,
        model: SegmentationModel,
        method: Method,
        training: Sequence[PreparedCase],
        validation: Sequence[PreparedCase],
        device: torch.device,
        world: World | None = None,
    ) -> None:
        plan = info.plan
        super().__init__(
            experiment.trainer,
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
        self.plan, self.method, self.validation = plan, method, validation
        self.loss = ReconstructionLoss(method.loss)
        self.is_picture = not plan.orientation
        labelled = model.output_size(plan.patch_size)
        margin = tuple((p - q) // 2 for p, q in zip(plan.patch_size, labelled, strict=True))
        self.augment = Augmenter(
            experiment.augment,
            patch_size=plan.patch_size,
            spacing_mm=plan.spacing_mm,
            is_picture=self.is_picture,
            mirroring=info.mirroring,
            seed=experiment.seed,
        )
        self.sampler = PatchSampler(
            training,
            plan.patch_size,
            plan.batch_size,
            0.0,  # nothing is known to be foreground: patches come from everywhere
            experiment.seed,
            mirror_padding=self.is_picture or any(margin),
            margin=margin,
            cut_size=self.augment.cut_size,
            share=(self.world.rank, self.world.size),
        )
        self.drawn = [case.case_id for case in spread(validation, experiment.trainer.picture_cases)]

    def columns(self) -> list[str]:
        """See `Engine.columns`."""
        return ["train_loss", "lr", "samples_per_s", "val_loss", EXPLAINED]

    def batches(self, first_step: int) -> Generator[BatchItem, None, None]:
        """See `Engine.batches`: images, and labels of background alone, which the augmentation moves along."""
        return self.sampler.prefetch(first_step)

    def vary(self, image: torch.Tensor, target: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment, then hide: what is reconstructed is the image as augmentation left it."""
        image, _ = self.augment(image, target, step, self.sampler.indices)
        hidden = self.method.hide(image, (self.seed, step), self.sampler.indices)
        return hidden.image, target_of(image, hidden.asked)

    def measure(self, journal: Journal) -> Score:
        """See `Engine.measure`: the same patches of the held-out cases each time, with the same parts hidden."""
        fit = Fit()
        for case in self.validation:
            for number, image in enumerate(self._patches(case)):
                output, hidden = self.reconstruct(case.case_id, number, image)
                fit += Fit.of(output, target_of(image[None], hidden.asked.cpu()))
                if number == 0 and case.case_id in self.drawn:
                    seen, asked = hidden.image[0].cpu(), hidden.asked[0].cpu()
                    lies = (self.plan.spacing_mm, self.plan.orientation)
                    self._draw(journal, Shown(case.case_id, image, seen, output[0], asked, *lies))
        loss = fit.mean(self.method.loss)
        errors = f"mean absolute error {fit.mean('l1'):.4f}, root of the mean square {math.sqrt(fit.mean('l2')):.4f}"
        explained = fit.explained
        return Score(as_score(explained), {"val_loss": loss, EXPLAINED: explained}, errors, shown=explained)

    @torch.no_grad()
    def reconstruct(self, case_id: str, number: int, image: torch.Tensor) -> tuple[torch.Tensor, Hidden]:
        """What the network makes of a patch, and what it got to see; the same is hidden of it whenever it is asked.

        Args:
            case_id: the case that it is of.
            number: which of its patches.
            image: shape (C, *P), in the computer's memory.
        Returns:
            The reconstruction, float32 (1, C, *Q) in the computer's memory, and what was hidden, on the device.
        """
        key = (self.seed, zlib.crc32(case_id.encode()), number)
        hidden = self.method.hide(image[None].to(self.device), key, [0])
        seen = hidden.image.contiguous(memory_format=self.memory_format)
        with evaluating(self.model), autocast(self.device, self.precision):
            output: torch.Tensor = self.model(seen)
        return output.float().cpu(), hidden

    def _patches(self, case: PreparedCase) -> list[torch.Tensor]:
        """The patches of a case that a validation looks at; where one is smaller than a patch, it is filled up."""
        patch = self.plan.patch_size
        shape = [max(s, p) for s, p in zip(case.shape, patch, strict=True)]
        outside = [min(s - p, 0) // 2 for s, p in zip(case.shape, patch, strict=True)]
        patches = []
        for start in spread(tile_starts(shape, patch, 1.0), MAX_PATCHES):
            begin = [s + o for s, o in zip(start, outside, strict=True)]
            patches.append(case.cut(begin, patch, mirror=self.is_picture)[0])
        return patches

    def _draw(self, journal: Journal, shown: Shown) -> None:
        # Here, for what draws takes half a second of imports, and the first step need not wait for it
        from medseg.pretraining.pictures import draw, save

        picture = draw(shown)
        journal.picture(f"reconstruction/{shown.case_id}", picture, self.counters.step)
        save(self.run, shown.case_id, picture)
