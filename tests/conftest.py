"""Fixtures that all tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class TinyRun:
    """A finished run on coarse phantoms, and a case that it has never seen. Tests read it; none writes into it.

    Args:
        run: the run, as `medseg train` leaves it, alone in its folder.
        data: its training data (`data.root`).
        dicom: the held-out case, a DICOM series.
        label: the reference of the held-out case, on the grid of the series.
    """

    run: Path
    data: Path
    dicom: Path
    label: Path


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Hydra's log handlers go with the test that trained: their streams are closed afterwards."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in root.handlers[:]:
        if handler not in before and type(handler) in (logging.StreamHandler, logging.FileHandler):
            root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A U-Net of a few thousand weights after ten steps on four phantoms: whole, but no good."""
    from rich.console import Console

    from medseg.config import compose
    from medseg.phantom import write_phantoms
    from medseg.training.train import train

    folder = tmp_path_factory.mktemp("tiny")
    phantom = write_phantoms(folder / "data", num_train=4, size=0.4)
    overrides = [
        f"data.root='{phantom.train}'",
        "data.split.num_folds=2",  # two cases to validate: a worst one and another
        "data.plan.base_width=4",
        "data.plan.num_stages=3",
        "data.plan.patch_size=[16,24,24]",
        "trainer.device=cpu",
        "trainer.max_steps=10",
        "trainer.num_validations=2",
        "trainer.log_steps=2",
        "trainer.overlay_cases=1",
    ]
    run = folder / "runs" / "2000-01-01_12-00-00_unet"
    run.mkdir(parents=True)
    experiment = compose("train", overrides)
    with (folder / "console.txt").open("w", encoding="utf-8") as log:
        train(experiment, run, Console(file=log))
    (held_out,) = phantom.test_cases
    return TinyRun(run, phantom.train, phantom.test / held_out, phantom.test_labels / f"{held_out}.nii.gz")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; the test is skipped where it is absent."""
    root = Path(os.environ.get("MEDSEG_DATA", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip("real images not found: set MEDSEG_DATA")
    return root
