"""Expected calibration error against two other ways to compute it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from medseg.errors import MedsegError
from medseg.labels import IGNORE_INDEX
from medseg.metrics import calibration as calibration_module
from medseg.metrics.calibration import Decided, calibration


def case(seed: int = 0, sharpness: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(size=(4, 6, 7, 8))
    reference = np.argmax(logits + rng.gumbel(size=logits.shape), axis=0).astype(np.uint8)
    return torch.from_numpy(logits).softmax(0).numpy(), reference


def test_by_hand() -> None:
    probabilities = np.array([[0.9, 0.8, 0.3, 0.45], [0.1, 0.2, 0.7, 0.55]])
    found = calibration(probabilities, np.array([0, 1, 1, 1]), num_bins=2)
    assert found.counts.tolist() == [0, 4]
    assert found.ece == pytest.approx(abs((0.9 + 0.8 + 0.7 + 0.55) / 4 - 3 / 4))
    assert math.isnan(found.accuracy[0])


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_agrees_with_a_loop_and_with_the_papers_program(num_bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "_VOXELS_PER_CHUNK", 50)
    probabilities, reference = case()
    found = calibration(probabilities, reference, num_bins=num_bins)
    bins: dict[int, list[tuple[float, bool]]] = {}
    for voxel in np.ndindex(reference.shape):
        p = probabilities[(slice(None), *voxel)]
        bins.setdefault(math.ceil(p.max() * num_bins), []).append((p.max(), p.argmax() == reference[voxel]))
    gaps = {b: abs(np.mean([c for c, _ in v]) - np.mean([r for _, r in v])) for b, v in bins.items()}
    assert found.ece == pytest.approx(sum(len(v) * gaps[b] for b, v in bins.items()) / reference.size)
    assert found.mce == pytest.approx(max(gaps.values()))

    # the form of Guo et al.'s own program: a sum of masked means over the edges of the bins
    confidence, classes = torch.from_numpy(probabilities).max(0)
    right, edges, error = classes == torch.from_numpy(reference), torch.linspace(0, 1, num_bins + 1), 0.0
    for low, high in pairwise(edges):
        within = (confidence > low) & (confidence <= high)
        if within.any():
            gap = confidence[within].mean() - right[within].double().mean()
            error += float(gap.abs() * within.double().mean())
    assert found.ece == pytest.approx(error, rel=1e-6)


def test_channels_one_after_the_other_in_any_order_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "_VOXELS_PER_CHUNK", 50)
    probabilities, reference = case(2)
    expected = calibration(probabilities, reference)
    found = calibration((np.asfortranarray(channel)[::-1] for channel in probabilities), reference[::-1])
    assert found.ece == pytest.approx(expected.ece, rel=1e-12) and found.counts.tolist() == expected.counts.tolist()
    order = [2, 0, 3, 1]
    decided = Decided.of((probabilities[index] for index in order), order)
    np.testing.assert_array_equal(decided.classes, probabilities.argmax(0))
    box = (slice(1, 4), slice(2, 7), slice(0, 3))
    part = calibration(probabilities[(slice(None), *box)], reference[box])
    assert calibration(decided[box], reference[box]).ece == pytest.approx(part.ece)
    nothing = decided[(slice(0, 0),) * 3]
    assert math.isnan(calibration(nothing, reference[(slice(0, 0),) * 3]).ece)
    equal = Decided.of(np.full((3, 4), 1 / 3))
    assert equal.classes.tolist() == [0] * 4


def test_calibrated_and_overconfident() -> None:
    probabilities, reference = case(1)
    sharp = probabilities**6 / (probabilities**6).sum(0)
    assert calibration(probabilities, reference).ece < 0.07 < calibration(sharp, reference).ece
    perfect = np.eye(4)[reference].transpose(3, 0, 1, 2)
    assert calibration(perfect, reference).ece == 0


def test_ignored_voxels_and_those_outside_do_not_count() -> None:
    probabilities, reference = case()
    where = np.zeros(reference.shape, dtype=bool)
    where[2:5] = True
    part = calibration(probabilities[:, 2:5], reference[2:5])
    assert calibration(probabilities, reference, where=where).ece == pytest.approx(part.ece)
    assert calibration(probabilities, np.where(where, reference, IGNORE_INDEX)).ece == pytest.approx(part.ece)
    assert math.isnan(calibration(probabilities, np.full(reference.shape, IGNORE_INDEX)).ece)


def test_refusals() -> None:
    probabilities, reference = case()
    with pytest.raises(MedsegError, match="E_GRID"):
        calibration(probabilities, reference[1:])
    with pytest.raises(MedsegError, match="E_CONFIG.*(\n.*)*softmax"):
        calibration(np.log(probabilities), reference)
    with pytest.raises(MedsegError, match="E_CONFIG"):
        calibration(probabilities * np.nan, reference)
    with pytest.raises(MedsegError, match="E_CONFIG.*(\n.*)*negative"):
        calibration(np.stack([1.25 * probabilities[0] ** 0, -0.25 * probabilities[0] ** 0]), 0 * reference)
    with pytest.raises(MedsegError, match="E_GRID"):
        calibration(iter([probabilities[0], probabilities[1][1:]]), reference)
    with pytest.raises(MedsegError, match="E_GRID"):
        calibration(iter(()), reference)
    with pytest.raises(MedsegError, match="E_LABEL.*(\n.*)*0 … 3"):
        calibration(probabilities, reference + 1)
    with pytest.raises(MedsegError, match="num_bins"):
        calibration(probabilities, reference, num_bins=0)
