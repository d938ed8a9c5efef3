"""The one exception that a user sees, and its stable codes.

Every refusal says what went wrong, where, what was expected, what came, and what to do. Codes never change
their meaning: scripts may rely on them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import StrEnum


class Code(StrEnum):
    """Stable names of refusals."""

    NO_CASES = "E_NO_CASES"
    """A folder holds no case that could be found."""
    MISSING = "E_MISSING"
    """A file that something refers to is not there (an image without a label, half of a pair)."""
    GRID = "E_GRID"
    """Two arrays that must share a grid differ in shape, position, spacing or direction."""
    NO_GEOMETRY = "E_NO_GEOMETRY"
    """A volume without a trustworthy position in space."""
    AFFINE = "E_AFFINE"
    """An affine that is singular, not finite, or of the wrong shape."""
    SHEAR = "E_SHEAR"
    """Axes of a volume that are not perpendicular."""
    FORM = "E_FORM"
    """A NIfTI file whose sform and qform disagree."""
    LABEL = "E_LABEL"
    """Label values that are not integers, or ids that nothing declares."""
    NONFINITE = "E_NONFINITE"
    """NaN or infinite voxels in an image."""
    FOUR_D = "E_4D"
    """More dimensions than were declared."""
    CHANNELS = "E_CHANNELS"
    """A case with other channels than expected."""
    UNSUPPORTED = "E_UNSUPPORTED"
    """A file of a kind that is not read."""
    TRUNCATED = "E_TRUNCATED"
    """A file that ends too early or fails its checksum."""
    MALFORMED = "E_MALFORMED"
    """A file whose structure breaks its format's rules (sequences nested without end)."""
    REFERENCE = "E_REFERENCE"
    """An annotation that refers to images that are not there, or that lie in another frame of reference."""
    LIMIT = "E_LIMIT"
    """A header that asks for an absurd amount of memory."""
    NOT_DICOM = "E_NOT_DICOM"
    """A file expected to be DICOM that is not."""
    CODEC = "E_CODEC"
    """A compressed transfer syntax for which no decoder is installed."""
    MULTI_SERIES = "E_MULTI_SERIES"
    """Several DICOM series where one was expected."""
    GAP = "E_GAP"
    """A slice is missing within a DICOM series."""
    DUPLICATE = "E_DUPLICATE"
    """Two slices at one position with different pixels."""
    TILT = "E_TILT"
    """Gantry tilt: slices are shifted against each other in-plane."""
    SPACING = "E_SPACING"
    """Slice spacing that varies."""
    MIXED = "E_MIXED"
    """Slices of different size or modality in one series."""
    PHOTOMETRIC = "E_PHOTOMETRIC"
    """A photometric interpretation that was not asked for (RGB, palette)."""
    DUPLICATE_ID = "E_DUPLICATE_ID"
    """Two cases with the same id."""
    UNPAIRED = "E_UNPAIRED"
    """Two evaluations that are not of the same cases, classes or references."""
    LEAK = "E_LEAK"
    """One patient in training and in validation."""
    CONFIG = "E_CONFIG"
    """A configuration key or value that is not understood."""
    NAME = "E_NAME"
    """A component name that is not registered."""
    MODEL = "E_MODEL"
    """Parts of a model, or a model and its data, that do not fit together."""
    CHECKPOINT = "E_CHECKPOINT"
    """A checkpoint that is damaged or incomplete."""
    RUN = "E_RUN"
    """A folder that is not a finished or started run."""
    OUTPUT = "E_OUTPUT"
    """An output that cannot be written, or that would overwrite something."""
    NAN_LOSS = "E_NAN_LOSS"
    """The training loss became NaN or infinite."""


class MedsegError(Exception):
    """A refusal with a stable code.

    Args:
        code: one of `Code`.
        message: what is wrong, one sentence without the file's name.
        where: the file, case id or configuration key concerned.
        expected: what would have been right.
        got: what came instead.
        remedy: what the user can do.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        self.code = code
        self.message = message
        self.where = where
        self.expected = expected
        self.got = got
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.message}"]
        for name in ("where", "expected", "got"):
            value = getattr(self, name)
            if value is not None:
                lines.append(f"  {name + ':':<10}{value}")
        if self.remedy is not None:
            lines.append(f"  {'remedy:':<10}{self.remedy}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.code, self.message, self.where, self.expected, self.got, self.remedy))


def _rebuild(code: Code, message: str, where: object, expected: object, got: object, remedy: str | None) -> MedsegError:
    return MedsegError(code, message, where=where, expected=expected, got=got, remedy=remedy)


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that names the closest known names, or all of them if none is close.

    Args:
        name: what the user wrote.
        known: what exists.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.55)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "choose one of: " + ", ".join(names)
