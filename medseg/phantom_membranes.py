"""Pictures of membranes out of nothing: what an electron microscope shows of brain tissue, for notebooks and tests.

Each picture is a plane of cells that touch: a Voronoi diagram whose borders are bent. Membranes are dark lines that
differ in width and fade where the cut runs along them. Mitochondria and vesicles are as dark, and lie inside of cells:
a threshold does not solve the task. Values of the labels are those of the ISBI 2012 challenge: membrane 0, cell 255.

Nothing here is tissue to learn from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from medseg.formats import write_image, write_label
from medseg.volume import Grid, Volume

MEMBRANE, CELL = 0, 255
"""Values of the labels."""
LABELS = {"background": CELL, "membrane": MEMBRANE}
"""As `data.labels` takes them: the membranes are what is to be found."""

_CELL_PIXELS = 34.0
"""Mean distance between the middles of cells."""
_BEND_PIXELS = (9.0, 2.2)
"""How far borders are bent, in wide and in narrow waves."""
_BEND_WIDTH = (26.0, 7.0)
"""Standard deviation of the smoothing that makes those waves."""
_HALF_WIDTH = (1.1, 2.3)
"""Thinnest and thickest half of a membrane, in pixels."""
_CYTOSOL, _DARK = 178.0, 72.0
"""Grey of the inside of cells, and of membranes where the cut runs straight through them."""
_FADED = 0.35
"""Contrast of a membrane where it is faintest, as a share of the largest."""
_NOISE = 13.0

FloatArray = NDArray[np.float64]


def make_membranes(seed: int, number: int, *, size: int = 256) -> tuple[Volume, Volume]:
    """One picture (uint8, shape (1, size, size)) and its label (uint8, (size, size): `MEMBRANE` or `CELL`).

    Args:
        seed: of the data set.
        number: of the picture; every number shows other cells.
        size: pixels along each side.
    """
    rng = np.random.default_rng([seed, number])
    rows, columns = np.meshgrid(np.arange(size, dtype=np.float64), np.arange(size, dtype=np.float64), indexing="ij")
    place = np.stack([rows, columns])
    for pixels, width in zip(_BEND_PIXELS, _BEND_WIDTH, strict=True):
        place = place + pixels * np.stack([_smooth(rng, size, width) for _ in range(2)])
    cell, to_border = _cells(place, rng, size)
    low, high = _HALF_WIDTH
    half_width = low + (high - low) * _share(_smooth(rng, size, 14))
    membrane = to_border < half_width
    contrast = _FADED + (1 - _FADED) * _share(1.5 * _smooth(rng, size, 11) + 1)
    grey = _CYTOSOL + 9 * rng.normal(size=int(cell.max()) + 1)[cell] + 7 * _smooth(rng, size, 3)
    _draw_organelles(grey, place, cell, to_border, rng)
    profile = np.exp(-0.5 * (to_border / np.maximum(0.75 * half_width, 0.5)) ** 2)
    grey -= (grey - _DARK) * contrast * profile
    grey = gaussian_filter(grey, 0.8) + 10 * _smooth(rng, size, 60)
    noise = gaussian_filter(rng.normal(size=grey.shape), 0.6)
    grey += noise * (_NOISE / noise.std())
    grid = Grid.of_picture((size, size))
    image = Volume(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[None], grid)
    return image, Volume(np.where(membrane, MEMBRANE, CELL).astype(np.uint8), grid)


def write_membranes(folder: Path, *, num: int = 8, seed: int = 0, size: int = 256) -> None:
    """Write pictures and labels as PNG, in the folders `image` and `label`, as the ISBI 2012 challenge's lie.

    Args:
        folder: is made where it does not exist; files of the same name are replaced.
        num: number of pictures.
        seed: the same seed gives the same pixels.
        size: pixels along each side.
    """
    for name in ("image", "label"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(num):
        image, label = make_membranes(seed, number, size=size)
        write_image(folder / "image" / f"{number:02d}.png", image)
        write_label(folder / "label" / f"{number:02d}.png", label)


def _smooth(rng: np.random.Generator, size: int, width: float) -> FloatArray:
    """A smooth random field of unit variance, shape (size, size)."""
    field = gaussian_filter(rng.normal(size=(size, size)), min(width, size / 4), mode="wrap")
    return np.asarray((field - field.mean()) / field.std(), dtype=np.float64)


def _share(field: FloatArray) -> FloatArray:
    """A field of about unit variance, squeezed to 0 … 1."""
    return np.asarray(1 / (1 + np.exp(-1.7 * field)), dtype=np.float64)


def _cells(place: FloatArray, rng: np.random.Generator, size: int) -> tuple[NDArray[np.intp], FloatArray]:
    """Number of the cell of each pixel, and the distance to its border; `place` has shape (2, size, size)."""
    margin = 2 * _CELL_PIXELS
    along = np.arange(-margin, size + margin, _CELL_PIXELS)
    middles = np.stack(np.meshgrid(along, along, indexing="ij"), axis=-1).reshape(-1, 2)
    middles = middles + rng.uniform(-0.62, 0.62, middles.shape) * _CELL_PIXELS
    middles = middles[rng.uniform(size=len(middles)) > 0.15]  # what is left out makes larger cells
    found = cKDTree(middles).query(np.moveaxis(place, 0, -1), k=2)
    distances, nearest = np.asarray(found[0], dtype=np.float64), np.asarray(found[1], dtype=np.intp)
    between = np.linalg.norm(middles[nearest[..., 0]] - middles[nearest[..., 1]], axis=-1)
    to_border = (distances[..., 1] ** 2 - distances[..., 0] ** 2) / (2 * between)
    return nearest[..., 0], to_border


def _draw_organelles(
    grey: FloatArray, place: FloatArray, cell: NDArray[np.intp], to_border: FloatArray, rng: np.random.Generator
) -> None:
    """Mitochondria with their folds, and vesicles, in some of the cells; `grey` is changed in place."""
    for number in np.unique(cell):
        inside = np.argwhere((cell == number) & (to_border > 7))
        if not len(inside) or rng.uniform() < 0.45:
            continue
        row, column = inside[rng.integers(len(inside))]
        offset = place - place[:, row, column][:, None, None]
        angle = rng.uniform(0, np.pi)
        along = np.cos(angle) * offset[0] + np.sin(angle) * offset[1]
        across = np.cos(angle) * offset[1] - np.sin(angle) * offset[0]
        radius = np.hypot(along / rng.uniform(7, 12), across / rng.uniform(4, 6))
        fits = (cell == number) & (to_border > 3.5)
        grey[(radius < 1) & fits] = 118
        grey[(radius < 1) & fits & (np.sin(1.7 * along) > 0.45)] = 92
        grey[(radius > 0.82) & (radius < 1.05) & fits] = 80
        for row, column in inside[rng.integers(len(inside), size=6)]:
            offset = place - place[:, row, column][:, None, None]
            vesicle = np.hypot(offset[0], offset[1])
            grey[(vesicle < 2.4) & (vesicle > 1.0) & fits & (radius > 1.2)] = 108
