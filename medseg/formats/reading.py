"""What a user may ask of the readers beyond their strict defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Reading:
    """Options of reading; those of one format are ignored by the others."""

    series: str | None = None
    """SeriesInstanceUID to read where a DICOM folder holds several."""
    channels: bool = False
    """Whether several values per voxel are wanted: the 4th dimension of NIfTI, the colours of an RGB DICOM series."""
    resample_irregular: bool = False
    """Resample a DICOM series with gantry tilt, missing slices or uneven spacing to a regular rectangular grid instead
    of refusing it; `Volume.notes` then says so."""
    without_preamble: bool = False
    """Try DICOM on files without "DICM" at byte 128 (old archives)."""
    form: Literal["sform", "qform"] | None = None
    """What places a NIfTI file that sets both; None refuses those in which they disagree. A file that sets one of
    them is placed by that one."""
    without_form: bool = False
    """Read NIfTI files that set neither, with the axes to the right, anterior and superior and the origin at the first
    voxel, instead of refusing them; `Volume.notes` then says so."""


STRICT = Reading()
"""The defaults."""
