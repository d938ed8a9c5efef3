"""What a survey found, in plain lines for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from medseg.data.survey import CaseInfo, Survey
from medseg.labels import REST

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
        "sizes      " + _range([case.shape for case in cases], "{:.0f}"),
        "spacings   " + _range([case.spacing_mm for case in cases], "{:.3g}") + f" {unit}",
    ]
    orientations = Counter(case.orientation for case in cases if case.orientation)
    if orientations:
        lines.append("stored as  " + ", ".join(f"{name} ({count})" for name, count in orientations.most_common()))
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
    lines += _notes(cases)
    lines += [f"left out   {text}" for text in found.left_out]
    for problem in found.quarantine:
        lines.append(f"left out   {problem.case_id}: {problem.code} {problem.message}")
    return lines


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


def _range(values: Sequence[tuple[float, ...]], form: str) -> str:
    """Smallest, median and largest along each axis of the files; one of them where all look equal."""
    columns = np.array(values)
    parts = {"min": columns.min(axis=0), "median": np.median(columns, axis=0), "max": columns.max(axis=0)}
    shown = {name: " × ".join(form.format(v) for v in row) for name, row in parts.items()}
    if len(set(shown.values())) == 1:
        return shown["median"]
    return ", ".join(f"{name} {row}" for name, row in shown.items())
