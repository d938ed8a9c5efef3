"""The bodies of the phantoms: which tissue lies where, drawn from implicit shapes in millimetres.

Coordinates are (x, y, z): mm to the right, the front and the head of the middle of an average body about 100 mm wide.
Nothing here is anatomy to learn from; it only looks like a CT of the upper abdomen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.labels import Labels

LABELS = Labels.from_mapping({"background": 0, "liver": 1, "spleen": 2, "kidneys": 3, "spine": 4, "aorta": 5})
"""Classes of the phantoms. Both kidneys are one class: nothing here depends on left and right being told apart."""

TISSUES: dict[str, tuple[float, str]] = {
    "air": (-1000, "background"),
    "fat": (-100, "background"),
    "muscle": (55, "background"),
    "rib": (280, "background"),
    "bowel": (40, "background"),
    "lung": (-820, "background"),
    "heart": (140, "background"),
    "liver": (108, "liver"),
    "lesion": (65, "liver"),
    "gallbladder": (10, "background"),
    "spleen": (110, "spleen"),
    "stomach": (25, "background"),
    "gas": (-900, "background"),
    "kidney": (165, "kidneys"),
    "vertebra": (250, "spine"),
    "disc": (95, "spine"),
    "canal": (25, "background"),
    "cava": (130, "background"),
    "aorta": (160, "aorta"),
}
"""Tissue → mean intensity in Hounsfield units, and its class."""
_CODES = {name: code for code, name in enumerate(TISSUES)}

FloatArray = NDArray[np.float64]
Mask = NDArray[np.bool_]


def waves(points: FloatArray, rng: np.random.Generator, wavelength_mm: float, num_waves: int = 5) -> FloatArray:
    """A smooth random field of about unit variance at `points` (3, ...) in mm, made of a few plane waves."""
    directions = rng.normal(size=(num_waves, 3))
    directions *= 2 * np.pi / (wavelength_mm * np.linalg.norm(directions, axis=1, keepdims=True))
    phases = rng.uniform(0, 2 * np.pi, num_waves)
    field = np.zeros(points.shape[1:])
    for direction, phase in zip(directions, phases, strict=True):
        field += np.sin(np.tensordot(direction, points, axes=1) + phase)
    field *= np.sqrt(2 / num_waves)
    return field


def draw_body(points: FloatArray, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Tissue codes of the voxels at `points` (3, I, J, K) mm in the average body."""
    canvas = _Canvas(points, rng)
    x, y, _ = points
    below_lungs = _draw_trunk(canvas)
    _draw_organs(canvas, below_lungs)
    _draw_spine(canvas)
    canvas.put("cava", _squares((x - 7) / 5.2, (y + 3.5) / 4.2) < 1)
    canvas.put("aorta", _squares(x + 5, y + 3.5) < rng.uniform(4.4, 5.2) ** 2)
    return canvas.tissue


class _Canvas:
    """Tissue codes of the voxels at `points` (3, I, J, K) mm; what is put later lies on top."""

    def __init__(self, points: FloatArray, rng: np.random.Generator) -> None:
        self.points, self.rng = points, rng
        self.tissue = np.zeros(points.shape[1:], dtype=np.uint8)

    def put(self, name: str, mask: Mask) -> None:
        """Fill `mask` with a tissue."""
        self.tissue[mask] = _CODES[name]

    def blob(self, centre: tuple[float, ...], radii: tuple[float, ...], lean: float = 0.0) -> FloatArray:
        """Below 1 inside an ellipsoid whose place and size vary from case to case.

        `lean` is how far it moves to the right per mm upwards.
        """
        x, y, z = self.points
        c = np.array(centre) + self.rng.normal(0, 1.3, 3)
        r = np.array(radii) * self.rng.uniform(0.9, 1.1, 3)
        return _squares((x - c[0] - lean * (z - c[2])) / r[0], (y - c[1]) / r[1], (z - c[2]) / r[2])


def _squares(*terms: FloatArray) -> FloatArray:
    return np.asarray(sum(term**2 for term in terms))


def _draw_trunk(canvas: _Canvas) -> Mask:
    """Skin to peritoneum, chest and bowel; returns the part of the cavity below the diaphragm."""
    x, y, z = canvas.points
    rng = canvas.rng
    cavity = np.abs(x / 40) ** 2.4 + np.abs((y - 4) / 26) ** 2.4 < 1
    dome = 42 - 0.012 * (np.abs(x) - 20) ** 2 - 0.02 * (y - 2) ** 2 + rng.normal(0, 2)
    below_lungs: Mask = cavity & (z < dome - 1.5)

    canvas.put("fat", np.abs(x / 49) ** 2.3 + np.abs(y / 37) ** 2.3 < 1)
    canvas.put("muscle", np.abs(x / 44.5) ** 2.3 + np.abs((y + 0.5) / 32) ** 2.3 < 1)
    # Ribs fall from the back to the front, 15 mm apart, within the muscle of the wall.
    height = z + 14 * y / 32 + rng.uniform(0, 15)
    wall = np.abs(x / 43.5) ** 2.3 + np.abs((y + 0.5) / 31) ** 2.3
    between = (wall > 0.84) & (wall < 1) & (y > -27) & (y < 22) & (height > 0)
    canvas.put("rib", between & (np.abs(height % 15 - 7.5) < 2.6))
    canvas.put("fat", cavity)
    canvas.put("bowel", below_lungs & (z < 2) & (y > -1) & (waves(canvas.points, rng, wavelength_mm=17) > -0.1))
    for side in (-1, 1):  # psoas
        canvas.put("muscle", below_lungs & (z < 14) & (_squares((x - side * 14) / 6, (y + 17) / 7) < 1))
    canvas.put("lung", cavity & (z >= dome))
    canvas.put("heart", cavity & (z >= dome) & (canvas.blob((-6, 9, 54), (19, 14, 15)) < 1))
    return below_lungs


def _draw_organs(canvas: _Canvas, inside: Mask) -> None:
    """Liver, gallbladder, spleen, stomach and kidneys, all within `inside`."""
    y = canvas.points[1]
    rng = canvas.rng
    liver = inside & (np.minimum(canvas.blob((22, 4, 17), (24, 25, 26)), canvas.blob((-1, 17, 21), (23, 10, 14))) < 1)
    canvas.put("liver", liver)
    for _ in range(rng.integers(0, 3)):
        spot = (rng.uniform(12, 32), rng.uniform(-8, 18), rng.uniform(5, 30))
        canvas.put("lesion", liver & (canvas.blob(spot, (4, 4, 4.5)) < 1))
    canvas.put("gallbladder", inside & (canvas.blob((15, 15, -3), (5, 6, 9)) < 1))
    canvas.put("spleen", inside & (canvas.blob((-31, -4, 19), (10, 15, 18)) < 1))
    stomach = inside & (canvas.blob((-17, 11, 17), (13, 11, 15)) < 1)
    canvas.put("stomach", stomach)
    canvas.put("gas", stomach & (y > rng.uniform(13, 18)))  # the patient lies on the back: gas is in front
    for side, height in ((1, -17), (-1, -11)):
        kidney = canvas.blob((side * 23, -9.5, height), (9.5, 10, 20), lean=-side * 0.2)
        canvas.put("fat", inside & (kidney < 1.3))
        canvas.put("kidney", inside & (kidney < 1))
        canvas.put("fat", inside & (canvas.blob((side * 15.5, -7.5, height), (5.5, 4.5, 7)) < 1))  # hilum


def _draw_spine(canvas: _Canvas) -> None:
    """Vertebrae and discs, the arch around the canal and the spinous processes."""
    x, y, z = canvas.points
    height = (z + canvas.rng.uniform(0, 18)) % 18
    body = _squares(x / 9.5, (y + 17) / 8) < 1
    arch = (_squares(x / 8, (y + 27) / 6) < 1) & (height > 4)
    process = (np.abs(x) < 2) & (y < -27) & (y > -34) & (height > 6) & (height < 15)
    canvas.put("vertebra", body | arch | process)
    canvas.put("disc", body & (height < 4))
    canvas.put("canal", _squares(x / 4, (y + 26.5) / 3.2) < 1)
