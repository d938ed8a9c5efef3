"""What a survey found, in plain lines for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.data.facts import CaseInfo, Survey
from medseg.labels import REST, UNLABELLED

MAX_NOTES = 10
"""Most notes that are printed."""


def summary_lines(found: Survey) -> list[str]:
    """What was found, in plain lines for the terminal."""
    cases = found.cases
    unit = "mm" if cases[0].orientation else "pixel"
    modalities = sorted({case.modality or "" for case in cases} - {""})
    lines = [
        f"layout     {found.layout}",
        f"cases      {len(cases)}, {found.spatial_dims}D" + (f", {'/'.join(modalities)}" if modalities else ""),
        f"channels   {found.num_channels} ({', '.join(found.channel_names)})",
        "sizes      " + spread([case.shape for case in cases], "{:.0f}"),
        "spacings   " + spread([case.spacing_mm for case in cases], "{:.3g}") + f" {unit}",
    ]
    orientations = Counter(case.orientation for case in cases if case.orientation)
    if orientations:
        lines.append("stored as  " + ", ".join(f"{name} ({count})" for name, count in orientations.most_common()))
    if found.labels == UNLABELLED:
        return [*lines, "labels     none: what is learnt is learnt from the images", *_of_the_folder(found)]
    lines.append(f"labels     from {found.labels_from}")
    voxels = np.array([case.label_voxels for case in cases], dtype=np.float64)
    for index, name in enumerate(found.labels.names):
        values = found.labels.values[index]
        share = voxels[:, index].sum() / voxels.sum()
        drawn = (found.structures or {}).get(name)
        lines.append(
            f"  {index}  {name:<20} value {', '.join(map(str, values)) or REST:<8} "
            f"{100 * share:8.3g} % of voxels, in {int((voxels[:, index] > 0).sum())} of {len(cases)} cases"
            + (f", drawn as {', '.join(drawn)}" if drawn else "")
        )
    return [*lines, *_region_lines(found, voxels), *_of_the_folder(found)]


def _of_the_folder(found: Survey) -> list[str]:
    """What is to be known of cases, and what was left out."""
    left_out = [*found.left_out, *(f"{p.case_id}: {p.code} {p.message}" for p in found.quarantine)]
    return [*_notes(found.cases), *(f"left out   {text}" for text in left_out)]


def anomaly_lines(found: Survey) -> list[str]:
    """The cases that are unlike the rest, one line each."""
    lines = [f"unusual    {a.case_id}: {'; '.join(a.reasons)}" for a in found.anomalies[:MAX_NOTES]]
    more = len(found.anomalies) - MAX_NOTES
    return [*lines, f"unusual    and {more} more in survey.json"] if more > 0 else lines


def _region_lines(found: Survey, voxels: NDArray[np.float64]) -> list[str]:
    """The regions and the values that are ignored, as the lines of the classes above them."""
    cases, labels = found.cases, found.labels
    ignored = np.array([case.ignored_voxels for case in cases], dtype=np.float64)
    rows = [
        (
            f"region     {name:<20} value",
            [v for index in classes for v in labels.values[index]],
            voxels[:, list(classes)],
        )
        for name, classes in zip(labels.region_names, labels.regions, strict=True)
    ]
    if labels.ignore:
        rows.append(("ignored    value", list(labels.ignore), ignored[:, None]))
    total = voxels.sum() + ignored.sum()
    return [
        f"{what} {', '.join(map(str, sorted(values))):<8} {100 * of.sum() / total:8.3g} % of voxels, "
        f"in {int((of.sum(axis=1) > 0).sum())} of {len(cases)} cases"
        for what, values, of in rows
    ]


def _notes(cases: Sequence[CaseInfo]) -> list[str]:
    """What is to be known of cases, and of how many."""
    counts = Counter(note for case in cases for note in case.notes)
    first = {note: case.case_id for case in reversed(cases) for note in case.notes}
    lines = [
        f"note       {f'{count} cases' if count > 1 else first[note]}: {note}"
        for note, count in counts.most_common(MAX_NOTES)
    ]
    more = len(counts) - MAX_NOTES
    return [*lines, f"note       and {more} more in survey.json"] if more > 0 else lines


def spread(values: Sequence[Sequence[float]], form: str) -> str:
    """Smallest, median and largest along each axis of the files; one of them where all look equal."""
    columns = np.array(values)
    parts = {"min": columns.min(axis=0), "median": np.median(columns, axis=0), "max": columns.max(axis=0)}
    shown = {name: " × ".join(form.format(v) for v in row) for name, row in parts.items()}
    if len(set(shown.values())) == 1:
        return shown["median"]
    return ", ".join(f"{name} {row}" for name, row in shown.items())
