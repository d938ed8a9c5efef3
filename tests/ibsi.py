"""The digital phantom of the IBSI, and the values that the initiative agreed on for it.

Source: Zwanenburg et al., The Image Biomarker Standardization Initiative, Radiology 2020, and its reference manual
(arXiv:1612.07003v11), data sets and values under CC BY 4.0. Values are rounded to three digits there.
"""

import csv
from pathlib import Path

import numpy as np

SPACING_MM = (2.0, 2.0, 2.0)
TEXTURES = ("2d", "2d-merged", "2.5d", "2.5d-merged", "3d", "3d-merged")
TABLE = Path(__file__).with_name("ibsi_digital_phantom.csv")
"""feature, texture (empty where it has no part in it), value, tolerance (as published; empty: in the last digit)."""

IMAGE = np.array(
    [
        [[4, 4, 6, 4, 1], [4, 1, 6, 4, 1], [1, 4, 6, 1, 1], [1, 4, 4, 1, 1]],
        [[4, 4, 6, 1, 1], [1, 1, 3, 1, 1], [1, 1, 6, 1, 1], [1, 4, 4, 1, 1]],
        [[1, 1, 6, 1, 1], [1, 1, 9, 1, 1], [1, 1, 1, 1, 1], [1, 4, 4, 1, 1]],
        [[1, 1, 6, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 4, 4, 1, 1]],
    ],
    dtype=np.float32,
)
"""Axes: slice, row, column."""
MASK = np.array(
    [
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        [[1, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
    ],
    dtype=bool,
)


def reference() -> list[tuple[str, str, float, float | None]]:
    """(feature, texture, value, tolerance) of the table."""
    with TABLE.open(newline="") as file:
        return [
            (row["feature"], row["texture"], float(row["value"]), float(row["tolerance"]) if row["tolerance"] else None)
            for row in csv.DictReader(file)
        ]


def agrees(value: float, published: float, tolerance: float | None) -> bool:
    """Whether a value is the published one: within its tolerance, or the same when rounded to three digits.

    A little more than half of the last digit is allowed: the manual rounds some values the other way.
    """
    digit = 10.0 ** (np.floor(np.log10(abs(published))) - 2) if published else 1e-3
    return abs(value - published) <= max(0.51 * digit, tolerance or 0.0)
