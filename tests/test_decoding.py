"""From logits to labels, probabilities and uncertainty on the scan's grid: by slabs as all at once, and in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import peak
import pytest
import torch

from medseg.inference.decoding import Decoding
from medseg.inference.prediction import Wanted
from medseg.inference.predictor import decode
from medseg.labels import Labels
from medseg.resampling import resample
from medseg.volume import Grid, Volume

LABELS = Labels.from_mapping({f"c{i}": i for i in range(5)})
REGIONS = Labels.from_mapping({"background": 0, "whole": [1, 2], "core": 2})
MORE = Wanted(probabilities=True, uncertainty=True)


def logits_of(num: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn((num, *shape), generator=torch.Generator().manual_seed(1))).to(dtype)


def opinions(logits: torch.Tensor, labels: Labels, disagreement: float = 0.0) -> torch.Tensor:
    """The channels of a network: logits, probabilities, and how much of their entropy is disagreement."""
    shares = logits.sigmoid() if labels.regions else logits.softmax(0)
    return torch.cat([logits, shares, torch.full_like(logits[:1], disagreement)])


def in_pieces(logits: torch.Tensor, sizes: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """As the window gives them: each piece is overwritten when the next is asked for."""
    first = 0
    while first < logits.shape[1]:
        size = sizes[first % len(sizes)]
        piece = logits[:, first : first + size].clone()
        yield first, piece
        piece.fill_(float("nan"))
        first += size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(51, 33, 42), (20, 17, 40), (26, 9, 60), (26, 17, 21), (200, 17, 21), (1, 4, 4)])
@pytest.mark.parametrize("sizes", [[26], [5, 3, 1], [1]])
def test_slabs_equal_the_argmax_of_the_full_interpolation(
    dtype: torch.dtype, shape: tuple[int, ...], sizes: list[int]
) -> None:
    logits = logits_of(5, (26, 17, 21), dtype)
    decoding = Decoding(LABELS, grid := Grid(shape, np.eye(4)), grid)
    decoding.fill_resampled(in_pieces(logits, sizes), 26)
    assert np.array_equal(decoding.indices.array, resample(logits, shape).argmax(0).numpy())


@pytest.mark.parametrize("labels", [LABELS, REGIONS])
@pytest.mark.parametrize("orientation", ["RAS", "SPL", "AIL"])
def test_probabilities_and_uncertainty(labels: Labels, orientation: str) -> None:
    scan = Grid((19, 21, 23), np.diag([1.0, 2.0, 3.0, 1.0]))
    covered = scan.reoriented(orientation)
    logits = logits_of(labels.num_outputs, (8, 9, 10))
    decoding = Decoding(labels, covered, scan, MORE)
    decoding.fill_resampled([(0, opinions(logits, labels, 0.125))], 8)
    full = resample(logits, covered.shape)
    expected = full.sigmoid() if labels.regions else full.softmax(0)
    turned = Volume(expected.numpy(), covered).oriented_as(scan).array
    assert decoding.probabilities is not None and decoding.uncertainty is not None
    assert decoding.probabilities.array.dtype == np.float16 and decoding.probabilities.grid is scan
    np.testing.assert_allclose(decoding.probabilities.array, turned, atol=1e-3)
    mean = resample(opinions(logits, labels)[labels.num_outputs : -1], covered.shape)
    parts = [mean, 1 - mean] if labels.regions else [mean]
    entropy = -sum((p * p.clamp(min=1e-30).log()).sum(0) for p in parts)
    largest = 2 * np.log(2) if labels.regions else np.log(5)
    share = entropy / largest
    np.testing.assert_allclose(
        decoding.uncertainty.array, Volume(share.numpy(), covered).oriented_as(scan).array, atol=1e-3
    )
    assert decoding.disagreement is not None and decoding.disagreement.grid is scan
    np.testing.assert_allclose(decoding.disagreement.array, 0.125 / largest, atol=1e-3)
    plain = decode(logits, covered, labels, scan)
    assert np.array_equal(decoding.indices.array, plain.array)  # labels are the same, whatever else is wanted


def test_uncertainty_goes_from_none_to_all() -> None:
    grid = Grid((4, 4, 4), np.eye(4))
    for logits, expected in ((torch.zeros(5), 1.0), (torch.tensor([0.0, 90, 0, 0, 0]), 0.0)):
        decoding = Decoding(LABELS, grid, grid, MORE)
        decoding.fill_resampled([(0, opinions(logits.view(5, 1, 1, 1).expand(5, 2, 2, 2), LABELS))], 2)
        assert decoding.uncertainty is not None
        np.testing.assert_allclose(decoding.uncertainty.array, expected, atol=1e-3)


def test_outside_a_crop_it_is_background_for_certain() -> None:
    scan = Grid((12, 10, 8), np.eye(4))
    part = scan.boxed((slice(2, 9), slice(0, 10), slice(3, 7)))
    logits = torch.tensor([0.0, 9, 0, 0, 0]).view(5, 1, 1, 1).expand(5, 7, 10, 4)
    decoding = Decoding(LABELS, part, scan, MORE)
    decoding.fill_resampled([(0, opinions(logits, LABELS))], 7)
    inside = np.zeros(scan.shape, dtype=bool)
    inside[2:9, :, 3:7] = True
    assert decoding.probabilities is not None and decoding.uncertainty is not None
    assert np.array_equal(decoding.indices.array == 1, inside)
    np.testing.assert_allclose(decoding.probabilities.array.sum(0), 1, atol=2e-3)
    assert (decoding.probabilities.array[0][~inside] == 1).all()
    assert (decoding.uncertainty.array[~inside] == 0).all()


def test_probabilities_in_a_file_without_a_name(tmp_path: Path) -> None:
    grid = Grid((5, 6, 7), np.eye(4))
    logits = logits_of(5, (5, 6, 7))
    found = []
    for scratch in (None, tmp_path):
        decoding = Decoding(LABELS, grid, grid, Wanted(probabilities=True, scratch=scratch))
        decoding.fill_resampled([(0, logits)], 5)
        assert decoding.probabilities is not None
        found.append(decoding.probabilities.array)
    assert isinstance(found[1], np.memmap) and not isinstance(found[0], np.memmap)
    assert np.array_equal(found[0], found[1]) and found[1].any()
    assert not list(tmp_path.iterdir())


MEMORY = (
    peak.IMPORT
    + """
import numpy as np, torch
from medseg.inference.predictor import decode
from medseg.labels import Labels
from medseg.volume import Grid
torch.set_num_threads(2)
labels = Labels.from_mapping({f"c{i}": i for i in range(30)})
small, scan = Grid((40, 40, 40), np.eye(4)), Grid((256, 256, 256), np.eye(4))
logits = torch.ones((30, 100, 100, 100), dtype=torch.float16)
decode(logits[:, :20, :20, :20].contiguous(), small, labels, small)
before = peak_bytes()
decode(logits, scan, labels, scan)
print((peak_bytes() - before) / 2**20)
"""
)


@pytest.mark.skipif(sys.platform == "win32", reason="getrusage")
def test_memory_beside_logits_and_labels_is_a_few_slabs() -> None:
    """The labels are 16 MiB. Of one class all planes would be 64 MiB, of all classes 1,920."""
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, timeout=300)
    assert float(done.stdout) <= 16 + 100
