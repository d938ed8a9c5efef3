"""A folder's models, warm: scans in, post-processed label maps on the scans' own grids out.

Models of one plan see the same image, so that the mean of their *logits* is gathered on the model's grid and resampled
once. Models of other plans have other grids: the mean is that of their *probabilities* on the scan's own grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from medseg.bundle import BundleInfo, opened
from medseg.data.augment import Mirroring
from medseg.device import choose_device, choose_precision, keep_freed_memory
from medseg.errors import Code, MedsegError
from medseg.inference.averaging import mean_decoding
from medseg.inference.decoding import NOTHING_MORE, Decoding
from medseg.inference.members import check_agreement, configurations_of, load_members, together
from medseg.inference.memory import plan_memory
from medseg.inference.postprocess import PostProcessing
from medseg.inference.prediction import Prediction, Wanted
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import WindowConfig
from medseg.models.compiling import Compile
from medseg.volume import Grid, Volume


class Ensemble:
    """Predicts label maps with all models of a folder, and does to them what its post-processing says.

    Args:
        predictors: one for each set of models that see the same.
        weights: their shares in the mean; equal if None.
        postprocessing: what is done to the label maps.
        notes: what else is to be known of the models, one sentence each.
    """

    def __init__(
        self,
        predictors: Sequence[Predictor],
        weights: Sequence[float] | None = None,
        postprocessing: PostProcessing | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.predictors = tuple(predictors)
        self.weights = tuple(weights or [1 / len(self.predictors)] * len(self.predictors))
        self.postprocessing = postprocessing or PostProcessing()
        self.notes = tuple(notes)

    @property
    def info(self) -> BundleInfo:
        """What the first of the models is; classes and channels are those of all."""
        return self.predictors[0].info

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
        batch_size: int | None = None,
        postprocess: bool = True,
        skip: bool = True,
        compile: Compile = "off",
    ) -> Ensemble:
        """Load all models of a folder.

        Args:
            run: a run, a run of several folds, an ensemble, or the bundle of one (folder or zip).
            checkpoint: "best" or "latest".
            device: "auto", "cpu", "cuda", "cuda:1", …
            precision: "auto", "bf16", "fp16" or "fp32".
            step: distance of tiles as a share of the tile.
            mirror: average over mirrored passes along the axes that training mirrored.
            batch_size: tiles in one forward pass; None is what is fastest on the device.
            postprocess: do what the run's `postprocessing.json` says.
            skip: compute tiles of one and the same value once; nothing changes but the time.
            compile: the networks, as `Predictor` says.
        Raises:
            MedsegError: E_RUN, E_MISSING or E_CHECKPOINT for what is not there or has changed; E_MODEL if the models
                do not fit together, or do not allow mirroring.
        """
        where = choose_device(device)
        if where.type == "cpu":
            keep_freed_memory()
        window = WindowConfig(step, Mirroring(), batch_size, choose_precision(precision, where), skip)
        predictors: list[Predictor] = []
        weights: list[float] = []
        run = opened(run)
        configurations = configurations_of(run)
        for configuration in configurations:
            bundles = load_members(configuration, checkpoint=checkpoint, device=where)
            for group in together(bundles):
                tiling = mirrored(window, group[0].info) if mirror else window
                predictors.append(Predictor(group, tiling, compile=compile))
                weights.append(len(group) / len(bundles) / len(configurations))
        check_agreement([(p.bundle.run, p.info) for p in predictors])
        postprocessing = PostProcessing.read(run, predictors[0].info.labels) if postprocess else None
        notes = [
            f"not finished, and left out: {', '.join(c.unfinished)} of {c.folder}"
            for c in configurations
            if c.unfinished
        ]
        return cls(predictors, weights, postprocessing, notes)

    @property
    def num_models(self) -> int:
        """How many networks look at each tile."""
        return sum(predictor.num_models for predictor in self.predictors)

    def describe(self) -> list[str]:
        """What is not to be seen from outside, one line each: several models, post-processing."""
        lines = list(self.notes)
        if self.num_models > 1:
            how = "logits" if len(self.predictors) == 1 else f"probabilities of {len(self.predictors)} plans"
            lines.append(f"ensemble: {self.num_models} models ({self.model_names}), mean of their {how}")
        if self.postprocessing.steps:
            lines.append(f"post-processing: {self.postprocessing.describe()}; --no-postprocess leaves it out")
        return lines

    @property
    def model_names(self) -> str:
        """The architectures, each once, for files that name the algorithm."""
        names = [str(predictor.info.model.get("name", "model")) for predictor in self.predictors]
        return " + ".join(dict.fromkeys(names))

    def predict_indices(self, volume: Volume) -> Volume:
        """Class indices (uint8) on exactly the scan's grid, post-processed.

        Args:
            volume: the scan, array (C, *S) with the channels that the models were trained on.
        """
        return self._processed(self._decoded(volume, Wanted()))

    def predict_case(
        self,
        volume: Volume,
        *,
        want_probabilities: bool = False,
        want_uncertainty: bool = False,
        scratch: Path | None = None,
    ) -> Prediction:
        """Everything that can be said of a scan.

        Args:
            volume: the scan, array (C, *S) with the channels that the models were trained on.
            want_probabilities: of each class or region. They are large: two bytes for each voxel and class.
            want_uncertainty: how unsure the models are of each voxel, and how much they disagree.
            scratch: folder for a nameless file that holds the probabilities in place of memory.
        Raises:
            MedsegError: E_LIMIT, before any work, where the memory does not suffice; E_MODEL for a scan that does not
                fit the models.
        """
        decoding = self._decoded(volume, Wanted(want_probabilities, want_uncertainty, scratch))
        indices = self._processed(decoding)
        labels = self.in_file_values(indices)
        return Prediction(indices, labels, decoding.probabilities, decoding.uncertainty, decoding.disagreement)

    def _decoded(self, volume: Volume, wanted: Wanted) -> Decoding:
        if len(self.predictors) == 1:
            return self.predictors[0].decoded(volume, wanted)
        logits = planned_logits(self.predictors, volume, wanted)
        return mean_decoding(logits, self.weights, self.info.labels, volume.grid, wanted)

    def _processed(self, decoding: Decoding) -> Volume:
        array = np.asarray(decoding.indices.array, dtype=np.uint8)
        return replace(decoding.indices, array=self.postprocessing.apply(array, self.info.labels))

    def in_file_values(self, indices: Volume) -> Volume:
        """Class indices as the values that stand for them in files, smallest integer type."""
        return self.predictors[0].in_file_values(indices)

    def predict(self, volume: Volume) -> Volume:
        """The label map in the values of the training labels, smallest integer type, on exactly the scan's grid."""
        return self.in_file_values(self.predict_indices(volume))


def planned_logits(
    predictors: Sequence[Predictor], volume: Volume, wanted: Wanted = NOTHING_MORE
) -> list[tuple[Tensor, Grid]]:
    """`Predictor.logits_of` of several at the same time, as precise and where the memory allows it.

    Raises:
        MedsegError: E_LIMIT, before any work, where the memory does not suffice.
    """
    footprints = [predictor.footprint(volume) for predictor in predictors]
    memory = plan_memory(volume.grid, footprints, predictors[0].device, wanted=wanted)
    return [predictor.logits_of(volume, memory.dtype, memory.sums_on, wanted) for predictor in predictors]


def mirrored(window: WindowConfig, info: BundleInfo) -> WindowConfig:
    """The tiling with mirrored passes along the axes that training mirrored.

    Raises:
        MedsegError: E_MODEL where it mirrored none.
    """
    if not info.mirroring.axes:
        raise MedsegError(
            Code.MODEL,
            "the model was trained without mirroring and knows sides: mirrored passes would confuse it",
            where="--mirror",
            remedy="leave --mirror out, or train with augment.mirror_axes=[0,1,2] where the anatomy has no sides",
        )
    return replace(window, mirroring=info.mirroring)
