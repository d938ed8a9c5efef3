"""The one exception that a user sees, and its stable codes.

Every refusal says what went wrong, where, what was expected, what came, and what to do. Codes never change
their meaning: scripts may rely on them.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from enum import StrEnum


class Code(StrEnum):
    """Stable names of refusals."""

    NO_CASES = "E_NO_CASES"
    """A folder holds no case that could be found.

    Comes of: a path one folder too high or too low; names that no layout fits; a tree of DICOM files without
        annotations.
    To do: point data.root at the folder that the message suggests, or list the cases in a manifest.csv
        (case,image,label).
    """
    MISSING = "E_MISSING"
    """A file that something refers to is not there (an image without a label, half of a pair).

    Comes of: a copy that stopped halfway, a file renamed or removed, a mistyped path.
    To do: put the file back, correct the name, or take out what refers to it; in training data.on_bad_case=skip leaves
        such cases out.
    """
    GRID = "E_GRID"
    """Two arrays that must share a grid differ in shape, position, spacing or direction.

    Comes of: a label drawn on another scan, on a cropped or a resampled copy; channels of one case that were not
        registered.
    To do: resample the label to the image with nearest neighbour, or find the image that it was drawn on.
    """
    NO_GEOMETRY = "E_NO_GEOMETRY"
    """A volume without a trustworthy position in space.

    Comes of: NIfTI that sets neither sform nor qform, Analyze files, DICOM slices without position or orientation.
    To do: convert the original DICOM files again; --without-form (data.without_form=true) reads such NIfTI files all
        the same.
    """
    AFFINE = "E_AFFINE"
    """An affine that is singular, not finite, or of the wrong shape.

    Comes of: a header that a program wrote wrongly: a row of zeros, NaN, a quaternion that is no rotation.
    To do: set the affine that the scanner recorded, or choose the form that is whole with --form (data.form).
    """
    SHEAR = "E_SHEAR"
    """Axes of a volume that are not perpendicular.

    Comes of: an affine registration that was written into the header; gantry tilt that a converter did not undo.
    To do: resample the volume to a rectangular grid. What moves no corner by more than half a voxel is mended, and
        noted.
    """
    FORM = "E_FORM"
    """A NIfTI file whose sform and qform disagree.

    Comes of: a program that changed one of them only, after a registration or a crop.
    To do: find out which one is right (lay the label over the image), then --form sform or qform (data.form).
    """
    LABEL = "E_LABEL"
    """Label values that are not integers, or ids that nothing declares.

    Comes of: an image or a probability map among the labels; labels resampled with interpolation; a table that lacks a
        class.
    To do: resample labels with nearest neighbour; name every value in data.labels, or the file of the right kind.
    """
    NONFINITE = "E_NONFINITE"
    """NaN or infinite voxels in an image.

    Comes of: a division by zero or a mask in an earlier step.
    To do: replace them by the value of air or of the background.
    """
    FOUR_D = "E_4D"
    """More dimensions than were declared.

    Comes of: a time series, several b-values or echoes, pages of a TIFF, channels that nothing declares.
    To do: declare the channels (channel_names in dataset.json), or write each volume into a file of its own.
    """
    CHANNELS = "E_CHANNELS"
    """A case with other channels than expected.

    Comes of: a channel file that is missing or too many, colour among grey pictures, transparency.
    To do: give every case the same channels under the same names, in the order of the training data.
    """
    UNSUPPORTED = "E_UNSUPPORTED"
    """A file of a kind that is not read.

    Comes of: another format, colour in NIfTI, a password on a zip, a file that may not be opened.
    To do: convert it to NIfTI, DICOM, PNG or TIFF; check its permissions.
    """
    TRUNCATED = "E_TRUNCATED"
    """A file that ends too early or fails its checksum.

    Comes of: a download or a copy that was cut; a disk that was full.
    To do: copy or download the file again from its source.
    """
    MALFORMED = "E_MALFORMED"
    """A file whose structure breaks its format's rules (sequences nested without end).

    Comes of: damage, a faulty program, or a file that was made to do harm.
    To do: get the file again from its source; do not use it if it comes from a stranger.
    """
    REFERENCE = "E_REFERENCE"
    """An annotation that refers to images that are not there, or that lie in another frame of reference.

    Comes of: SEG or RTSTRUCT files exported without their series, or beside another one.
    To do: add the images that it was drawn on, or leave it out with data.on_bad_case=skip.
    """
    LIMIT = "E_LIMIT"
    """A header that asks for an absurd amount of memory.

    Comes of: a damaged or forged header; an archive that unpacks to more than the disk or any scan holds.
    To do: get the file again from its source; cut pictures of whole slides into tiles.
    """
    NOT_DICOM = "E_NOT_DICOM"
    """A file expected to be DICOM that is not.

    Comes of: a picture or a text under the ending .dcm; old files without "DICM" at byte 128; a folder of links.
    To do: give the file the ending of its content; --without-preamble (data.without_preamble=true) for old archives.
    """
    CODEC = "E_CODEC"
    """A compressed transfer syntax for which no decoder is installed.

    Comes of: JPEG Lossless, JPEG 2000 and the like without the package that decodes them.
    To do: install the package that the message names; medseg doctor lists what is there.
    """
    MULTI_SERIES = "E_MULTI_SERIES"
    """Several DICOM series where one was expected.

    Comes of: the export of a whole study in one folder.
    To do: choose one with --series; medseg inspect shows them.
    """
    GAP = "E_GAP"
    """A slice is missing within a DICOM series.

    Comes of: an export or a transfer that lost a file.
    To do: export the series again; --resample-irregular (data.resample_irregular=true) fills the gap, and notes it.
    """
    DUPLICATE = "E_DUPLICATE"
    """Two slices at one position with different pixels.

    Comes of: two acquisitions, times or reconstructions under one series.
    To do: separate them by the tag that the message names.
    """
    TILT = "E_TILT"
    """Gantry tilt: slices are shifted against each other in-plane.

    Comes of: a CT of the head with a tilted gantry.
    To do: --resample-irregular (data.resample_irregular=true) shifts the slices back, and notes it.
    """
    SPACING = "E_SPACING"
    """Slice spacing that varies.

    Comes of: two scans in one series, or positions that were rounded.
    To do: --resample-irregular (data.resample_irregular=true) resamples to even slices, and notes it.
    """
    MIXED = "E_MIXED"
    """Slices of different size or modality in one series, or cases of different kinds in one data set.

    Comes of: CT and PET, or volumes and pictures, in one place.
    To do: separate them; data.modality chooses in a tree of DICOM files.
    """
    PHOTOMETRIC = "E_PHOTOMETRIC"
    """A photometric interpretation that was not asked for (RGB, palette).

    Comes of: screenshots and secondary captures among the scans.
    To do: leave them out; where colours are wanted, declare three channels.
    """
    DUPLICATE_ID = "E_DUPLICATE_ID"
    """Two cases with the same id.

    Comes of: a.png beside a.tif, ids that differ in upper and lower case only, inputs of equal names from several
        folders.
    To do: rename one of them: results are written under the id.
    """
    UNPAIRED = "E_UNPAIRED"
    """Two evaluations that are not of the same cases, classes or references.

    Comes of: comparing scores of different test sets.
    To do: evaluate both predictions against the same references.
    """
    LEAK = "E_LEAK"
    """One patient in training and in validation.

    Comes of: a manifest or a list of splits that parts a patient's scans; fine-tuning on a run that trained with these
        cases.
    To do: keep all scans of a patient on one side; state patients in the manifest's column patient.
    """
    CONFIG = "E_CONFIG"
    """A configuration key or value that is not understood.

    Comes of: a mistyped key, a value of another type, settings that contradict each other.
    To do: take the name that the message suggests; docs/configuration.md has every key.
    """
    NAME = "E_NAME"
    """A component name that is not registered.

    Comes of: a mistyped model, loss or metric; a plug-in that is not installed.
    To do: take one of the names that the message lists, or install the plug-in.
    """
    MODEL = "E_MODEL"
    """Parts of a model, or a model and its data, that do not fit together.

    Comes of: other classes, channels, spacing or axes than the model was trained with; widths that do not add up.
    To do: the message has both sides: use the data that the model was made for, or train another.
    """
    CHECKPOINT = "E_CHECKPOINT"
    """A checkpoint that is damaged or incomplete.

    Comes of: a copy that was cut, a disk that was full, a file of another program.
    To do: copy it again, or take the other one: --checkpoint latest.
    """
    RUN = "E_RUN"
    """A folder that is not a finished or started run.

    Comes of: a mistyped path, the folder above, a run that ended before its first step.
    To do: name the folder that medseg train printed.
    """
    VERSION = "E_VERSION"
    """A run, checkpoint, manifest or bundle that another version of medseg wrote, in a form that this one cannot read.

    Comes of: a model of a newer medseg, or of one so old that its form is not read any more.
    To do: install the version of medseg that the message names, or train again.
    """
    CHANGED = "E_CHANGED"
    """Data that are not those that a run began with.

    Comes of: a label corrected, an image replaced or a table of classes edited while a training was interrupted.
    To do: put the files back as they were, or begin a new run from the weights: trainer.initial=RUN.
    """
    OUTPUT = "E_OUTPUT"
    """An output that cannot be written, or that would overwrite something.

    Comes of: a full or read-only disk; results of an earlier call.
    To do: make room, choose another folder, or say --overwrite. Nothing half-written stands under a final name.
    """
    PROCESS = "E_PROCESS"
    """One of several processes that train together has ended.

    Comes of: a process that was refused (its own message says why), that the system killed for its memory, or a machine
        that is gone.
    To do: see what ended it; then go on with the run: medseg train resume=RUN. torchrun --max-restarts does so itself.
    """
    ARCHIVE = "E_ARCHIVE"
    """A DICOM archive, an object storage or a cluster that cannot be reached, or that refuses.

    Comes of: a mistyped URL, a network or a server that is down, credentials that are missing or have run out, a
        certificate that nobody vouches for.
    To do: the message has the server's answer; docs/archive.md says where credentials and certificates are looked for.
        When it is mended, the same command with --resume goes on.
    """
    NAN_LOSS = "E_NAN_LOSS"
    """The training loss became NaN or infinite.

    Comes of: a learning rate that is too high, 16-bit arithmetic, extreme intensities.
    To do: go on from the last checkpoint with trainer.precision=fp32, or with trainer.on_nan_loss=skip where a step now
        and then does it; else begin again with a smaller optimizer.lr.
    """


UNPRINTABLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""What steers terminals, turns the direction of text, or is half a character: files of strangers may hold it."""
MAX_LINE = 4000
"""Characters of one line of a message; the rest of it is counted."""


class MedsegError(Exception):
    """A refusal with a stable code.

    Args:
        code: one of `Code`.
        message: what is wrong, one sentence without the file's name.
        where: the file, case id or configuration key concerned.
        expected: what would have been right.
        got: what came instead.
        remedy: what the user can do.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        self.code = code
        self.message = message
        self.where = where
        self.expected = expected
        self.got = got
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.message}"]
        for name in ("where", "expected", "got"):
            value = getattr(self, name)
            if value is not None:
                lines.append(f"  {name + ':':<10}{value}")
        if self.remedy is not None:
            lines.append(f"  {'remedy:':<10}{self.remedy}")
        return "\n".join(map(_printable, "\n".join(lines).split("\n")))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.code, self.message, self.where, self.expected, self.got, self.remedy))


def _printable(line: str) -> str:
    """A line that a terminal shows and does not obey."""
    more = f"… ({len(line) - MAX_LINE} more characters)" if len(line) > MAX_LINE else ""
    return UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], line[:MAX_LINE]) + more


def _rebuild(code: Code, message: str, where: object, expected: object, got: object, remedy: str | None) -> MedsegError:
    return MedsegError(code, message, where=where, expected=expected, got=got, remedy=remedy)


DISK_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "a file grows larger than the system allows",
    errno.EROFS: "the disk is read-only",
    errno.EIO: "the disk fails",
}
"""Errors of the operating system that are no fault of medseg, wherever they come up."""


NO_MEMORY = ("OutOfMemoryError", "can't allocate memory", "not enough memory")
"""What PyTorch's errors say where the memory does not suffice: their type on a GPU, their text on a CPU."""


SHARED_MEMORY = ("/dev/shm/nccl", "shared memory segment")  # noqa: S108 (in messages)
"""What NCCL's errors say where /dev/shm is too small, which is no disk."""


def of_machine(error: BaseException) -> MedsegError | None:
    """The refusal that stands for a disk or memory that does not suffice; None for other errors.

    Args:
        error: what came up, or what it was made of (`__cause__`).
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (OSError, RuntimeError)) and any(word in str(found) for word in SHARED_MEMORY):
            return MedsegError(
                Code.LIMIT,
                "the memory that processes share (/dev/shm) does not suffice for NCCL",
                where="trainer.devices",
                expected="1 GiB, as NVIDIA recommends",
                got=" ".join(str(found).split())[-200:],
                remedy="docker run --shm-size 1g; or export NCCL_SHM_DISABLE=1, which is slower",
            )
        if isinstance(found, OSError) and found.errno in DISK_FAULTS:
            return MedsegError(
                Code.OUTPUT,
                DISK_FAULTS[found.errno],
                got=found.strerror,
                remedy="make room, or write to another place; a training goes on by: medseg train resume=RUN",
            )
        text = f"{type(found).__name__} {found}" if isinstance(found, RuntimeError) else ""
        if isinstance(found, MemoryError) or any(word in text for word in NO_MEMORY):
            return MedsegError(
                Code.LIMIT,
                "the memory does not suffice",
                got=f"{type(found).__name__}: {str(found).splitlines()[0]}" if str(found) else type(found).__name__,
                remedy="close other programs; train with a smaller data.plan.batch_size or data.plan.patch_size, or "
                "state what there is by data.plan.memory_gb; predict with --batch-size 1, or --device cpu",
            )
        found = found.__cause__
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that names the closest known names, or all of them if none is close.

    Args:
        name: what the user wrote.
        known: what exists.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.55)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "choose one of: " + ", ".join(names)
