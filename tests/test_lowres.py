"""The low resolution, end to end: for scans of which a patch at full resolution sees a small part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medseg.bundle import BundleInfo
from medseg.cli import main
from medseg.formats import open_label, open_volume, write_image, write_label
from medseg.volume import Grid, Volume

GRID = Grid((110, 96, 90), np.diag([1.0, 1.0, 1.2, 1.0]))
FAST = ("data.plan.base_width=4", "data.plan.num_stages=3", "data.split.num_folds=2", "trainer.device=cpu")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two scans ten times as large as the patch that a processor is planned, with an organ of half their width."""
    folder = tmp_path / "data"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    i, j, k = np.ogrid[-1 : 1 : GRID.shape[0] * 1j, -1 : 1 : GRID.shape[1] * 1j, -1 : 1 : GRID.shape[2] * 1j]
    for number in range(2):
        label = ((i - 0.2 * number) ** 2 + j**2 + k**2 < 0.3).astype(np.uint8)
        noise = np.random.default_rng(number).normal(0, 0.3, GRID.shape)
        image = (noise + 2 * label).astype(np.float32)[None]
        write_image(folder / "images" / f"scan{number}.nii.gz", Volume(image, GRID))
        write_label(folder / "labels" / f"scan{number}.nii.gz", Volume(label, GRID))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_low_resolution_is_planned_trained_and_predicts_on_the_scan_s_own_grid(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", f"data.root='{data}'", *FAST, "hydra.run.dir=full"])
    full = (tmp_path / "full" / "plan.yaml").read_text(encoding="utf-8")
    assert "data.plan.configuration=lowres sees more at a time" in full  # who should think of it is told so

    main(["plan", f"data.root='{data}'", *FAST, "data.plan.configuration=lowres", "hydra.run.dir=low"])
    keys = (*FAST[2:], "plan=low", "trainer.max_steps=25", "trainer.num_validations=1", "trainer.ema=null")
    main(["train", f"data.root='{data}'", *keys, "optimizer.lr=0.02", "trainer.report=false", "hydra.run.dir=runs/low"])
    plan = BundleInfo.read(tmp_path / "runs" / "low").plan
    assert plan.configuration == "lowres" and min(plan.spacing_mm) > 1.3
    whole = np.prod([n * s for n, s in zip(GRID.shape, GRID.spacing_mm, strict=True)])
    seen = np.prod([n * s for n, s in zip(plan.patch_size, plan.spacing_mm, strict=True)])
    assert seen > 0.2 * whole

    scan = data / "images" / "scan1.nii.gz"
    main(["predict", "runs/low", str(scan), "-o", "labels", "--device", "cpu", "--no-postprocess"])
    found = open_label(tmp_path / "labels" / "scan1.nii.gz")
    assert found.grid.difference(open_volume(scan).grid) is None
    truth = open_label(data / "labels" / "scan1.nii.gz").array > 0
    assert 2 * (truth & (found.array > 0)).sum() > 0.7 * (truth.sum() + (found.array > 0).sum())
