"""`medseg.Predictor`: a trained model that stays loaded, for programs that call it again and again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.data.cases import load_image
from medseg.data.inputs import find_inputs
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading
from medseg.inference.averaging import AXIS
from medseg.inference.ensemble import Ensemble
from medseg.inference.prediction import Prediction
from medseg.volume import Grid, Volume


class Predictor:
    """Answers scans, files or arrays, with the models of a run, loaded once.

        predictor = medseg.Predictor.load("runs/2026-01-31_10-00-00_unet")
        predictor("scan.nii.gz").labels.array
        predictor(array, spacing_mm=(0.8, 0.8, 1.5)).labels.array

    The answer to a file and to the array in it are the same, and the same as that of `medseg predict`. One object
    answers one scan at a time: it is not for several threads at once.

    Args:
        ensemble: the loaded models; mostly made by `load`.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self.ensemble = ensemble

    @classmethod
    def load(cls, run: str | Path, **settings: Any) -> Predictor:
        """Load a run, the folds of a run, or what `medseg select` made.

        Args:
            run: its folder.
            settings: those of `Ensemble.from_run`: device, precision, step, mirror, batch_size, postprocess, skip,
                compile, checkpoint.
        Raises:
            MedsegError: E_RUN, E_MISSING, E_CHECKPOINT, E_MODEL, E_CONFIG.
        """
        return cls(Ensemble.from_run(Path(run), **settings))

    def __call__(
        self,
        scan: str | Path | Sequence[str | Path] | NDArray[Any] | Volume,
        *,
        spacing_mm: Sequence[float] | None = None,
        orientation: str = "RAS",
        affine: ArrayLike | None = None,
        probabilities: bool = False,
        uncertainty: bool = False,
        reading: Reading = STRICT,
    ) -> Prediction:
        """Predict one scan.

        Args:
            scan: a file or a DICOM series, or several files that are its channels; an array (*S) or (C, *S); or a
                volume. Arrays hold what a file would: CT in HU, nothing normalised.
            spacing_mm: of an array: voxel size along its axes. For pictures it may be left out.
            orientation: of an array: where its axes run to, as nibabel says it ("RAS": to the right, to the front,
                upwards; of arrays that SimpleITK gives, with the slices first, mostly "SPL").
            affine: of an array, in place of both: (4, 4), from indices to mm in RAS, as nibabel's.
            probabilities: want those too.
            uncertainty: want it too.
            reading: what is asked of the readers of files.
        Raises:
            MedsegError: E_NO_GEOMETRY for an array without spacing, E_NONFINITE, E_MODEL for a scan that does not fit
                the model, E_NO_CASES for a path that is not one scan, E_LIMIT, and what the readers refuse.
        """
        if isinstance(scan, Volume):
            volume = scan
        elif isinstance(scan, np.ndarray):
            volume = self._volume(scan, spacing_mm, orientation, affine)
        else:
            paths = [Path(path) for path in ([scan] if isinstance(scan, (str, Path)) else scan)]
            volume = self._read(paths, reading)
        return self.ensemble.predict_case(volume, want_probabilities=probabilities, want_uncertainty=uncertainty)

    def _read(self, paths: Sequence[Path], reading: Reading) -> Volume:
        info = self.ensemble.info
        cases = find_inputs(paths, channels=info.channels, modality=info.modality, reading=reading)
        if len(cases) != 1:
            raise MedsegError(
                Code.NO_CASES,
                "this is not one scan",
                where=paths[0],
                expected="one case",
                got=", ".join(case.case_id for case in cases[:5]),
                remedy="call the predictor once for each, or use medseg predict",
            )
        return load_image(cases[0], channels=info.channels, reading=reading)

    def _volume(
        self, array: NDArray[Any], spacing_mm: Sequence[float] | None, orientation: str, affine: ArrayLike | None
    ) -> Volume:
        plan = self.ensemble.info.plan
        if array.ndim == plan.spatial_dims:
            array = array[None]
        if array.ndim != plan.spatial_dims + 1 or array.shape[0] != plan.num_channels:
            channels = "" if plan.num_channels == 1 else f"{plan.num_channels}, "
            raise MedsegError(
                Code.MODEL,
                "the array does not fit the model",
                expected=f"shape ({channels}*S) with {plan.spatial_dims} axes S",
                got=array.shape,
                remedy="give the same channels, in the same order, as the training cases had",
            )
        if not np.isfinite(array).all():
            raise MedsegError(
                Code.NONFINITE, "the array holds NaN or infinite values", remedy="replace them: outside a scan by air"
            )
        return Volume(array, self._grid(array.shape[1:], spacing_mm, orientation, affine))

    def _grid(
        self, shape: tuple[int, ...], spacing_mm: Sequence[float] | None, orientation: str, affine: ArrayLike | None
    ) -> Grid:
        if affine is not None:
            return Grid(shape, np.asarray(affine, dtype=np.float64))
        if not self.ensemble.info.plan.orientation:
            return Grid.of_picture(shape, None if spacing_mm is None else tuple(spacing_mm))
        letters = [letter for letter in orientation.upper() if letter in AXIS]
        if spacing_mm is None or len(spacing_mm) != len(shape) or {AXIS[letter] for letter in letters} != {0, 1, 2}:
            raise MedsegError(
                Code.NO_GEOMETRY,
                "an array says nothing of its voxels",
                expected="spacing_mm=(…), one number for each axis, and orientation, three letters; or affine",
                got=f"spacing_mm={spacing_mm}, orientation={orientation!r}",
                remedy="give the scan's own, as its file had them: predictions depend on them",
            )
        matrix = np.eye(4)
        matrix[:3, :3] = 0
        for axis, (letter, spacing) in enumerate(zip(letters, spacing_mm, strict=True)):
            matrix[AXIS[letter], axis] = spacing if letter in "RAS" else -spacing
        return Grid(shape, matrix)
