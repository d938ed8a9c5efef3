"""The worst, the median and the best case as pictures within the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from medseg.errors import MedsegError
from medseg.labels import IGNORE_INDEX, Labels
from medseg.reports.evaluation import Evaluation
from medseg.reports.extremes import extremes
from medseg.reports.overlay import figure_to_array, overlay_figure
from medseg.reports.planes import SOFT_TISSUE_HU
from medseg.volume import Volume

MAX_WIDTH = 1200
"""Pixels of a picture; a page shows about 1100."""
JPEG_QUALITIES = (86, 74, 60)
"""With full chroma, so that lines of masks stay sharp; the first that is small enough, else the last."""
MAX_BYTES = 350_000
"""Of a picture: three planes take about 150 kB, noisy pictures much more."""
NO_SCANS = "The scans were not given (--images): grey shows the reference."


@dataclass(frozen=True)
class CaseFiles:
    """What a picture of a case is drawn from; None where there is no such file."""

    image: Volume | None
    reference: Volume
    predicted: Volume | None


@dataclass(frozen=True)
class Picture:
    """A case as a picture.

    Args:
        role: why it is shown ("worst").
        case: its id.
        jpeg: the picture as base64.
        size: (width, height) in pixels.
        note: a sentence below it.
    """

    role: str
    case: str
    jpeg: str
    size: tuple[int, int]
    note: str = ""


def draw_extremes(
    evaluation: Evaluation, open_case: Callable[[str], CaseFiles]
) -> tuple[list[Picture], dict[str, MedsegError]]:
    """Draw the cases that `extremes` names.

    Args:
        evaluation: all cases.
        open_case: case id → its volumes.
    Returns:
        The pictures, and for each case that could not be drawn why not.
    """
    pictures, problems = [], {}
    for role, case in extremes(evaluation).items():
        try:
            files = open_case(case)
            pictures.append(_draw(role, case, files, evaluation.labels))
        except MedsegError as error:
            problems[case] = error
    return pictures, problems


def picture_of_file(role: str, case: str, path: Path, note: str = "") -> Picture:
    """A picture that was drawn before, such as those in `validation/overlays` of a run."""
    with Image.open(path) as image:
        return _picture(role, case, image.convert("RGB"), note)


def _draw(role: str, case: str, files: CaseFiles, labels: Labels) -> Picture:
    image = files.image if files.image is not None else _silhouette(files.reference, labels)
    figure = overlay_figure(image, labels=labels, reference=files.reference, predicted=files.predicted)
    notes = [] if files.image is not None else [NO_SCANS]
    notes += ["There is no prediction of this case."] if files.predicted is None else []
    return _picture(role, case, Image.fromarray(figure_to_array(figure)), " ".join(notes))


def _picture(role: str, case: str, image: Image.Image, note: str) -> Picture:
    if image.width > MAX_WIDTH:
        image = image.resize((MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)), Image.Resampling.LANCZOS)
    for quality in JPEG_QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality, subsampling=0, optimize=True)
        if buffer.tell() <= MAX_BYTES:
            break
    return Picture(role, case, base64.b64encode(buffer.getvalue()).decode(), image.size, note)


def _silhouette(reference: Volume, labels: Labels) -> Volume:
    """The reference in grey on black, in place of a scan: as CT, whose window is fixed."""
    indices = labels.to_index(reference.array)
    shape = (indices > 0) & (indices != IGNORE_INDEX)
    low, high = SOFT_TISSUE_HU
    return Volume(np.where(shape, (0.65 * low + 0.35 * high), low).astype(np.float32)[None], reference.grid, "CT")
