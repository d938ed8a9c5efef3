"""Whether the probabilities that `medseg predict --probabilities` wrote mean what they say: `evaluate --probabilities`.

Two numbers for each case: over all voxels, of which nearly all are easy background, and in the box around the
reference's structures with a margin, where it is decided what the label map is. The box does not depend on the
prediction, so that models are compared on the same voxels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading, open_volume
from medseg.formats.shares import FULL
from medseg.labels import IGNORE_INDEX, Labels
from medseg.metrics.calibration import Calibration, calibration
from medseg.reports.pairs import aligned, by_case
from medseg.statistics import Interval, bootstrap_means
from medseg.volume import Volume

CALIBRATION_FILE = "calibration.csv"
NEAR_MM = 10.0
"""Margin around the reference's structures in mm (pixels for pictures)."""
COLUMNS = ("ece", "mce", "num_voxels", "ece_near", "mce_near", "num_voxels_near")
SOURCE = (
    "Expected and maximum calibration error (Guo et al., ICML 2017): voxels in 15 bins of the confidence in their "
    "predicted class, mean and largest |accuracy - confidence|; of regions each is one question more, there or not. "
    f"near: in the box of the reference's structures with {NEAR_MM:g} mm (pixels) around it."
)
_CHANNEL = re.compile(r"_(\d{3})$")


@dataclass(frozen=True, eq=False)
class CaseCalibration:
    """The calibration of a case.

    Args:
        scan: of all voxels.
        near: of those near the reference's structures; empty where it has none.
    """

    scan: Calibration
    near: Calibration

    def cells(self) -> list[float]:
        """The values of `COLUMNS`."""
        return [value for one in (self.scan, self.near) for value in (one.ece, one.mce, float(one.counts.sum()))]


class Probabilities:
    """A folder of probabilities, by case.

    Args:
        place: the folder that `medseg predict --probabilities` wrote, or one file.
        case: of a single file.
    Raises:
        MedsegError: E_MISSING, E_NO_CASES, E_DUPLICATE_ID.
    """

    def __init__(self, place: Path, case: str | None = None) -> None:
        if not place.exists():
            raise MedsegError(Code.MISSING, "there is no such file or folder", where=place.name)
        self.place = place
        self.files: dict[str, list[Path]] = {}
        if place.is_file() and case is not None:
            self.files[case] = [place]
            return
        for name, path in by_case(place).items():  # by name: of pictures each channel is a file
            of_picture = path.suffix.lower() == ".png"
            self.files.setdefault(_CHANNEL.sub("", name) if of_picture else name, []).append(path)

    def read(self, case: str, reading: Reading = STRICT) -> Volume:
        """Float32 (K, *S).

        Raises:
            MedsegError: E_MISSING, and what the readers refuse.
        """
        paths = self.files.get(case)
        if paths is None:
            raise MedsegError(
                Code.MISSING,
                "there are no probabilities of a case",
                where=case,
                got=f"{len(self.files)} other cases in {self.place.name}",
                remedy="predict it again with --probabilities, or leave --probabilities out here",
            )
        volumes = [open_volume(path, replace(reading, channels=True)) for path in paths]
        if not volumes[0].grid.is_picture:
            return volumes[0]
        return replace(volumes[0], array=np.concatenate([volume.array for volume in volumes]) / np.float32(FULL))


def calibrated(probabilities: Volume, reference: Volume, labels: Labels, case: str) -> CaseCalibration:
    """Compare the probabilities of a case with what is there.

    Args:
        probabilities: (K, *S), on the reference's grid; its axes may be flipped or permuted.
        reference: label map with the values of files.
        labels: the classes, or regions.
        case: for messages.
    Raises:
        MedsegError: E_GRID, E_LABEL for another number of classes, E_CONFIG for what are no probabilities.
    """
    shares = np.asarray(aligned(probabilities, reference.grid, case).array)
    if len(shares) != labels.num_outputs:
        raise MedsegError(
            Code.LABEL,
            "the probabilities are of other classes",
            where=case,
            expected=f"{labels.num_outputs}: {', '.join(labels.region_names or labels.names)}",
            got=f"{len(shares)} channels",
            remedy="say which classes the model knows with --labels, all of them in their order",
        )
    truth = labels.to_index(reference.array, where=f"{case} (reference)")
    box = _near(truth, reference.grid.spacing_mm)
    return CaseCalibration(_of(shares, truth, labels), _of(shares[(slice(None), *box)], truth[box], labels))


def interval_of(of_cases: Mapping[str, CaseCalibration], patients: Mapping[str, str], *, near: bool) -> Interval:
    """The mean ECE of the cases with its bootstrap interval, over patients where they are known."""
    values = [[(one.near if near else one.scan).ece] for one in of_cases.values()]
    return bootstrap_means(np.array(values), [patients.get(case, case) for case in of_cases])[0]


def pooled(of_cases: Mapping[str, CaseCalibration], *, near: bool) -> Calibration:
    """All voxels of all cases together: the bins of a reliability diagram."""
    return reduce(add, ((one.near if near else one.scan) for one in of_cases.values()))


def calibration_table(of_cases: Mapping[str, CaseCalibration]) -> list[list[str]]:
    """The rows of `CALIBRATION_FILE`."""
    rows = [[case, *("" if math.isnan(v) else f"{v:.6g}" for v in one.cells())] for case, one in of_cases.items()]
    return [["case", *COLUMNS], *rows]


def to_json(of_cases: Mapping[str, CaseCalibration], patients: Mapping[str, str]) -> dict[str, Any]:
    """As plain values."""
    found: dict[str, Any] = {"definition": SOURCE}
    for name, near in (("scan", False), ("near", True)):
        mean, bins = interval_of(of_cases, patients, near=near), pooled(of_cases, near=near)
        found[name] = {
            "mean_ece": _plain(mean.mean),
            "low": _plain(mean.low),
            "high": _plain(mean.high),
            "pooled_ece": _plain(bins.ece),
            "bins": {
                "num_voxels": bins.counts.tolist(),
                "confidence": [_plain(value) for value in bins.confidence.tolist()],
                "accuracy": [_plain(value) for value in bins.accuracy.tolist()],
            },
        }
    found["cases"] = {
        case: {name: _plain(value) for name, value in zip(COLUMNS, one.cells(), strict=True)}
        for case, one in of_cases.items()
    }
    return found


def _of(shares: NDArray[Any], truth: NDArray[np.uint8], labels: Labels) -> Calibration:
    if not labels.regions:
        return calibration(shares, truth)
    inside = labels.membership()[truth]
    ignored = truth == IGNORE_INDEX
    each = [
        calibration(np.stack([1 - share, share]), np.where(ignored, IGNORE_INDEX, inside[..., region]))
        for region, share in enumerate(shares)
    ]
    return reduce(add, each)


def _near(truth: NDArray[np.uint8], spacing_mm: Sequence[float]) -> tuple[slice, ...]:
    """The box of the foreground with a margin; an empty one without foreground."""
    found = np.nonzero((truth > 0) & (truth != IGNORE_INDEX))
    if not found[0].size:
        return (slice(0, 0),) * truth.ndim
    margins = [math.ceil(NEAR_MM / spacing) for spacing in spacing_mm]
    return tuple(
        slice(max(0, int(places.min()) - margin), int(places.max()) + 1 + margin)
        for places, margin in zip(found, margins, strict=True)
    )


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
