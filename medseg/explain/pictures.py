"""Filters, feature maps and saliency as pictures: arrays for TensorBoard and notebooks, PNG files for people."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from medseg.formats.atomic import whole_file

Picture = NDArray[np.uint8]
"""Shape (H, W, 3)."""

LANDSCAPE = 1.5
"""Width over height that a grid comes close to."""
GAP = 2
"""Pixels between the tiles of a grid."""
SMALLEST, SMALLEST_HEAT = 96, 384
"""Pixels of a tile's, and of a heat map's, longer side at least: smaller ones are enlarged by whole numbers."""
FEW = 4
"""Tiles of a grid that are as large as a heat map."""
SHADES = (1.0, 99.0)
"""Percentiles of a map from dark to bright, so that a few voxels do not darken the rest."""
VEIL = 0.6
"""Most that a heat map hides of what lies below."""
_BETWEEN = 255


def filter_grid(weights: Tensor) -> Picture:
    """Filters side by side: grey is 0, white the largest weight, black its opposite; one scale for all.

    Args:
        weights: shape (K, C, *F); of filters in 3D the plane in the middle is shown, of several channels each.
    """
    planes = weights.detach().flatten(0, 1).float().cpu().numpy()
    if planes.ndim == 4:
        planes = planes[:, planes.shape[1] // 2]
    largest = float(np.abs(planes).max()) or 1.0
    return _grid(_grey(0.5 + planes / (2 * largest)))


def map_grid(maps: Tensor) -> Picture:
    """Feature maps side by side, each from its own darkest to its own brightest.

    Args:
        maps: shape (K, H, W).
    """
    array = maps.detach().float().cpu().numpy()
    return _grid(np.stack([_coloured(_shaded(one), "magma") for one in array]))


def image_grid(images: Tensor) -> Picture:
    """Images side by side in grey, each from its own darkest to its own brightest.

    Args:
        images: shape (K, H, W).
    """
    array = images.detach().float().cpu().numpy()
    return _grid(_grey(np.stack([_shaded(one) for one in array])))


def heat_map(image: Tensor, heat: Tensor, *, signed: bool = False) -> Picture:
    """A saliency over the image in grey: the stronger, the less is seen of the image.

    Args:
        image: shape (H, W).
        heat: shape (H, W); NaN shows the image alone.
        signed: below 0 is blue, above red; otherwise 0 shows the image alone.
    """
    below = _grey(_shaded(image.detach().float().cpu().numpy())).astype(np.float32)
    values = heat.detach().float().cpu().numpy()
    strongest = float(np.nanpercentile(np.abs(values), 99.5)) if np.isfinite(values).any() else 0.0
    share = np.nan_to_num(np.clip(values / (strongest or 1.0), -1, 1))
    colours = _coloured((share + 1) / 2, "coolwarm") if signed else _coloured(share, "inferno")
    veil = VEIL * np.abs(share)[..., None]
    return _enlarged((below * (1 - veil) + colours * veil).round().astype(np.uint8), SMALLEST_HEAT)


def thumbnail(image: Tensor, side: int) -> Picture:
    """A small square picture: grey, of three channels in colour, black beyond the image.

    Args:
        image: shape (C, H, W); of other numbers of channels the first is shown.
        side: pixels.
    """
    channels = image if len(image) == 3 else image[:1]
    array = np.moveaxis(_shaded(channels.detach().float().cpu().numpy()), 0, -1)
    picture = Image.fromarray((255 * np.broadcast_to(array, (*array.shape[:2], 3))).round().astype(np.uint8))
    return np.asarray(ImageOps.pad(picture, (side, side)))


def save_picture(path: Path, picture: Picture) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        MedsegError: E_OUTPUT if it cannot be written.
    """
    with whole_file(path, ".png") as temporary:
        Image.fromarray(picture).save(temporary, format="png")


class Album:
    """Pictures that are written into a folder, and on request for TensorBoard.

    Args:
        folder: where to; it is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pictures: dict[str, Picture] = {}
        self._values: list[tuple[str, float, int]] = []

    def add(self, name: str, picture: Picture) -> None:
        """Write `name`.png; a slash in the name is a folder.

        Raises:
            MedsegError: E_OUTPUT if it cannot be written.
        """
        path = self.folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(path, picture)
        self._pictures[name] = picture

    def note(self, name: str, value: float, step: int) -> None:
        """A number for TensorBoard's curves."""
        self._values.append((name, value, step))

    def to_tensorboard(self) -> Path:
        """All of them again, as events: the folder that `tensorboard --logdir` shows."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and few ask for it

        folder = self.folder / "tensorboard"
        with SummaryWriter(str(folder)) as board:
            for name, picture in self._pictures.items():
                board.add_image(name, picture, 0, dataformats="HWC")
            for name, value, step in self._values:
                board.add_scalar(name, value, step)
        return folder


def _shaded(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """To 0 … 1 between the percentiles; 0 where all is one value."""
    low, high = np.percentile(array, SHADES)
    if high <= low:
        low, high = float(array.min()), float(array.max())
    return np.asarray(np.clip((array - low) / max(float(high - low), 1e-12), 0, 1), dtype=np.float32)


def _grey(share: NDArray[Any]) -> Picture:
    """0 … 1, shape (…), as (…, 3)."""
    return np.repeat((255 * share).round().astype(np.uint8)[..., None], 3, axis=-1)


def _coloured(share: NDArray[Any], name: str) -> Picture:
    return np.asarray(255 * colormaps[name](share)[..., :3]).round().astype(np.uint8)


def _grid(tiles: Picture) -> Picture:
    """Tiles (K, H, W, 3) in rows, light between them."""
    tiles = np.stack([_enlarged(tile, SMALLEST if len(tiles) > FEW else SMALLEST_HEAT) for tile in tiles])
    number, height, width, _ = tiles.shape
    wanted = max(1, round(math.sqrt(number * LANDSCAPE * height / width)))
    # Rows that are full, rather than the wanted number of them
    columns = min(range(max(1, wanted - 1), wanted + 2), key=lambda n: (-number % n, abs(n - wanted), -n))
    rows = math.ceil(number / columns)
    picture = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), _BETWEEN, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (
            GAP + place * (side + GAP) for place, side in zip(divmod(index, columns), (height, width), strict=True)
        )
        picture[top : top + height, left : left + width] = tile
    return picture


def _enlarged(picture: Picture, side: int) -> Picture:
    """By a whole number, so that the longer side has at least so many pixels."""
    factor = max(1, math.ceil(side / max(picture.shape[:2])))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
