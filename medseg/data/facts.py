"""What a survey finds: numbers about every case, never arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medseg.documents import parse_json
from medseg.errors import Code, MedsegError
from medseg.labels import Labels

AXIS_PAIRS = ("LR", "PA", "IS")
"""The two directions of each anatomical axis."""


def axis_of(letter: str) -> str:
    """The anatomical axis of a direction: "LR" of L and of R."""
    return next(pair for pair in AXIS_PAIRS if letter in pair)


@dataclass(frozen=True)
class ChannelStats:
    """Intensities of one channel."""

    minimum: float
    """Over all voxels."""
    maximum: float
    """Over all voxels."""
    mean: float
    """Over the sampled voxels, as all that follow."""
    std: float
    p00_5: float
    """0.5th percentile."""
    p50: float
    p99_5: float
    num_foreground: int
    """Foreground voxels that the sample was drawn from; 0 where there are none and all voxels were taken instead."""


@dataclass(frozen=True)
class CaseInfo:
    """What is known of one case. Axes are in the file's order."""

    case_id: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    """Along the array's axes; 1 pixel for pictures."""
    orientation: str
    """Anatomical directions of the axes; "" for pictures."""
    modality: str | None
    label_voxels: tuple[int, ...]
    """Voxels of each class, in the order of `Survey.labels`; those that are ignored are none of them."""
    intensity: tuple[ChannelStats, ...]
    """One per channel."""
    nonzero_shape: tuple[int, ...]
    """Of the box of voxels that are not 0 in any channel; the whole shape where all are 0."""
    ignored_voxels: int = 0
    """Voxels whose label is ignored."""
    notes: tuple[str, ...] = ()
    """What is to be known of how its voxels came to be (`Volume.notes`)."""

    def axes_along(self, orientation: str) -> tuple[int, ...]:
        """For each letter of an orientation the array's axis that runs along it, either way; all axes of a picture."""
        if not self.orientation:
            return tuple(range(len(self.shape)))
        stored = [axis_of(letter) for letter in self.orientation]
        return tuple(stored.index(axis_of(letter)) for letter in orientation)


@dataclass(frozen=True)
class Anomaly:
    """A case that is unlike the rest, and in what, in words."""

    case_id: str
    """Or "12 cases", a group that is far in the same way."""
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """Why a case, or something else in the folder, cannot be used."""

    case_id: str
    code: str
    message: str


@dataclass(frozen=True)
class Survey:
    """What a data folder holds."""

    layout: str
    """What kind of folder it is, in words."""
    spatial_dims: int
    """2 or 3."""
    num_channels: int
    channel_names: tuple[str, ...]
    labels: Labels
    labels_from: str
    """Who named the classes: "data.labels", "dataset" (dataset.json or manifest), "values found" or "structures found"
    (in all cases)."""
    cases: tuple[CaseInfo, ...]
    """The good cases, sorted by id."""
    median_shape: tuple[int, ...]
    """Along the model's axes (`MODEL_ORIENTATION`; row, column for pictures)."""
    median_spacing_mm: tuple[float, ...]
    """Along the model's axes."""
    intensity: tuple[ChannelStats, ...]
    """Per channel, over foreground voxels of all cases, equally many of each."""
    quarantine: tuple[Problem, ...] = ()
    """Cases left out (`on_bad_case="skip"`)."""
    structures: Mapping[str, tuple[str, ...]] | None = None
    """Class name → the structures of DICOM annotations that mean it; None where labels are files."""
    left_out: tuple[str, ...] = ()
    """What lies in the folder and is no case, in words."""
    anomalies: tuple[Anomaly, ...] = ()
    """Cases that are unlike the rest."""

    @property
    def modality(self) -> str | None:
        """The modality of all cases; None where they differ or the files do not tell."""
        modalities = {case.modality for case in self.cases}
        return modalities.pop() if len(modalities) == 1 else None

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {**asdict(self), "labels": self.labels.to_json()}


def read_survey(path: Path) -> dict[str, Any]:
    """What `Survey.to_json` gave, from the file that a run keeps of it.

    Raises:
        MedsegError: E_RUN if it is not there, or is none.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        counted = (
            isinstance(case["case_id"], str) and [int(n) for n in case["label_voxels"]] for case in content["cases"]
        )
        if not all(counted):
            raise ValueError("cases without ids or without voxels")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedsegError(
            Code.RUN,
            "what the run found in its data cannot be read",
            where=path.name,
            got=f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else error.strerror,
            remedy="make it again: medseg plan data.root=FOLDER writes it beside the plan",
        ) from error
    found: dict[str, Any] = content
    return found
