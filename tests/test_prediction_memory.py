"""The memory that a scan will need is planned before any work; what cannot be is refused with its sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.errors import MedsegError
from medseg.inference.memory import GIB, Footprint, plan_memory
from medseg.inference.prediction import Wanted
from medseg.volume import Grid

SCAN = Grid((300, 512, 512), np.diag([1.5, 0.8, 0.8, 1.0]))
LARGE = Footprint((300, 273, 273), (128, 128, 128), (128, 128, 128), 1, 41, 1)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def total(sizes: object) -> float:
    return sum(dict(sizes).values()) / GIB  # type: ignore[call-overload]


def test_logits_of_a_large_scan_are_held_some_planes_at_a_time() -> None:
    plan = plan_memory(SCAN, [LARGE], CPU, wanted=Wanted(), available=(64 * GIB, 64 * GIB))
    assert plan.dtype == torch.float32 and not plan.on_host
    assert plan.on_device["sums of logits"] == 41 * 128 * 273 * 273 * 4  # a tile deep, not 300 planes
    assert total(plan.on_device) < 4


def test_half_precision_where_full_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    full = total(plan_memory(SCAN, [LARGE], CPU, wanted=Wanted(), available=(64 * GIB, 64 * GIB)).on_device)
    plan = plan_memory(SCAN, [LARGE], CPU, wanted=Wanted(), available=((full - 0.1) * GIB, 0))
    assert plan.dtype == torch.float16 and total(plan.on_device) < full - 0.5
    assert "half precision" in caplog.text


def test_what_does_not_fit_is_refused_with_its_sizes() -> None:
    with pytest.raises(MedsegError, match="E_LIMIT") as caught:
        plan_memory(SCAN, [LARGE], CPU, wanted=Wanted(), available=(GIB, GIB))
    message = str(caught.value)
    assert "sums of logits 0.7" in message and "at most 1.00 GiB" in message and "41 classes" in message


def test_probabilities_lie_in_memory_or_in_a_file(tmp_path: Path) -> None:
    room = (8 * GIB, 8 * GIB)
    with pytest.raises(MedsegError, match="probabilities 6.0") as caught:
        plan_memory(SCAN, [LARGE], CPU, wanted=Wanted(probabilities=True), available=room)
    assert "without --probabilities" in str(caught.value)
    plan_memory(SCAN, [LARGE], CPU, wanted=Wanted(probabilities=True, scratch=tmp_path), available=room)


def test_several_plans_need_whole_logits() -> None:
    plan = plan_memory(SCAN, [LARGE, LARGE], CPU, wanted=Wanted(), available=(64 * GIB, 64 * GIB))
    assert plan.on_device["logits"] == 2 * 41 * 300 * 273 * 273 * 4


def test_a_gpu_has_memory_of_its_own() -> None:
    plan = plan_memory(SCAN, [LARGE], GPU, wanted=Wanted(), available=(8 * GIB, GIB))
    assert "labels" in plan.on_host and "labels" not in plan.on_device
    with pytest.raises(MedsegError, match="--device cpu"):
        plan_memory(SCAN, [LARGE], GPU, wanted=Wanted(), available=(GIB, 8 * GIB))
    with pytest.raises(MedsegError, match="main memory"):
        plan_memory(SCAN, [LARGE], GPU, wanted=Wanted(), available=(8 * GIB, GIB / 10))


def test_a_gpu_too_small_for_the_sums_leaves_them_to_main_memory(caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_memory(SCAN, [LARGE], GPU, wanted=Wanted(), available=(1.5 * GIB, 8 * GIB))
    assert plan.sums_on == CPU and plan.dtype == torch.float32
    assert set(plan.on_device) == {"image", "logits of tiles"} and "sums of logits" in plan.on_host
    assert "main memory" in caplog.text
    assert plan_memory(SCAN, [LARGE], GPU, wanted=Wanted(), available=(8 * GIB, 8 * GIB)).sums_on == GPU
