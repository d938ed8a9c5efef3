"""A reconstruction as a picture: the image, what the network got to see of it, and what it made of that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.explain.pictures import save_picture
from medseg.losses.deep_supervision import centre_crop

if TYPE_CHECKING:
    from medseg.pretraining.loop import Shown

PICTURES_FOLDER = "pictures"
"""In a run's folder: PNG files by the ids of cases."""
SHADES = (0.5, 99.5)
"""Percentiles of the image from dark to bright; the same for all columns, or a wrong brightness would not show."""
SMALLEST = 192
"""Pixels of a plane's longer side, about: voxels are whole numbers of pixels."""
GAP = 4
"""White pixels between planes."""


def draw(shown: Shown) -> NDArray[np.uint8]:
    """Side by side: image, what was seen of it, the reconstruction, and, where a part was hidden, the image with the
    reconstruction in its place. Below each other: the plane in the middle of each axis, with
    head and face up; of a picture itself.

    Args:
        shown: what is drawn; of several channels the first.
    Returns:
        Shape (H, W, 3), planes in their shape in mm.
    """
    size = shown.reconstruction.shape[1:]
    image, seen, output, asked = (
        centre_crop(tensor.cpu().float(), size)[0]
        for tensor in (shown.image, shown.seen, shown.reconstruction, shown.asked)
    )
    columns = [image, seen, output]
    if not bool(asked.all()):
        columns.append(torch.where(asked > 0, output, image))
    low, high = np.percentile(image.numpy(), SHADES)
    rows = []
    for axis in range(image.ndim) if image.ndim == 3 else [None]:
        planes = [column if axis is None else column.select(axis, column.shape[axis] // 2) for column in columns]
        down = [letter for a, letter in enumerate(shown.orientation) if a != axis][:1]
        if down in (["S"], ["A"]):  # the head, and the face, belong above
            planes = [plane.flip(0) for plane in planes]
        shades = [np.clip((plane.numpy() - low) / max(high - low, 1e-6), 0, 1) for plane in planes]
        if min(shades[0].shape) > 1:  # across a patch of one slice there is nothing to see
            sides = [mm for a, mm in enumerate(shown.spacing_mm) if a != axis]
            rows.append(_beside([_enlarged((255 * shade).round().astype(np.uint8), sides) for shade in shades]))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, GAP), (0, width - row.shape[1])), constant_values=255) for row in rows]
    picture = np.concatenate(padded)[:-GAP]
    return np.repeat(picture[..., None], 3, axis=2)


def save(run: Path, case_id: str, picture: NDArray[np.uint8]) -> None:
    """Write a picture into the run's folder, in place of that of an earlier validation.

    Raises:
        MedsegError: E_OUTPUT.
    """
    (run / PICTURES_FOLDER).mkdir(exist_ok=True)
    save_picture(run / PICTURES_FOLDER / f"{case_id}.png", picture)


def _enlarged(plane: NDArray[np.uint8], sides_mm: list[float]) -> NDArray[np.uint8]:
    """A plane with voxels of these sides, as whole numbers of pixels."""
    extent = max(n * mm for n, mm in zip(plane.shape, sides_mm, strict=True))
    rows, columns = (max(1, round(mm * SMALLEST / extent)) for mm in sides_mm)
    return plane.repeat(rows, axis=0).repeat(columns, axis=1)


def _beside(planes: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    gap = np.full((planes[0].shape[0], GAP), 255, dtype=np.uint8)
    return np.concatenate([part for plane in planes for part in (plane, gap)][:-1], axis=1)
