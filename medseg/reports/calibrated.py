"""Whether the probabilities that `medseg predict --probabilities` wrote mean what they say: `evaluate --probabilities`.

Two numbers for each case: over all voxels, of which nearly all are easy background, and in the box around the
reference's structures with a margin, where it is decided what the label map is. The box does not depend on the
prediction, so that models are compared on the same voxels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading, open_channels
from medseg.formats.label_table import read_labels
from medseg.formats.shares import FULL
from medseg.labels import IGNORE_INDEX, TABLE_FILE, Labels
from medseg.metrics.calibration import Calibration, Decided, calibration, slabs
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
LEAST_GAIN = 0.5
"""Channels that fit the label map better in another order are refused where the Dice of the classes, added up, grow by
more than this: labels are the argmax but for post-processing, and two classes that change places gain 2."""
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

    @classmethod
    def missing(cls) -> CaseCalibration:
        """Of a case that was not predicted: undefined."""
        return cls(Calibration.of_nothing(), Calibration.of_nothing())

    def cells(self) -> list[float]:
        """The values of `COLUMNS`."""
        return [value for one in (self.scan, self.near) for value in (one.ece, one.mce, float(one.counts.sum()))]


@dataclass(frozen=True)
class Shares:
    """The probabilities of a case.

    Args:
        number: of channels.
        channels: one after the other, each (*S).
        classes: of which classes or regions they are, in their order, where a table tells.
    """

    number: int
    channels: Iterator[Volume]
    classes: Labels | None = None


class Probabilities:
    """A folder of probabilities, by case.

    Args:
        place: the folder that `medseg predict --probabilities` wrote, or one file; the table in it or beside it tells
            of which classes.
        case: of a single file.
    Raises:
        MedsegError: E_MISSING, E_NO_CASES, E_DUPLICATE_ID, E_LABEL for a table that cannot be read.
    """

    def __init__(self, place: Path, case: str | None = None) -> None:
        if not place.exists():
            raise MedsegError(Code.MISSING, "there is no such file or folder", where=place.name)
        self.place = place
        folder = place.absolute() if place.is_dir() else place.absolute().parent
        tables = (read_labels(at / TABLE_FILE) for at in (folder, folder.parent))
        self.classes = next((table for table in tables if table is not None), None)
        self.files: dict[str, list[Path]] = {}
        if place.is_file() and case is not None:
            self.files[case] = [place]
            return
        for name, path in by_case(place).items():  # by name: of pictures each channel is a file
            of_picture = path.suffix.lower() == ".png"
            self.files.setdefault(_CHANNEL.sub("", name) if of_picture else name, []).append(path)

    def read(self, case: str, reading: Reading = STRICT) -> Shares:
        """The channels of a case, float32; of NIfTI only one in memory at a time.

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
        if len(paths) > 1:
            return Shares(len(paths), (_grey(path, reading) for path in paths), self.classes)
        number, channels = open_channels(paths[0], reading)
        return Shares(number, map(_as_shares, channels), self.classes)


def calibrated(
    shares: Shares, reference: Volume, labels: Labels, case: str, *, predicted: Volume | None = None
) -> CaseCalibration:
    """Compare the probabilities of a case with what is there.

    Args:
        shares: channels on the reference's grid; their axes may be flipped or permuted. Where they do not know their
            classes these are those of `labels`, in their order.
        reference: label map with the values of files.
        labels: the classes, or regions.
        case: for messages.
        predicted: the label map that came of the probabilities: channels that fit it in another order are refused.
    Raises:
        MedsegError: E_GRID, E_LABEL for other classes or another order of them, E_CONFIG for what are no probabilities.
    """
    order = _order(shares, labels, case)
    truth = labels.to_index(reference.array, where=f"{case} (reference)")
    box = _near(truth, reference.grid.spacing_mm)
    label = None
    if predicted is not None:
        label = labels.to_index(aligned(predicted, reference.grid, case).array, where=f"{case} (prediction)")
    channels = (np.asarray(aligned(volume, reference.grid, case).array) for volume in shares.channels)
    if labels.regions:
        return _of_regions(channels, order, truth, box, labels, label, case)
    decided = Decided.of(channels, order)
    found = CaseCalibration(calibration(decided, truth), calibration(decided[box], truth[box]))
    if label is not None:
        joint = np.zeros((labels.num_classes, IGNORE_INDEX + 1), np.int64)
        for part in slabs(decided.confidence):
            both = decided.classes[part].astype(np.int64) * joint.shape[1] + label[part]
            joint += np.bincount(both.ravel(), minlength=joint.size).reshape(joint.shape)
        foreground = slice(1, labels.num_classes)
        sizes = joint.sum(axis=1)[foreground], joint.sum(axis=0)[foreground]
        _refuse_other_order(joint[foreground, foreground], *sizes, labels, case)
    return found


def interval_of(of_cases: Mapping[str, CaseCalibration], patients: Mapping[str, str], *, near: bool) -> Interval:
    """The mean ECE of the cases with its bootstrap interval, over patients where they are known."""
    values = [[(one.near if near else one.scan).ece] for one in of_cases.values()]
    return bootstrap_means(np.array(values), [patients.get(case, case) for case in of_cases])[0]


def num_defined(of_cases: Mapping[str, CaseCalibration], *, near: bool) -> int:
    """Of how many cases that is the mean: not of those without a prediction, nor near structures that are not there."""
    return sum(bool((one.near if near else one.scan).counts.any()) for one in of_cases.values())


def pooled(of_cases: Mapping[str, CaseCalibration], *, near: bool) -> Calibration:
    """All voxels of all cases together: the bins of a reliability diagram."""
    return reduce(add, ((one.near if near else one.scan) for one in of_cases.values()))


def calibration_table(of_cases: Mapping[str, CaseCalibration]) -> list[list[str]]:
    """The rows of `CALIBRATION_FILE`."""
    rows = [[case, *("" if math.isnan(v) else f"{v:.6g}" for v in one.cells())] for case, one in of_cases.items()]
    return [["case", *COLUMNS], *rows]


def to_json(of_cases: Mapping[str, CaseCalibration], patients: Mapping[str, str]) -> dict[str, Any]:
    """As plain values."""
    found: dict[str, Any] = {"definition": SOURCE, "num_cases": len(of_cases)}
    for name, near in (("scan", False), ("near", True)):
        mean, bins = interval_of(of_cases, patients, near=near), pooled(of_cases, near=near)
        found[name] = {
            "mean_ece": _plain(mean.mean),
            "n": num_defined(of_cases, near=near),
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


def _grey(path: Path, reading: Reading) -> Volume:
    """The probabilities of one class, which of pictures have a file of their own."""
    number, channels = open_channels(path, reading)
    if number != 1:
        raise MedsegError(
            Code.CHANNELS,
            "a picture of probabilities is of one class",
            where=path.name,
            expected="one channel (grey)",
            got=f"{number} channels",
            remedy="give the folder that medseg predict --probabilities wrote",
        )
    return _as_shares(next(channels))


def _as_shares(volume: Volume) -> Volume:
    """Pictures have no slope in their files: whole numbers."""
    if not volume.grid.is_picture:
        return volume
    return replace(volume, array=np.asarray(volume.array, np.float32) / np.float32(FULL))


def _order(shares: Shares, labels: Labels, case: str) -> list[int]:
    """For each channel which of the classes (or regions) of `labels` it is: that of the same values in label files."""
    names, known = labels.region_names or labels.names, shares.classes
    if shares.number != labels.num_outputs:
        raise MedsegError(
            Code.LABEL,
            "the probabilities are of other classes",
            where=case,
            expected=f"{labels.num_outputs}: {', '.join(names)}",
            got=f"{shares.number} channels",
            remedy="say which classes the model knows with --labels, all of them in their order",
        )
    if known is None or known.num_outputs != shares.number:  # of --classes: the table has only those
        return list(range(shares.number))
    found = _matches(known, labels)
    if bool(known.regions) != bool(labels.regions) or sorted(found) != list(range(shares.number)):
        raise MedsegError(
            Code.LABEL,
            "the probabilities are of other classes",
            where=case,
            expected=labels.to_json(),
            got=f"{known.to_json()} ({TABLE_FILE} beside the probabilities)",
            remedy="give the values of label files with --labels as they are there; their order may be another",
        )
    return found


def _matches(known: Labels, labels: Labels) -> list[int]:
    """For each class (or region) of `known` the one of `labels` that the same values of label files mean; or -1."""
    if known.regions:
        ours = _values_of_regions(labels)
        return [ours.index(values) if values in ours else -1 for values in _values_of_regions(known)]
    index_of = {value: index for index, values in enumerate(labels.values) for value in values}
    rest = labels.values.index(()) if () in labels.values else -1
    return [index_of.get(value, rest) for value in known.written_values()]


def _values_of_regions(labels: Labels) -> list[set[int]]:
    return [{value for index in region for value in labels.values[index]} for region in labels.regions]


def _of_regions(
    channels: Iterator[NDArray[Any]],
    order: Sequence[int],
    truth: NDArray[np.uint8],
    box: tuple[slice, ...],
    labels: Labels,
    label: NDArray[np.uint8] | None,
    case: str,
) -> CaseCalibration:
    """A question for each region, there or not; the arguments are those of `calibrated`, as indices."""
    members, ignored = labels.membership(), truth == IGNORE_INDEX
    overlap = np.zeros((len(order), len(order)), np.int64)
    found, scan, near = np.zeros(len(order), np.int64), [], []
    for region, share in zip(order, channels, strict=True):
        inside = members[truth, region].astype(np.uint8)
        inside[ignored] = IGNORE_INDEX
        decided = Decided.of([1 - share, share])
        scan.append(calibration(decided, inside))
        near.append(calibration(decided[box], inside[box]))
        if label is not None:
            there = np.bincount(label[decided.classes == 1], minlength=len(members))
            overlap[region], found[region] = there @ members, there.sum()
    if label is not None:
        drawn = np.zeros(len(members), np.int64)
        for part in slabs(label):
            drawn += np.bincount(label[part].ravel(), minlength=len(members))
        _refuse_other_order(overlap, found, drawn @ members, labels, case)
    return CaseCalibration(reduce(add, scan), reduce(add, near))


def _refuse_other_order(
    overlap: NDArray[np.int64], found: NDArray[np.int64], drawn: NDArray[np.int64], labels: Labels, case: str
) -> None:
    """Refuse channels that fit the label map better as other classes than they are taken for.

    Args:
        overlap: voxels, shape (F, F): most probable by the channel of the class i, class j in the label map.
        found: voxels of each channel, shape (F,).
        drawn: voxels of each class in the label map, shape (F,).
        labels: with F classes of foreground, or regions.
        case: for messages.
    """
    from scipy.optimize import linear_sum_assignment

    dice = 2 * overlap / np.maximum(found[:, None] + drawn[None], 1)
    rows, columns = linear_sum_assignment(dice, maximize=True)
    if dice[rows, columns].sum() - np.trace(dice) <= LEAST_GAIN:
        return
    fits = {labels.foreground[row]: labels.foreground[column] for row, column in zip(rows, columns, strict=True)}
    raise MedsegError(
        Code.LABEL,
        "the channels of the probabilities are classes in another order: they fit the label map otherwise",
        where=case,
        expected=", ".join(fits),
        got=", ".join(fits.values()),
        remedy=f"keep the {TABLE_FILE} of the prediction beside the folder of the probabilities, or give --labels in "
        "the order of the model's classes",
    )


def _near(truth: NDArray[np.uint8], spacing_mm: Sequence[float]) -> tuple[slice, ...]:
    """The box of the foreground with a margin; an empty one without foreground."""
    inside = (truth > 0) & (truth != IGNORE_INDEX)
    if not inside.any():
        return (slice(0, 0),) * truth.ndim
    margins = [math.ceil(NEAR_MM / spacing) for spacing in spacing_mm]
    axes = range(truth.ndim)
    found = [np.flatnonzero(inside.any(axis=tuple(other for other in axes if other != axis))) for axis in axes]
    return tuple(
        slice(max(0, int(places[0]) - margin), int(places[-1]) + 1 + margin)
        for places, margin in zip(found, margins, strict=True)
    )


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
