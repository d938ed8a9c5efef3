"""The benchmark for GPUs, as far as a processor can try it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The script as a module."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import bench_gpu

        yield bench_gpu
    finally:
        sys.path.remove(str(SCRIPTS))


def test_it_runs_on_a_processor_where_it_means_nothing(bench, tmp_path: Path) -> None:
    """Steps, loop, augmentation, counting and prediction of a tiny network, in this process."""
    (network,) = bench.TINY.values()
    bench.write_raw(tmp_path, network)
    task = {"network": vars(network), "device": "cpu", "compiled": "off", "side": "medseg", "scan": bench.TINY_SCAN,
            "times": {"warm": 1, "steps": 2, "rounds": 2}}  # fmt: skip
    task = json.loads(json.dumps(task))  # as it is handed to another process
    step = bench.measure(tmp_path, {**task, "what": "step"})
    predicted = bench.measure(tmp_path, {**task, "what": "prediction"})
    for name in ("step", "loop", "augmentation"):
        assert len(step[name]) == 2 and min(step[name]) > 0
    assert min(predicted["plain"]) > 0 and min(predicted["mirrored"]) > 0
    assert step["operations"] == _operations_by_hand(network)

    results = {
        "steps": {"tiny": {"batch": network.batch, "rows": [{"side": "medseg", "compiled": "off", **step}]}},
        "prediction": [{"side": "medseg", "compiled": "off", **predicted}],
        "hippocampus": [{"minutes": 2, "dice": 0.8911, "steps": 900}],
        "environment": {"cores": 2, "processor": "p", "python": "3", "load": 1.0, "medseg": {}, "peers": {}},
        "device": bench.describe("cpu"),
        "peers": False,
        "goal": bench.GOAL,
    }
    text = bench.page(json.loads(json.dumps(results)))
    assert "| tiny | medseg, " in text and "is not known to the script: no share" in text
    assert "nnU-Net took no part" in text and "| 2 | 900 | 0.8911 |" in text
    known = {**results, "device": {"name": "NVIDIA H100 80GB HBM3", "memory": 80 * 2**30, "cuda": "13.0"}}
    share = step["operations"] / min(step["step"]) / 989.4e12
    assert f"| {share:.1%} |" in bench.page(known) and "989 · 10¹²" in bench.page(known)


def _operations_by_hand(network) -> int:
    """Two for each multiply-add: two stages with two convolutions each, one down, one up, and a head for each level.

    The deep supervision of two stages is the one head of the full resolution. The backward pass takes each convolution
    twice, but the first only for its weights.
    """
    (a, b), n = network.widths, network.batch
    full = network.patch[0] * network.patch[1] * network.patch[2]
    half = full // 8
    first = full * 27 * 1 * a
    others = full * 27 * a * a  # second of the first stage
    others += half * 27 * a * b + half * 27 * b * b  # second stage, the first with stride 2
    others += half * 8 * b * a  # up: 2×2×2 transposed
    others += full * 27 * 2 * a * a + full * 27 * a * a  # after the skip
    others += full * a * 3  # head
    return 2 * n * (2 * first + 3 * others)


def test_peaks_are_known_by_the_names_that_drivers_give(bench) -> None:
    assert bench.peak_of("NVIDIA H100 80GB HBM3") == bench.peak_of("NVIDIA H200") == 989.4e12
    assert bench.peak_of("NVIDIA H100 PCIe") == 756e12
    assert bench.peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert bench.peak_of("NVIDIA A10") == 125e12 != bench.peak_of("NVIDIA A100-PCIE-40GB")
    assert bench.peak_of("NVIDIA L4") == 121e12 and bench.peak_of("NVIDIA L40S") == 362.1e12
    assert bench.peak_of("NVIDIA A1000") is None and bench.peak_of("no GPU: the processor") is None


@pytest.mark.slow
@pytest.mark.parametrize("part", ["step", "prediction"])
def test_its_command_line(part: str) -> None:
    command = [sys.executable, str(SCRIPTS / "bench_gpu.py"), "--device", "cpu", "--tiny", "--only", part]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "# On a GPU" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(SCRIPTS / "bench_gpu.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "there is no CUDA device" in done.stderr
