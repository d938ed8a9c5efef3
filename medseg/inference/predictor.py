"""Warm models of one plan: scans in, label maps on the scans' own grids out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from medseg.bundle import Bundle, BundleInfo
from medseg.data.preprocess import covered_box, planned_grid, prepare_image, refuse_misfit
from medseg.errors import Code, MedsegError
from medseg.inference.decoding import NOTHING_MORE, Decoding
from medseg.inference.memory import STITCHED_ON_HOST, Footprint, plan_memory
from medseg.inference.prediction import Wanted
from medseg.inference.sliding_window import (
    WindowConfig,
    memory_format,
    sliding_window_logits,
    sliding_window_planes,
    tiles_together,
)
from medseg.inference.uncertainty import Opinions, disagreeing, num_sums
from medseg.labels import Labels
from medseg.models import SegmentationModel
from medseg.models.compiling import Compile, Forward
from medseg.volume import Grid, Volume

log = logging.getLogger(__name__)

LONG_PASSES = 300
"""Forward passes after which "auto" compiles on CUDA: compiling takes up to a minute, so a scan or two are not worth
it."""
T = TypeVar("T")


class MeanModel(SegmentationModel):
    """Several networks as one: the mean of their logits. They have the same inputs, classes and output size.

    Args:
        models: in eval mode.
    """

    def __init__(self, models: list[SegmentationModel]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.first = models[0].output_size

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the result, as each of the networks has it."""
        return self.first(input_size)

    def forward(self, x: Tensor) -> Tensor:
        """Mean logits, float32, shape (N, K, *output_size)."""
        total: Tensor = self.models[0](x).float()
        for model in self.models[1:]:
            total = total + model(x)
        return total / len(self.models)


class Predictor:
    """Predicts label maps with the loaded models of one plan: a single run, or the folds of one.

    Args:
        bundle: the trained model, or several that see the same: the image is prepared once, the mean of their logits
            is gathered in one volume and resampled once.
        config: tiling; its precision must be one that the device has.
        compile: whether the network is compiled; "auto" on CUDA after `LONG_PASSES` passes. What it answers then may
            differ by roundings.

    Attributes:
        compile: the same, "off" where "auto" never compiles.
    """

    def __init__(self, bundle: Bundle | list[Bundle], config: WindowConfig, *, compile: Compile = "off") -> None:
        bundles = [bundle] if isinstance(bundle, Bundle) else bundle
        self.bundle = bundles[0]
        self.config = config
        self.num_models = len(bundles)
        model = self.bundle.model if len(bundles) == 1 else MeanModel([b.model for b in bundles])
        dims = self.info.plan.spatial_dims
        self.model = model.to(memory_format=memory_format(dims))  # type: ignore[call-overload]
        self.compile: Compile = "off" if compile == "auto" and self.device.type != "cuda" else compile
        self.forward = self._called(self.model)
        self._opinions: Forward | None = None

    def _called(self, model: SegmentationModel) -> Forward:
        return Forward(
            model,
            compiled=self.compile != "off",
            must=self.compile == "on",
            option="--compile on",
            after=LONG_PASSES if self.compile == "auto" else 0,
        )

    def _for(self, wanted: Wanted) -> tuple[Forward, int]:
        """What calls the networks, and the channels that it gives."""
        labels = self.info.labels
        if not wanted.uncertainty:
            return self.forward, labels.num_outputs
        if self._opinions is None:
            models = list(self.model.models) if isinstance(self.model, MeanModel) else [self.model]
            self._opinions = self._called(Opinions(models, regions=bool(labels.regions)).eval())
        return self._opinions, num_sums(labels.num_outputs)

    def _disagreeing(self, planes: Iterator[tuple[int, Tensor]], wanted: Wanted) -> Iterator[tuple[int, Tensor]]:
        labels = self.info.labels
        return disagreeing(planes, labels.num_outputs, regions=bool(labels.regions)) if wanted.uncertainty else planes

    @property
    def info(self) -> BundleInfo:
        """What the models are."""
        return self.bundle.info

    def logits(
        self,
        image: Tensor,
        dtype: torch.dtype = torch.float32,
        sums_on: torch.device | None = None,
        wanted: Wanted = NOTHING_MORE,
    ) -> Tensor:
        """Logits (K, *S) of a prepared image (C, *S); in main memory where the device's does not suffice. Where
        uncertainty is wanted, with K mean probabilities and the disagreement behind them."""
        forward, num_channels = self._for(wanted)
        patch = self.info.plan.patch_size
        found = self._where_it_fits(
            lambda where: sliding_window_logits(
                self.model, image, patch, num_channels, self.config, dtype, forward=forward, sums_on=where
            ),
            sums_on,
        )
        ((_, found),) = self._disagreeing(iter([(0, found)]), wanted)
        return found

    def logits_of(
        self,
        volume: Volume,
        dtype: torch.dtype = torch.float32,
        sums_on: torch.device | None = None,
        wanted: Wanted = NOTHING_MORE,
    ) -> tuple[Tensor, Grid]:
        """Logits (K, *S) of a scan on the model's grid, and the voxels of the scan that they cover.

        Args:
            volume: the scan, array (C, *S) with the channels that the model was trained on.
            dtype: of the logits, float32 or float16.
            sums_on: where the logits are; None is the models' device.
            wanted: uncertainty wants more channels, as `logits` says.
        Returns:
            The logits, and their box cut into the scan's own voxels, with the axes of the plan: all of the scan, or
            the part that is left where the plan crops.
        """
        image, covered = self._prepared(volume)
        return self.logits(image, dtype, sums_on, wanted), covered

    def decoded(self, volume: Volume, wanted: Wanted = NOTHING_MORE) -> Decoding:
        """The answer to a scan on its grid, made some planes at a time while the window moves on.

        Args:
            volume: the scan, array (C, *S) with the channels that the model was trained on.
            wanted: what is made besides the class indices.
        Raises:
            MedsegError: E_LIMIT, before any work, where the memory does not suffice.
        """
        plan, labels = self.info.plan, self.info.labels
        memory = plan_memory(volume.grid, [self.footprint(volume)], self.device, wanted=wanted)
        image, covered = self._prepared(volume)
        forward, num_channels = self._for(wanted)
        arguments = (self.model, image, plan.patch_size, num_channels, self.config, memory.dtype)

        def decode_on(where: torch.device) -> Decoding:
            decoding = Decoding(labels, covered, volume.grid, wanted)
            planes = sliding_window_planes(*arguments, forward=forward, sums_on=where)
            decoding.fill_resampled(self._disagreeing(planes, wanted), image.shape[1])
            return decoding

        return self._where_it_fits(decode_on, memory.sums_on)

    def _where_it_fits(self, work: Callable[[torch.device], T], sums_on: torch.device | None) -> T:
        """Work with the sums where they were planned, or in main memory: a plan does not know what the network takes.

        Raises:
            MedsegError: E_LIMIT where the device has no room for one tile.
        """
        host = torch.device("cpu")
        places = [sums_on or self.device, host]
        for where in places[: 1 if places[0] == host else 2]:
            try:
                return work(where)
            except torch.OutOfMemoryError as error:
                reason = " ".join(str(error).split())[:200]
            if where != host:
                log.warning(STITCHED_ON_HOST)
        raise MedsegError(
            Code.LIMIT,
            "the device's memory does not suffice for one tile",
            where=f"{self.device}, patch {'×'.join(map(str, self.info.plan.patch_size))}",
            got=reason,
            remedy="end other programs that use the device, or predict with --device cpu",
        )

    def footprint(self, volume: Volume) -> Footprint:
        """Sizes by which the memory for a scan is planned; before a crop, which makes it smaller.

        Raises:
            MedsegError: E_MODEL if the scan does not fit the model.
        """
        plan = self.info.plan
        refuse_misfit(volume, plan)
        scan = volume.grid if volume.grid.is_picture else volume.grid.reoriented(plan.orientation)
        output = tuple(self.model.output_size(plan.patch_size))
        num_tiles = tiles_together(self.config, self.device)
        shape = planned_grid(scan, plan).shape
        return Footprint(shape, plan.patch_size, output, plan.num_channels, self.info.labels.num_outputs, num_tiles)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def _prepared(self, volume: Volume) -> tuple[Tensor, Grid]:
        """What the network sees of a scan, and the voxels of the scan that it covers, with the axes of the plan."""
        plan = self.info.plan
        image, grid = prepare_image(volume, plan)
        scan = volume.grid if grid.is_picture else volume.grid.reoriented(plan.orientation)
        return image, scan.boxed(covered_box(grid, scan))

    def predict_indices(self, volume: Volume) -> Volume:
        """Class indices (uint8) on exactly the scan's grid.

        Args:
            volume: the scan, array (C, *S) with the channels that the model was trained on.
        """
        return self.decoded(volume).indices

    def predict(self, volume: Volume) -> Volume:
        """The label map in the values of the training labels, smallest integer type, on exactly the scan's grid."""
        return self.in_file_values(self.predict_indices(volume))

    def in_file_values(self, indices: Volume) -> Volume:
        """Class indices as the values that stand for them in files, smallest integer type."""
        values = self.info.labels.to_values(np.asarray(indices.array, dtype=np.uint8))
        return replace(indices, array=values)


def decode(logits: Tensor, covered: Grid, labels: Labels, scan: Grid) -> Volume:
    """Class indices (uint8) of logits on the scan's grid; the arguments are those of `Predictor.logits_of`."""
    decoding = Decoding(labels, covered, scan)
    decoding.fill_resampled([(0, logits)], logits.shape[1])
    return decoding.indices
