"""Structures that somebody drew on images: what SEG and RTSTRUCT files have in common.

An annotation file names structures (segments, regions of interest) and refers to the images that they were drawn on.
`medseg.formats.dicom.seg` and `medseg.formats.dicom.rtstruct` read the two kinds of files; whoever reads masks goes
through `medseg.formats.dicom.annotations`, which asks the right one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple


class Concept(NamedTuple):
    """A coded concept, as DICOM's code sequences hold it."""

    value: str
    """Code value ("64033007")."""
    scheme: str
    """Coding scheme designator ("SCT")."""
    meaning: str
    """The words ("Kidney")."""


@dataclass(frozen=True)
class Structure:
    """One segment or region of interest, without its voxels."""

    number: int
    """SegmentNumber or ROINumber, which the file's frames or contours refer to."""
    name: str
    """SegmentLabel or ROIName, stripped of blanks at its ends."""
    concept: Concept | None = None
    """What it is (SegmentedPropertyType, RTROIIdentificationCode), where the file codes it."""
    category: Concept | None = None
    """What kind of thing it is (SegmentedPropertyCategory), where the file codes it."""
    color: tuple[int, int, int] | None = None
    """RGB, 0 to 255."""
    values: tuple[int, ...] = ()
    """Of a label map that is written: the values that it is made of, some of them perhaps another structure's too; its
    number if there are none."""

    @property
    def parts(self) -> tuple[int, ...]:
        """The values of a label map that it is made of."""
        return self.values or (self.number,)


@dataclass(frozen=True)
class Annotation:
    """The header of one SEG or RTSTRUCT file: which structures, drawn on which images."""

    path: Path
    kind: Literal["SEG", "RTSTRUCT"]
    structures: tuple[Structure, ...]
    """In the order of their numbers."""
    series: tuple[str, ...]
    """SeriesInstanceUIDs of the images that it refers to; () where it names none."""
    images: frozenset[str]
    """SOPInstanceUIDs of the images that it refers to; empty where it names none."""
    frame_of_reference: str | None
    """FrameOfReferenceUID of the space that it was drawn in."""
    uid: str
    """Its own SOPInstanceUID."""
    series_uid: str
    """Its own SeriesInstanceUID."""
    detail: str = ""
    """What more there is to say in a table: "BINARY", "FRACTIONAL PROBABILITY", "LABELMAP"."""

    @property
    def pseudonym(self) -> str:
        """A name that tells nothing about the patient, as names of files may ("SEG_3f9a2c"): its kind and a digest of
        its UID."""
        return f"{self.kind}_{hashlib.sha256(self.uid.encode()).hexdigest()[:6]}"


@dataclass(frozen=True)
class Algorithm:
    """Who drew structures, as written files say it."""

    name: str
    """The model ("medseg unet"); "manual" for what people drew."""
    version: str
    automatic: bool = True
