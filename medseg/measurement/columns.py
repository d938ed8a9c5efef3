"""The columns of a table of features that describe its rows."""

from __future__ import annotations

ABOUT = (
    "case",
    "patient",
    "label",
    "value",
    "modality",
    "unit",
    "spacing",
    "resampled",
    "bins",
    "counted",
    "texture",
    "slices_along",
    "voxels",
    "levels",
    "medseg",
    "missing",
)
"""They come first; docs/measure.md says what they mean. All others are features."""
