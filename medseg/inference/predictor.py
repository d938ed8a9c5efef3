"""A model that stays warm: scans in, label maps on the scans' own grids out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from medseg.bundle import Bundle, load_bundle
from medseg.data.augment import Mirroring
from medseg.data.preprocess import prepare_image
from medseg.device import choose_device, choose_precision
from medseg.errors import Code, MedsegError
from medseg.inference.sliding_window import WindowConfig, memory_format, sliding_window_logits
from medseg.resampling import resample_argmax
from medseg.volume import Volume


class Predictor:
    """Predicts label maps with one loaded model.

    Args:
        bundle: the trained model.
        config: tiling; its precision must be one that the device has.
    """

    def __init__(self, bundle: Bundle, config: WindowConfig) -> None:
        self.bundle = bundle
        self.config = config
        dims = bundle.info.plan.spatial_dims
        self.model = bundle.model.to(memory_format=memory_format(dims))  # type: ignore[call-overload]

    @classmethod
    def from_run(
        cls,
        run: Path,
        *,
        checkpoint: str = "best",
        device: str = "auto",
        precision: str = "auto",
        step: float = 0.5,
        mirror: bool = False,
        batch_size: int = 4,
    ) -> Predictor:
        """Load a run's model.

        Args:
            run: the folder that `medseg train` made.
            checkpoint: "best" or "latest".
            device: "auto", "cpu", "cuda", "cuda:1", …
            precision: "auto", "bf16", "fp16" or "fp32".
            step: distance of tiles as a share of the tile.
            mirror: average over mirrored passes along the axes that training mirrored.
            batch_size: tiles in one forward pass.
        """
        where = choose_device(device)
        bundle = load_bundle(run, checkpoint=checkpoint, device=where)
        mirroring = bundle.info.mirroring if mirror else Mirroring()
        if mirror and not mirroring.axes:
            raise MedsegError(
                Code.MODEL,
                "the model was trained without mirroring and knows sides: mirrored passes would confuse it",
                where="--mirror",
                remedy="leave --mirror out, or train with augment.mirror_axes=[0,1,2] where the anatomy has no sides",
            )
        config = WindowConfig(step, mirroring, batch_size, choose_precision(precision, where))
        return cls(bundle, config)

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (K, *S) of a prepared image (C, *S)."""
        info = self.bundle.info
        return sliding_window_logits(self.model, image, info.plan.patch_size, info.labels.num_classes, self.config)

    def predict_indices(self, volume: Volume) -> Volume:
        """Class indices (uint8) on exactly the scan's grid.

        Args:
            volume: the scan, array (C, *S) with the channels that the model was trained on.
        """
        plan = self.bundle.info.plan
        image, grid = prepare_image(volume, plan)
        oriented = volume.grid if grid.is_picture else volume.grid.reoriented(plan.orientation)
        indices = resample_argmax(self.logits(image), oriented.shape).cpu().numpy()
        return Volume(indices, oriented, volume.modality).oriented_as(volume.grid)

    def predict(self, volume: Volume) -> Volume:
        """The label map in the values of the training labels, smallest integer type, on exactly the scan's grid."""
        return self.in_file_values(self.predict_indices(volume))

    def in_file_values(self, indices: Volume) -> Volume:
        """Class indices as the values that stand for them in files, smallest integer type."""
        values = self.bundle.info.labels.to_values(np.asarray(indices.array, dtype=np.uint8))
        return replace(indices, array=values)
