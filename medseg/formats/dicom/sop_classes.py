"""What kind of DICOM object a SOP class is."""

from __future__ import annotations

from functools import cache

from pydicom import config
from pydicom.uid import UID

DICOM_STORAGE = "1.2.840.10008.5.1.4.1.1."
SEGMENTATIONS = tuple(DICOM_STORAGE + part for part in ("66.4", "66.7"))
STRUCTURE_SET = DICOM_STORAGE + "481.3"
MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
"""A DICOMDIR; never followed."""
KINDS = {
    MEDIA_DIRECTORY: "DICOMDIR",
    DICOM_STORAGE + "88.": "SR",
    DICOM_STORAGE + "66.1": "REG",
    DICOM_STORAGE + "66.2": "fiducials",
    DICOM_STORAGE + "66.3": "REG",
    DICOM_STORAGE + "66.4": "SEG",
    DICOM_STORAGE + "66.7": "SEG",
    DICOM_STORAGE + "66.5": "surface SEG",
    DICOM_STORAGE + "66": "raw data",
    DICOM_STORAGE + "67": "value mapping",
    DICOM_STORAGE + "11.": "presentation state",
    DICOM_STORAGE + "9.": "waveform",
    DICOM_STORAGE + "104.": "document",
    DICOM_STORAGE + "481.2": "RTDOSE",
    DICOM_STORAGE + "481.3": "RTSTRUCT",
    DICOM_STORAGE + "481.5": "RTPLAN",
    DICOM_STORAGE + "481.8": "RTPLAN",
    **{f"{DICOM_STORAGE}481.{n}": "RT" for n in (4, 6, 7, 9, *range(10, 30))},
}
"""SOP classes that are not images: prefixes where they end in a dot or are shorter than what begins with them."""


@cache
def name_of(uid: str) -> str:
    """The standard's name of a UID, or the UID itself."""
    return UID(uid, validation_mode=config.IGNORE).name


def kind_of_object(sop_class: str) -> str:
    """What to call a DICOM object in a count: "SR", "DICOMDIR", or the name of its SOP class."""
    exact = KINDS.get(sop_class)
    if exact is not None:
        return exact
    prefix = next((p for p in KINDS if sop_class.startswith(p if p.endswith(".") else p + ".")), None)
    return KINDS[prefix] if prefix else name_of(sop_class).removesuffix(" Storage") or "unknown"


@cache
def is_image(sop_class: str) -> bool:
    """False for SOP classes that are known to be something else."""
    return sop_class not in KINDS and not any(sop_class.startswith(p if p.endswith(".") else p + ".") for p in KINDS)


def names_image(sop_class: str) -> bool:
    """True for SOP classes whose name says that they are images."""
    return "Image Storage" in name_of(sop_class)
