"""The files of one predicted case: NIfTI or PNG, DICOM SEG, RTSTRUCT."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from medseg import __version__
from medseg.bundle import BundleInfo
from medseg.data.layouts import Case
from medseg.errors import Code, MedsegError
from medseg.formats import Reading, Source, read_grid, write_label
from medseg.formats.content import Kind, kind_of
from medseg.formats.dicom.export import ENDINGS, Form, write_annotation
from medseg.formats.dicom.structures import Algorithm
from medseg.formats.label_table import written_names
from medseg.inference.manifest import digest_of_file
from medseg.labels import Labels
from medseg.volume import Volume

FRAME_OF_REFERENCE_TAG = 0x0020_0052
UNFINISHED = re.compile(r"\.[0-9a-f]{32}")
"""Names of the folders in which a case's files are written."""
LEFT_AFTER_S = 3600.0
"""Seconds after which nobody works in such a folder any more."""


@dataclass(frozen=True)
class Made:
    """The files of a case in a folder of their own, before they get their names.

    Args:
        case_id: the case.
        folder: of the outputs.
        unfinished: name of the folder in it where the files lie.
        labels: names of the label files, relative to `folder`.
        names: of all files.
    """

    case_id: str
    folder: Path
    unfinished: str
    labels: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def paths(self) -> dict[str, Path]:
        """Name → where the file is now."""
        return {name: self.folder / self.unfinished / name for name in self.names}

    def digests(self) -> dict[str, str]:
        """Name → SHA-256."""
        return {name: digest_of_file(path) for name, path in self.paths.items()}

    def settle(self, staying: Collection[str]) -> list[Path]:
        """Give files their names; the others are discarded.

        Args:
            staying: names of the files that stay.
        Returns:
            The label files that stay.
        Raises:
            MedsegError: E_OUTPUT.
        """
        try:
            for name, path in self.paths.items():
                if name in staying:
                    (self.folder / name).parent.mkdir(exist_ok=True)
                    path.replace(self.folder / name)
        except OSError as error:
            raise self.refusal(error) from error
        finally:
            self.discard()
        return [self.folder / name for name in self.labels if name in staying]

    def discard(self) -> None:
        """Remove what has got no name."""
        shutil.rmtree(self.folder / self.unfinished, ignore_errors=True)

    def refusal(self, error: OSError) -> MedsegError:
        """What stands for an error of the disk."""
        return MedsegError(
            Code.OUTPUT,
            "the files cannot be written",
            where=self.case_id,
            got=error.strerror or type(error).__name__,
            remedy="check that the folder is writable and has room",
        )


@dataclass(frozen=True)
class Export:
    """How label maps become files.

    Args:
        info: the model: its classes are the structures.
        forms: which files each case gets.
        reading: as the scans are read.
        model_names: of the networks, for files that name the algorithm.
        subset: the classes that are written; all if None.
    """

    info: BundleInfo
    forms: tuple[Form, ...]
    reading: Reading
    model_names: str
    subset: Labels | None = None

    @property
    def labels(self) -> Labels:
        """The classes that are written."""
        return self.subset or self.info.labels

    def check(self, cases: Iterable[Case]) -> None:
        """Refuse cases of which a file could not be written, before any work.

        Raises:
            MedsegError: E_OUTPUT, or E_NO_GEOMETRY for images without a frame of reference, naming the case.
        """
        drawn = [form for form in self.forms if form is not Form.NIFTI]
        what = " and ".join(drawn)
        if Form.RTSTRUCT in drawn and not self.info.plan.orientation:
            raise MedsegError(
                Code.OUTPUT,
                "the model segments pictures, and contours lie in space",
                where=f"--format {Form.RTSTRUCT}",
                remedy=f"use --format nifti,{Form.DICOM_SEG}",
            )
        for case in cases if drawn else ():
            if not is_dicom_source(case.images[0], self.reading):
                raise MedsegError(
                    Code.OUTPUT,
                    f"{what} can only be written for DICOM scans, whose files they refer to",
                    where=case.case_id,
                    expected="a DICOM series",
                    got=case.images[0].name,
                    remedy="leave --format out for NIfTI, or give the DICOM series of this case",
                )
            if Form.RTSTRUCT in drawn and self.reading.resample_irregular:
                self._refuse_resampled(case)
            if self.info.plan.orientation:
                self._refuse_without_space(case, what)

    def name(self, case_id: str, form: Form) -> str:
        """Name of a case's file, known before the scan is read."""
        ending = ".png" if form is Form.NIFTI and not self.info.plan.orientation else ENDINGS[form]
        return case_id + ending

    def names(self, case_id: str) -> list[str]:
        """Names of all files of a case."""
        return [self.name(case_id, form) for form in self.forms]

    def make(
        self,
        case: Case,
        indices: Volume,
        label: Volume,
        folder: Path,
        *,
        others: Mapping[str, Callable[[Path], None]] = MappingProxyType({}),
    ) -> Made:
        """Write all files of a case, not yet under their names: all of them, or none.

        Args:
            case: where the scan came from.
            indices: indices of `labels` on the scan's grid, for DICOM.
            label: the same in the values of the training labels, for NIfTI.
            folder: of the outputs; exists.
            others: further files: name, relative to the folder → what writes it.
        Returns:
            The files, whole and on the disk. Whoever asked settles or discards them.
        Raises:
            MedsegError: E_OUTPUT, and what the writers refuse.
        """
        labels = tuple(self.names(case.case_id))
        made = Made(case.case_id, folder, f".{uuid.uuid4().hex}", labels, (*labels, *others))
        try:
            for path in made.paths.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            for form, name in zip(self.forms, labels, strict=True):
                self._write_label(made.paths[name], form, case, indices, label)
            for name, write in others.items():
                write(made.paths[name])
            for path in made.paths.values():
                _to_disk(path)
        except OSError as error:
            made.discard()
            raise made.refusal(error) from error
        except BaseException:
            made.discard()
            raise
        return made

    def _write_label(self, path: Path, form: Form, case: Case, indices: Volume, label: Volume) -> None:
        from medseg.formats.dicom.series import series_files

        labels = self.labels
        if form is Form.NIFTI:
            write_label(path, label, written_names(labels))
        else:
            source = series_files(case.images[0], self.reading)
            parts = labels.parts if labels.regions else None
            write_annotation(path, form, indices, labels.foreground, source, self.algorithm, parts=parts)

    @property
    def algorithm(self) -> Algorithm:
        """The model, as written files name it."""
        return Algorithm(f"medseg {self.model_names}", __version__)

    def _refuse_resampled(self, case: Case) -> None:
        """Contours lie on the planes of the scan's files: a scan that must be resampled has no such planes."""
        try:
            read_grid(case.images[0], replace(self.reading, resample_irregular=False))
        except MedsegError as error:
            if error.code not in (Code.TILT, Code.GAP, Code.SPACING):
                raise
            raise MedsegError(
                Code.OUTPUT,
                "an RTSTRUCT cannot be written for a series that has to be resampled: contours lie on its slices",
                where=case.case_id,
                got=f"{error.code}: {error.message}",
                remedy="use --format nifti,dicom-seg for this case",
            ) from error

    def _refuse_without_space(self, case: Case, what: str) -> None:
        """What is drawn lies in the frame of reference of its images. A series that cannot be read is left to who reads
        it: cases before it are still written."""
        from medseg.formats.dicom.parsing import parse
        from medseg.formats.dicom.series import series_files

        try:
            first = series_files(case.images[0], self.reading)[0]
            header, *_ = parse(first, [FRAME_OF_REFERENCE_TAG], without_preamble=self.reading.without_preamble)
        except MedsegError:
            return
        if not header.get("FrameOfReferenceUID"):
            raise MedsegError(
                Code.NO_GEOMETRY,
                f"the images name no frame of reference, so a {what} of them would lie nowhere",
                where=case.case_id,
                expected="FrameOfReferenceUID",
                remedy="leave --format out for NIfTI",
            )


def tidy(folder: Path) -> None:
    """Delete what processes that were killed have left behind; what is younger may be another one's work."""
    for path in folder.glob(".*"):
        try:
            left = UNFINISHED.fullmatch(path.name) and time.time() - path.stat().st_mtime > LEFT_AFTER_S
        except OSError:  # its owner was faster
            continue
        if left and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Wait until a file is on the disk: a power cut later must not leave its name without its content."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def is_dicom_source(source: Source, reading: Reading) -> bool:
    """True where a scan comes from DICOM files: a series, a folder or zip of one, a single file."""
    if not isinstance(source, Path) or source.is_dir():
        return True
    from medseg.formats.dicom.archive import is_zip

    kind = kind_of(source)
    return kind is Kind.DICOM or (kind is None and (reading.without_preamble or is_zip(source)))


def files_of(sources: Sequence[Source]) -> list[Path]:
    """The files, folders or archives that a case is read from."""
    return [path for source in sources for path in ([source] if isinstance(source, Path) else source.files)]
