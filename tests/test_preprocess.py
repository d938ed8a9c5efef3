"""Scan → network: orientation, spacing, intensities, and that prediction lands where the scan lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg.bundle import Bundle, BundleInfo
from medseg.data.cases import Case
from medseg.data.plan import Plan
from medseg.data.preparation import prepare_cases
from medseg.data.preprocess import planned_grid, prepare_image, prepare_label
from medseg.errors import MedsegError
from medseg.formats import write_image, write_label
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import WindowConfig
from medseg.labels import Labels
from medseg.models import SegmentationModel
from medseg.volume import Grid, Volume

OBLIQUE = np.array([[0.2, -1.9, 0.1, 30.0], [1.45, 0.25, 0.3, -20.0], [-0.25, 0.2, 3.9, 5.0], [0, 0, 0, 1]])


def oblique_grid(shape: tuple[int, ...] = (14, 18, 9)) -> Grid:
    u, _, v = np.linalg.svd(OBLIQUE[:3, :3] / np.linalg.norm(OBLIQUE[:3, :3], axis=0))
    affine = OBLIQUE.copy()
    affine[:3, :3] = (u @ v) * np.array([1.5, 2.0, 4.0])
    return Grid(shape, affine)


def plan(**changes: object) -> Plan:
    values = {
        "preset": "auto",
        "configuration": "fullres",
        "crop": False,
        "mask_normalisation": False,
        "memory_gb": 1.0,
        "spatial_dims": 3,
        "num_channels": 1,
        "orientation": "SPL",
        "spacing_mm": (4.0, 1.5, 2.0),
        "normalisation": ("z-score",),
        "intensity": ((-100.0, 200.0, 50.0, 25.0),),
        "patch_size": (8, 8, 8),
        "batch_size": 1,
        "widths": (2, 4),
        "kernels": ((3, 3, 3),) * 2,
        "strides": ((1, 1, 1), (2, 2, 2)),
        "reasons": {},
    }
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


def test_axes_end_up_in_model_order() -> None:
    grid = oblique_grid()
    image, prepared = prepare_image(Volume(np.random.default_rng(0).normal(size=(1, *grid.shape)), grid), plan())
    assert prepared.orientation == "SPL" and image.shape[1:] == prepared.shape
    assert sorted(prepared.shape) == sorted(grid.shape)
    np.testing.assert_allclose(prepared.spacing_mm, (4.0, 1.5, 2.0), atol=1e-6)


def test_a_blob_stays_at_its_place_in_the_world() -> None:
    grid = oblique_grid((40, 30, 20))
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), -1)
    centre = grid.to_world([25.0, 8.0, 12.0])
    blob = np.exp(-np.sum((grid.to_world(index) - centre) ** 2, -1) / (2 * 8.0**2))
    image, prepared = prepare_image(Volume(blob[None], grid), plan(spacing_mm=(3.0, 2.2, 1.7)))
    weight = (image[0] - image[0].min()).numpy() ** 4
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in prepared.shape], indexing="ij"), -1).reshape(-1, 3)
    found = (prepared.to_world(voxels) * weight.reshape(-1, 1)).sum(0) / weight.sum()
    np.testing.assert_allclose(found, centre, atol=0.5)


def test_normalisation() -> None:
    grid = Grid((8, 8, 8), np.diag([2.0, 1.5, 4.0, 1.0]))
    array = np.random.default_rng(0).normal(300, 40, size=(1, 8, 8, 8))
    scored, _ = prepare_image(Volume(array, grid), plan())
    assert scored.mean().item() == pytest.approx(0, abs=1e-3) and scored.std().item() == pytest.approx(1, abs=1e-2)
    ct, _ = prepare_image(Volume(array, grid), plan(normalisation=("ct",)))
    assert ct.max().item() == pytest.approx((200 - 50) / 25, abs=1e-5)
    constant, _ = prepare_image(Volume(np.full((1, 8, 8, 8), 7.0), grid), plan())
    assert constant.abs().max() == 0  # no division by zero


def test_other_channels_are_refused() -> None:
    with pytest.raises(MedsegError, match="E_MODEL.*\n.*1 channel.*\n.*2 channel"):
        prepare_image(Volume(np.zeros((2, 14, 18, 9)), oblique_grid()), plan())


def test_label_and_image_share_the_grid(tmp_path) -> None:
    grid = oblique_grid()
    rng = np.random.default_rng(0)
    label = np.zeros(grid.shape, dtype=np.uint8)
    label[3:9, 4:12, 2:6] = 1
    write_image(tmp_path / "a.nii.gz", Volume(rng.normal(size=(1, *grid.shape)), grid))
    write_label(tmp_path / "a_seg.nii.gz", Volume(label, grid))
    labels = Labels(("background", "organ"), ((0,), (1,)))
    case = Case("a", (tmp_path / "a.nii.gz",), tmp_path / "a_seg.nii.gz")
    (prepared,) = prepare_cases([case], plan(spacing_mm=(2.0, 1.0, 1.0)), labels, num_threads=1).cases
    assert prepared.image.shape[1:] == prepared.label.shape == prepared.grid.shape
    assert all(prepared.label[tuple(v)] == 1 for v in prepared.locations[1])
    centre = prepared.grid.to_world(np.argwhere(prepared.label.numpy() == 1).mean(0))
    np.testing.assert_allclose(centre, grid.to_world(np.argwhere(label == 1).mean(0)), atol=0.2)


class Threshold(SegmentationModel):
    """Calls voxels above 5 foreground: half way between the scan's 0 and 10, where the edge of a body lies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        return input_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x), (x - 5) * self.weight], 1)


@pytest.mark.parametrize("spacing", [(4.0, 1.5, 2.0), (2.0, 1.0, 1.0)])
def test_prediction_lies_on_exactly_the_scans_grid(spacing: tuple[float, ...], tmp_path) -> None:
    grid = oblique_grid((20, 26, 12))
    truth = np.zeros(grid.shape, dtype=bool)
    truth[2:9, 12:22, 5:11] = True  # off-centre: any flip or shift shows
    scan = Volume(truth[None].astype(np.float32) * 10, grid)
    labels = Labels(("background", "organ"), ((0,), (255,)))
    info = BundleInfo({"name": "unet"}, plan(spacing_mm=spacing, normalisation=("none",)), labels, ("image",))
    predictor = Predictor(Bundle(info, Threshold().eval(), tmp_path, "best"), WindowConfig())
    predicted = predictor.predict(scan)
    assert predicted.grid is grid and predicted.array.dtype == np.uint8
    assert set(np.unique(predicted.array)) == {0, 255}
    assert ((predicted.array == 255) == truth).all()


def test_pictures_are_not_resampled() -> None:
    picture = Volume(np.random.default_rng(0).normal(size=(1, 9, 7)), Grid.of_picture((9, 7)))
    stages = {"patch_size": (8, 8), "kernels": ((3, 3),) * 2, "strides": ((1, 1), (2, 2))}
    flat = plan(spatial_dims=2, orientation="", spacing_mm=(1.0, 1.0), **stages)
    image, grid = prepare_image(picture, flat)
    assert image.shape == (1, 9, 7) and grid is picture.grid
    assert planned_grid(picture.grid, flat) is picture.grid
    assert prepare_label(Volume(np.ones((9, 7), np.uint8), picture.grid), flat, 2).sum() == 63
