"""One case of many: read it, predict it, write its files and its line of the manifest, or set it aside."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from medseg.data.cases import load_image
from medseg.data.layouts import Case
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading
from medseg.formats.dicom.export import Form
from medseg.formats.remarks import gathered_warnings, remarks
from medseg.formats.shares import write_shares
from medseg.inference.case_statistics import cut_off, structure_statistics
from medseg.inference.ensemble import Ensemble
from medseg.inference.exchange import HERE, Exchange
from medseg.inference.export import Export, Made
from medseg.inference.manifest import Entry, Manifest, digest_of_file, failed_with, maker_of
from medseg.inference.prediction import Prediction
from medseg.inference.subset import Subset
from medseg.volume import Volume

PREVIEW_FOLDER = "previews"
"""Below the label files: pictures beside them would be taken for label files by whoever reads the folder."""
PROBABILITIES_FOLDER = "probabilities"
UNCERTAINTY_FOLDER = "uncertainty"
DISAGREEMENT_FOLDER = "disagreement"

Draw = Callable[..., None]


@dataclass(frozen=True)
class Options:
    """What is to be written, and how cases are treated."""

    forms: tuple[Form, ...] = (Form.NIFTI,)
    """Which files each case gets."""
    reading: Reading = STRICT
    """What is asked of the readers beyond their strict defaults."""
    classes: str | None = None
    """Names with commas of the classes to keep; all if None."""
    statistics: bool = False
    """Whether `STATISTICS_FILE` is written."""
    probabilities: bool = False
    """Whether the probabilities of all that the model knows are written."""
    uncertainty: bool = False
    """Whether the uncertainty and the disagreement are written."""
    draw_preview: Draw | None = None
    """`reports.overlay.save_overlay`, or None for no pictures."""
    overwrite: bool = False
    """Replace files that exist."""
    resume: bool = False
    """Leave out the cases that the manifest tells to be done."""
    on_bad_case: Literal["error", "skip"] = "error"
    """Whether a bad case ends the work, or is listed and left out."""


@dataclass(frozen=True, eq=False)
class Scan:
    """What one stage hands to the next."""

    case: Case
    """With its images on this disk."""
    image: Volume | None
    """The scan; None where the case was done before, or where no later stage needs it."""
    prediction: Prediction | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Done:
    """A case whose files are whole, but not yet under their names."""

    entry: Entry
    made: Made
    shape: str
    """Of its label map, in words."""
    remarks: tuple[str, ...]
    """What the user is told."""


class Job:
    """The three stages of a case, and what is counted.

    Args:
        ensemble: the loaded models.
        subset: the classes that are written.
        export: how label maps become files.
        manifest: of the folder.
        options: what is written, and how.
        console: where the user reads.
        bar: with one task.
        num_cases: for the lines.
        refused: cases that cannot be written, known before they are read.
        exchange: where scans come from, and files go.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        subset: Subset,
        export: Export,
        manifest: Manifest,
        options: Options,
        console: Console,
        bar: Progress,
        num_cases: int,
        refused: Mapping[str, MedsegError],
        exchange: Exchange = HERE,
    ) -> None:
        self.ensemble, self.subset, self.export = ensemble, subset, export
        self.manifest, self.options, self.refused = manifest, options, refused
        self.console, self.bar, self.num_cases = console, bar, num_cases
        self.exchange = exchange
        self.task = bar.task_ids[0]
        self.digests: dict[str, str] = {}
        self.files: list[Path] = []
        self.bad: dict[str, dict[str, str]] = {}
        self.num_before = 0
        self.num_written = 0
        self.fatal: Exception | None = None

    @property
    def num_done(self) -> int:
        """Cases whose files are there."""
        return self.num_before + self.num_written

    def names(self, case_id: str) -> list[str]:
        """All files that a case is to have, relative to the folder."""
        preview = [f"{PREVIEW_FOLDER}/{case_id}.png"] if self.options.draw_preview is not None else []
        return [*self.export.names(case_id), *preview, *self._shares(case_id)]

    def _shares(self, case_id: str) -> dict[str, Callable[[Prediction], Volume]]:
        """The files of probabilities, uncertainty and disagreement: name → what of a prediction goes there."""
        is_picture = not self.ensemble.info.plan.orientation
        found: dict[str, Callable[[Prediction], Volume]] = {}
        if self.options.probabilities and is_picture:
            for index in range(self.ensemble.info.labels.num_outputs):
                name = f"{PROBABILITIES_FOLDER}/{case_id}_{index:03d}.png"
                found[name] = lambda prediction, index=index: _channel(prediction.probabilities, index)  # type: ignore[misc]
        elif self.options.probabilities:
            found[f"{PROBABILITIES_FOLDER}/{case_id}.nii.gz"] = lambda prediction: _made(prediction.probabilities)
        if self.options.uncertainty:
            ending = ".png" if is_picture else ".nii.gz"
            found[f"{UNCERTAINTY_FOLDER}/{case_id}{ending}"] = lambda prediction: _made(prediction.uncertainty)
            found[f"{DISAGREEMENT_FOLDER}/{case_id}{ending}"] = lambda prediction: _made(prediction.disagreement)
        return found

    def read(self, case: Case) -> Scan:
        """Open a scan, unless it is done."""
        begin = time.perf_counter()
        if case.case_id in self.refused:
            raise self.refused[case.case_id]
        again: list[str] = []
        with gathered_warnings() as warnings:
            digest = self.digests[case.case_id] = self.exchange.digest(case)
            if self.options.resume:
                names, overwrite = self.names(case.case_id), self.options.overwrite
                here, elsewhere = self.exchange.staying(names), self.exchange.delivered(names)
                why = self.manifest.outstanding(case.case_id, digest, here, overwrite=overwrite, delivered=elsewhere)
                if why is None:
                    return Scan(case, None)
                if not overwrite:
                    self.manifest.refuse_foreign(case.case_id, self.exchange.standing(names))
                again = [f"done again: {why}"] if why.startswith(("its input", "files of it")) else []
            info = self.ensemble.info
            local = self.exchange.fetch(case)
            if local is not case:  # what could be said of those on the disk before the work began
                self.export.check([local])
            case = local
            image = load_image(case, channels=info.channels, reading=self.options.reading)
            image = _with_modality_note(image, info.modality)
        seconds = (("read", time.perf_counter() - begin),)
        return Scan(case, image, None, image.notes, (*again, *warnings), seconds)

    def predict(self, case: Case, scan: Scan) -> Scan:
        """Class indices of a scan."""
        if scan.image is None:
            return scan
        begin = time.perf_counter()
        options, labels = self.options, self.subset.labels
        self.bar.update(self.task, description=case.case_id)
        try:
            with gathered_warnings() as warnings:
                found = self.ensemble.predict_case(
                    scan.image,
                    want_probabilities=options.probabilities,
                    want_uncertainty=options.uncertainty,
                    scratch=self.manifest.folder,
                )
        except (MedsegError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            self.fatal = error  # of the program or the device: the next case would not fare better
            raise
        if options.classes is not None:
            indices = replace(found.indices, array=self.subset.apply(_uint8(found.indices)))
            found = replace(found, indices=indices, labels=replace(indices, array=labels.to_values(_uint8(indices))))
        needed = options.statistics or options.draw_preview is not None
        return replace(
            scan,
            image=scan.image if needed else None,
            prediction=found,
            warnings=(*scan.warnings, *warnings),
            seconds=(*scan.seconds, ("predict", time.perf_counter() - begin)),
        )

    def write(self, case: Case, scan: Scan | Exception) -> None:
        """Write a case's files and its line, and tell the user; bad cases have only a line."""
        if isinstance(scan, Scan):
            if scan.prediction is None:
                self.num_before += 1
            else:
                try:
                    self.settle(self.make(scan.case, scan, scan.prediction))
                except Exception as error:
                    if isinstance(error, MedsegError) and error.code is Code.OUTPUT:  # of the disk, not of the case
                        raise
                    self._set_aside(case, error)
        else:
            self._set_aside(case, scan)
        self.exchange.drop(case)
        self.digests.pop(case.case_id, None)
        self.bar.advance(self.task)

    def make(self, case: Case, scan: Scan, found: Prediction) -> Done:
        """Write a case's files, not yet under their names, and deliver those that do not stay.

        Raises:
            MedsegError: E_OUTPUT, which the next case would meet too; what the writers and the exchange refuse.
        """
        try:
            return self._make(case, scan, found)
        except MedsegError as error:
            if error.code is Code.OUTPUT:
                self.fatal = error
            raise

    def _make(self, case: Case, scan: Scan, found: Prediction) -> Done:
        begin = time.perf_counter()
        labels, case_id, info = self.subset.labels, case.case_id, self.ensemble.info
        label, image, draw = found.labels, scan.image, self.options.draw_preview
        others: dict[str, Callable[[Path], None]] = {
            name: lambda path, shares=shares: write_shares(path, shares(found))  # type: ignore[misc]
            for name, shares in self._shares(case_id).items()
        }
        if draw is not None and image is not None:
            others[f"{PREVIEW_FOLDER}/{case_id}.png"] = lambda path: draw(
                path, image, labels=labels, predicted=label, title=case_id
            )
        rows: list[dict[str, Any]] = []
        with gathered_warnings() as warnings:
            if self.options.statistics and image is not None:
                rows = structure_statistics(_uint8(found.indices), image, labels, info.channels)
            made = self.export.make(case, found.indices, label, self.manifest.folder, others=others)
            identity = f"{self.manifest.session} {maker_of(self.ensemble)} {self.digests[case_id]}"
            try:
                if replacing := self.exchange.replacing(made.names):
                    self.manifest.announce(case_id, {name: digest_of_file(made.paths[name]) for name in replacing})
                self.exchange.deliver(case, made.paths, identity)
                digests = made.digests()
            except OSError as error:
                made.discard()
                raise made.refusal(error) from error
            except BaseException:
                made.discard()
                raise
        cut = cut_off(rows)
        said = (*scan.warnings, *warnings, *([cut] if cut else []))
        seconds = dict(scan.seconds) | {"write": time.perf_counter() - begin}
        entry = Entry(
            case_id,
            self.manifest.session,
            self.digests[case_id],
            digests,
            {stage: round(time_s, 4) for stage, time_s in seconds.items()},
            scan.notes,
            tuple(text for text in remarks((), said) if text not in scan.notes),
            self.exchange.delivered(made.names),
            statistics=tuple(rows),
        )
        return Done(entry, made, _shape(label), tuple(remarks(scan.notes, said)))

    def settle(self, done: Done) -> None:
        """Give a case its line and its files their names, and tell the user.

        Raises:
            MedsegError: E_OUTPUT.
        """
        try:
            self.manifest.append(done.entry)
        except BaseException:
            done.made.discard()
            raise
        files = done.made.settle(self.exchange.staying(done.made.names))
        self.files += files
        self.num_written += 1
        names = ", ".join([str(files[0]), *(file.name for file in files[1:])]) if files else done.entry.case
        self._print(f"{self._position}  {names}  {done.shape}")
        say(self.console, done.remarks)

    def _set_aside(self, case: Case, error: Exception) -> None:
        """Note a bad case; raise where it ends the work."""
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            error = _too_large(case, error)
        failed = failed_with(error)
        self.manifest.append(Entry(case.case_id, self.manifest.session, self.digests.get(case.case_id), failed=failed))
        if self.options.on_bad_case == "error" or error is self.fatal or self.exchange.is_fatal(error):
            raise error
        self.bad[case.case_id] = failed
        self._print(f"{self._position}  {case.case_id} is bad and left out: {failed['code']}: {failed['message']}")
        if any((self.manifest.folder / name).exists() for name in self.export.names(case.case_id)):
            say(self.console, [f"{case.case_id}: files of it are there from before, and stay as they are"])
        if not isinstance(error, MedsegError):
            self._print("".join(traceback.format_exception(error)))

    @property
    def _position(self) -> str:
        return f"{self.num_done + len(self.bad)}/{self.num_cases}"

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)


def _with_modality_note(image: Volume, trained_on: str | None) -> Volume:
    """The scan, with a note where it is of another modality than the model's; a single scan is what the user chose."""
    if None in (image.modality, trained_on) or image.modality == trained_on:
        return image
    note = f"the scan is {image.modality}, the model was trained on {trained_on}: do not expect sense of its labels"
    return replace(image, notes=(*image.notes, note))


def _uint8(indices: Volume) -> NDArray[np.uint8]:
    return np.asarray(indices.array, dtype=np.uint8)


def _made(volume: Volume | None) -> Volume:
    """What was asked for."""
    if volume is None:
        raise RuntimeError("the prediction lacks what was asked for")
    return volume


def _channel(volume: Volume | None, index: int) -> Volume:
    whole = _made(volume)
    return replace(whole, array=whole.array[index])


def _too_large(case: Case, error: Exception) -> MedsegError:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    refusal = MedsegError(
        Code.LIMIT,
        "there is not enough memory for the scan",
        where=case.case_id,
        got=type(error).__name__,
        remedy="use a smaller --batch-size, or a machine with more memory",
    )
    refusal.__cause__ = error
    return refusal


def say(console: Console, lines: Iterable[str]) -> None:
    """Print remarks."""
    for line in lines:
        console.print(f"note: {line}", style="yellow", highlight=False, soft_wrap=True, markup=False)


def _shape(label: Volume) -> str:
    spacing = "×".join(f"{s:.3g}" for s in label.grid.spacing_mm)
    unit = "px" if label.grid.is_picture else "mm"
    return f"{'×'.join(str(s) for s in label.grid.shape)} at {spacing} {unit}, {label.array.dtype}"
