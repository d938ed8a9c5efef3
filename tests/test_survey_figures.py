"""Figures and table of a survey: every case is a mark, what is unlike the rest is red, what is absent is a cross."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from medseg.data.cases import find_cases
from medseg.data.facts import Survey
from medseg.data.survey import survey
from medseg.formats import open_label, open_volume, write_image, write_label
from medseg.labels import Labels
from medseg.phantom import make_phantom, write_phantoms
from medseg.phantom_membranes import LABELS, write_membranes
from medseg.reports.survey_figures import (
    UNUSUAL,
    USUAL,
    cases_table,
    geometry_figure,
    histogram_figure,
    intensities_figure,
    volumes_figure,
)

NUM_CASES = 6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    """Case 1 is 2000 HU too bright, case 2 lacks the spleen."""
    train = write_phantoms(tmp_path_factory.mktemp("data"), num_train=NUM_CASES, size=0.4).train
    image = train / "imagesTr" / "phantom_001_0000.nii.gz"
    bright = open_volume(image)
    write_image(image, replace(bright, array=bright.array + 2000))
    label = train / "labelsTr" / "phantom_002.nii.gz"
    drawn = open_label(label)
    write_label(label, replace(drawn, array=np.where(drawn.array == 2, 0, drawn.array)))
    return survey(find_cases(train), num_threads=1)


def marks(figure: Figure, panel: int = 0) -> list[tuple[str, str, float]]:
    """(marker, colour, height) of the marks of a panel."""
    lines = [line for line in figure.axes[panel].lines if line.get_marker() in ("o", "X") and len(line.get_ydata())]
    return [(str(line.get_marker()), to_hex(line.get_color()).upper(), float(line.get_ydata()[0])) for line in lines]


def test_the_table_says_what_each_case_is_and_lacks(found: Survey) -> None:
    table = cases_table(found)
    assert len(table.rows) == NUM_CASES
    rows = {row[0]: row for row in table.rows}
    assert (rows["phantom_002"][5], rows["phantom_002"][6]) == ("spleen", "unusual")
    assert rows["phantom_001"][6] == "unusual"
    assert (rows["phantom_004"][5], rows["phantom_004"][6]) == ("", "")
    case = next(case for case in found.cases if case.case_id == "phantom_004")
    assert rows["phantom_004"][1] == "×".join(map(str, case.shape))
    assert rows["phantom_004"][4] == case.orientation


def test_spacings_are_compared_along_the_body_however_files_are_stored(found: Survey) -> None:
    drawn = marks(geometry_figure(found))
    assert len(drawn) == 3 * NUM_CASES
    assert sum(colour == UNUSUAL for _, colour, _ in drawn) == 3 * 2
    thickness, across = [height for *_, height in drawn[:NUM_CASES]], [height for *_, height in drawn[NUM_CASES:]]
    assert len({case.orientation for case in found.cases}) > 3
    assert min(thickness) > max(across)  # slices are the coarsest, along whatever axis they lie
    fields = marks(geometry_figure(found), 1)
    assert 80 < min(height for *_, height in fields) < max(height for *_, height in fields) < 140


def test_the_bright_case_is_the_last_and_red(found: Survey) -> None:
    drawn = [mark for mark in marks(intensities_figure(found)) if mark[0] == "o"]
    assert len(drawn) == NUM_CASES
    heights = [height for *_, height in drawn]
    assert heights == sorted(heights)
    assert heights[-1] > 2000
    assert drawn[-1][1] == UNUSUAL
    assert drawn[0][1] in (USUAL, UNUSUAL)


def test_volumes_are_millilitres_and_an_absent_structure_is_a_cross_below_all(found: Survey) -> None:
    figure = volumes_figure(found)
    drawn = marks(figure)
    crosses = [height for marker, _, height in drawn if marker == "X"]
    points = [height for marker, _, height in drawn if marker == "o"]
    assert len(crosses) == 1
    assert crosses[0] < min(points)
    case = found.cases[0]
    assert np.isclose(drawn[0][2], case.label_voxels[1] * np.prod(case.spacing_mm) / 1000)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == list(found.labels.foreground)


def test_pictures_have_pixels(tmp_path: Path) -> None:
    write_membranes(tmp_path, num=2, size=64)
    pictures = survey(find_cases(tmp_path, labels=LABELS), LABELS, num_threads=1)
    assert "spacing (pixel)" in cases_table(pictures).columns
    assert len(marks(geometry_figure(pictures))) == 2 * 2
    assert marks(volumes_figure(pictures))[0][2] == pictures.cases[0].label_voxels[1]


def test_a_histogram_has_a_curve_for_each_class_that_the_case_has() -> None:
    image, label = make_phantom(0, 1, size=0.4)
    labels = Labels.from_mapping({"background": 0, "liver": 1, "nothing": 9, "$spleen": 2})
    indices = labels.to_index(np.where(label.array > 2, 0, label.array))
    (ax,) = histogram_figure(image, indices, labels).axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["background", "liver", "$spleen"]
    assert ax.get_xlabel() == "intensity (HU)"
    shares = [patch.get_data().values.sum() for patch in ax.patches]
    assert all(0.9 < share <= 1 + 1e-9 for share in shares)
