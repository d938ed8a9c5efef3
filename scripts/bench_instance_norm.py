#!/usr/bin/env python3
"""Three ways to compute an instance normalisation on a CPU, forward and backward, as ratios to the one that is used.

    python scripts/bench_instance_norm.py    seconds; prints a table and writes docs/benchmarks/instance_norm.md

The ways take turns, A B C A B C, and the minimum over the rounds counts: other work can only make them slower.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from medseg.models.blocks.normalisation import InstanceNorm

TABLE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "instance_norm.md"
SHAPES = ((4, 16, 40, 56, 40), (4, 32, 20, 28, 20), (4, 128, 5, 7, 5))
ROUNDS = 15
Way = Callable[[torch.Tensor], torch.Tensor]


def ways(channels: int) -> dict[str, Way]:
    """Name to function; the first is medseg's."""
    ours = InstanceNorm(channels)
    return {
        "per-image batch norm (medseg)": ours,
        "F.instance_norm": lambda x: F.instance_norm(x, weight=ours.weight, bias=ours.bias),
        "F.group_norm, a channel per group": lambda x: F.group_norm(x, channels, ours.weight, ours.bias),
    }


def seconds(way: Way, x: torch.Tensor, gradient: torch.Tensor) -> float:
    """One forward and backward pass."""
    begin = time.perf_counter()
    torch.autograd.backward(way(x), gradient)
    return time.perf_counter() - begin


def main() -> None:
    """Measure and write the table."""
    cores = len(os.sched_getaffinity(0))
    lines = [
        "# Instance normalisation on a CPU",
        "",
        f"Made by `python scripts/bench_instance_norm.py` on {cores} core(s), torch {torch.__version__}:",
        "channels-last, forward and backward, minimum of rounds in turn. Times as multiples of medseg's way.",
        "",
        "| shape | type | " + " | ".join(ways(1)) + " |",
        "|---|---|" + "---|" * len(ways(1)),
    ]
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last_3d).requires_grad_()
            gradient = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last_3d)
            chosen = ways(shape[1])
            best = dict.fromkeys(chosen, float("inf"))
            for _ in range(ROUNDS):
                for name, way in chosen.items():
                    best[name] = min(best[name], seconds(way, x, gradient))
            ours = next(iter(best.values()))
            ratios = " | ".join(f"{value / ours:.1f}" for value in best.values())
            lines.append(f"| {'×'.join(map(str, shape))} | {str(dtype).removeprefix('torch.')} | {ratios} |")
    TABLE.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
