"""What a trained network makes of a scan or a structure: the mean of its coarsest feature maps."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.bundle.archive import opened
from medseg.bundle.checkpoint import checkpoint_path, read_checkpoint, weights_in
from medseg.bundle.info import BUNDLE_FILE, BundleInfo, built_with, load_bundle
from medseg.data.cases import load_image
from medseg.data.layouts import Case
from medseg.data.prepared import cut
from medseg.data.preprocess import prepare_image
from medseg.explain.layers import layer_table
from medseg.explain.maps import map_of, map_places
from medseg.explain.tile import start_around
from medseg.explain.tracing import evaluating
from medseg.formats import STRICT, Reading
from medseg.inference.members import configurations_of
from medseg.inference.sliding_window import tile_starts
from medseg.models import SegmentationModel
from medseg.volume import Grid

KEPT = 2
"""Prepared scans in memory: threads come with different cases in turn."""


class Embedder:
    """Asks the network of a run; of folds and ensembles the first one.

    Args:
        run: a run that segments, its bundle, or a pretraining.
        device: where the network goes.
    Raises:
        MedsegError: E_RUN, E_CHECKPOINT, E_MODEL, and what opening a bundle refuses.
    """

    def __init__(self, run: Path, device: torch.device | str = "cpu") -> None:
        self.info, self.model = _trained(run, device)
        self.device = device
        self.size = self.info.plan.patch_size
        self.layer = map_places(self.model, layer_table(self.model, self.size)).coarsest
        self._lock = Lock()
        """One network, many threads: its maps are caught by hooks."""
        self._prepared: dict[str, tuple[Tensor, Grid]] = {}

    def of_scan(self, case: Case, reading: Reading = STRICT) -> dict[str, float]:
        """The mean over the tiles of the plan's patch size that cover a scan.

        Args:
            case: its image, with the channels that the model was trained with.
            reading: what is asked of the readers.
        Returns:
            "embedding_000", … → value; as many as the coarsest map has channels.
        Raises:
            MedsegError: E_CHANNELS, E_MODEL where image and model do not fit together; what the readers refuse.
        """
        with self._lock:
            image, _ = self._image(case, reading)
            shape = image.shape[1:]
            covered = [max(n, m) for n, m in zip(shape, self.size, strict=True)]
            vectors = [self._vector(image, start) for start in tile_starts(covered, self.size, 1.0)]
        return _named(torch.stack(vectors).mean(dim=0))

    def of_region(self, case: Case, mask: NDArray[np.bool_], grid: Grid, reading: Reading = STRICT) -> dict[str, float]:
        """The patch around the middle of a structure.

        Args:
            case: its image, with the channels that the model was trained with.
            mask: the structure.
            grid: of the mask.
            reading: what is asked of the readers.
        Returns:
            As `of_scan`; NaN for an empty structure.
        Raises:
            MedsegError: as `of_scan`.
        """
        if not mask.any():
            with torch.no_grad(), self._lock:
                image, _ = self._image(case, reading)
                return dict.fromkeys(_named(self._vector(image, tuple(0 for _ in self.size))), float("nan"))
        middle = grid.to_world(np.argwhere(mask).mean(axis=0))
        with self._lock:
            image, prepared = self._image(case, reading)
            place = [round(float(i)) for i in prepared.to_index(middle)]
            return _named(self._vector(image, start_around(place, self.size, image.shape[1:])))

    def _image(self, case: Case, reading: Reading) -> tuple[Tensor, Grid]:
        """The scan as the network sees it; the last ones are kept, for structures come one by one."""
        if case.case_id not in self._prepared:
            volume = load_image(case, channels=self.info.channels, reading=reading)
            while len(self._prepared) >= KEPT:
                del self._prepared[next(iter(self._prepared))]
            self._prepared[case.case_id] = prepare_image(volume, self.info.plan)
        return self._prepared[case.case_id]

    @torch.no_grad()
    def _vector(self, image: Tensor, start: tuple[int, ...]) -> Tensor:
        tile = cut(image, start, self.size)[None].to(self.device)
        with evaluating(self.model):
            maps = map_of(self.model, tile, self.layer)
        return maps[0].float().flatten(1).mean(dim=1).cpu()


def _trained(run: Path, device: torch.device | str) -> tuple[BundleInfo, SegmentationModel]:
    """The network of a run with its best weights, and what it is."""
    member = opened(configurations_of(run)[0].members[0].run)
    info = BundleInfo.read(member)
    if info.method is None:
        return info, load_bundle(member, device=device).model
    from medseg.pretraining.train import build

    # What it reconstructs is not asked for, so that its encoder serves as a segmenter's does
    method, path = info.method, checkpoint_path(member, "best")
    tensors, _ = read_checkpoint(path)
    model = built_with(
        lambda: build(info, method)[0], weights_in(tensors), description=member / BUNDLE_FILE, where=path
    )
    return info, model.to(device).eval()


def _named(vector: Tensor) -> dict[str, float]:
    return {f"embedding_{number:03d}": float(value) for number, value in enumerate(vector)}
