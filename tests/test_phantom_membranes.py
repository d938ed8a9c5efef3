"""Pictures of membranes: the same from one seed, found as cases, and not to be had by a threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from medseg.data.cases import find_cases, load_image, load_label_values
from medseg.metrics.components import components
from medseg.phantom_membranes import CELL, LABELS, MEMBRANE, make_membranes, write_membranes


def test_the_same_seed_gives_the_same_pixels_and_every_number_other_cells() -> None:
    image, label = make_membranes(3, 1, size=96)
    again, label_again = make_membranes(3, 1, size=96)
    other, _ = make_membranes(3, 2, size=96)
    assert np.array_equal(image.array, again.array)
    assert np.array_equal(label.array, label_again.array)
    assert (image.array != other.array).mean() > 0.5


def test_they_are_found_as_cases_with_the_values_of_the_challenge(tmp_path: Path) -> None:
    write_membranes(tmp_path, num=3, size=96)
    folder = find_cases(tmp_path, labels=LABELS)
    assert [case.case_id for case in folder.cases] == ["00", "01", "02"]
    image = load_image(folder.cases[1])
    made, label = make_membranes(0, 1, size=96)
    assert np.array_equal(image.array, made.array)
    assert np.array_equal(load_label_values(folder.cases[1], image.grid).array, label.array)
    assert set(np.unique(label.array)) == {MEMBRANE, CELL}
    with Image.open(tmp_path / "label" / "01.png") as picture:
        assert picture.mode == "L"


def test_membranes_separate_cells_and_no_threshold_finds_them() -> None:
    image, label = make_membranes(0, 0, size=192)
    membrane = label.array == MEMBRANE
    _, num_cells = components(~membrane, by_faces=True)
    assert num_cells > 15
    assert 0.08 < membrane.mean() < 0.3
    grey = image.array[0]
    dice = [
        2 * np.count_nonzero(membrane & (grey < level)) / (membrane.sum() + (grey < level).sum())
        for level in range(60, 180, 5)
    ]
    assert 0.4 < max(dice) < 0.75  # dark lines, but neither all of them nor they alone
