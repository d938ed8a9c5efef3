"""On a CUDA device: the same roads as on the CPU, with the same results."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from medseg.bundle import load_bundle
from medseg.config import compose
from medseg.formats import open_volume
from medseg.inference.predictor import Predictor
from medseg.inference.sliding_window import WindowConfig
from medseg.training.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_train_and_predict(tiny_run, tmp_path: Path, padding: str, precision: str) -> None:
    overrides = [
        f"data.root='{tiny_run.data}'", "trainer.device=cuda", f"trainer.precision={precision}", "trainer.max_steps=3",
        "trainer.log_steps=1", "trainer.num_validations=1", "data.plan.base_width=4", "data.plan.num_stages=2",
        f"model.padding={padding}", "model.down=max_pool", "model.deep_supervision=false",
    ]  # fmt: skip
    with (tmp_path / "log.txt").open("w") as log:
        result = train(compose("train", overrides), tmp_path / "run", Console(file=log))
    assert result.steps == 3 and result.evaluation is not None
    assert math.isfinite(result.best_dice)


def test_predictions_agree_with_the_cpu(tiny_run) -> None:
    scan = open_volume(tiny_run.dicom)
    labels = [
        Predictor(load_bundle(tiny_run.run, device=device), WindowConfig()).predict(scan).array
        for device in ("cpu", "cuda")
    ]
    assert np.mean(labels[0] == labels[1]) > 0.999
