"""Names of classes inside a NIfTI label file: extensions of its header.

The content is the XML of Connectome Workbench (`CaretExtension` with a `LabelTable`). It stands there twice: under the
code 0 ("unknown"), where TotalSegmentator writes and reads it, and under the code that the NIfTI register holds for it,
the only one that Workbench looks at. Programs that know neither step over both, as the standard asks. 3D Slicer and
ITK-SNAP read names from files of their own only.

Source: NIfTI-1 standard, "extensions"; nifti1_io.h of nifticlib (NIFTI_ECODE_CARET); TotalSegmentator's
nifti_ext_header.py; Workbench's VolumeFile::parseExtensions.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from medseg.errors import Code, MedsegError

CODES = (0, 30)
"""NIFTI_ECODE_IGNORE, which must come first for TotalSegmentator, and NIFTI_ECODE_CARET."""
_GOLDEN = 0.61803398875
"""Hues that far apart around the circle never repeat."""
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML may hold."""


def names_extension(names: Mapping[int, str]) -> bytes:
    """The content of the extension.

    Args:
        names: value in the file → name of the class, without the background: what has a colour is drawn.
    """
    labels = "".join(_label(value, name) for value, name in sorted(names.items()))
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<CaretExtension><VolumeInformation Index="0">\n'
        f"<LabelTable>\n{labels}</LabelTable>\n"
        "<StudyMetaDataLinkSet/><VolumeType>Label</VolumeType></VolumeInformation></CaretExtension>\n"
    )
    return text.encode()


def names_in(content: bytes) -> dict[int, str]:
    """The names that an extension holds, value → name; those of TotalSegmentator and Workbench are read too.

    Raises:
        MedsegError: E_MALFORMED if it is not such XML, E_UNSUPPORTED if it declares entities (which may grow without
            bounds).
    """
    text = content.rstrip(b"\0 \n")
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise MedsegError(
            Code.UNSUPPORTED,
            "names in the header of a label file declare entities",
            where="its header extension",
            expected="the XML of a CaretExtension",
            got="<!DOCTYPE or <!ENTITY",
            remedy="write the label file again without it",
        )
    try:
        labels = ElementTree.fromstring(text).iter("Label")  # noqa: S314 (without entities there is no harm in it)
        return {int(label.attrib["Key"]): label.text or "" for label in labels}
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise MedsegError(
            Code.MALFORMED,
            "the names in the header of a label file cannot be read",
            where="its header extension",
            expected="the XML of a CaretExtension",
            got=f"{type(error).__name__}: {error}",
            remedy="write the label file again without it",
        ) from error


def _label(value: int, name: str) -> str:
    red, green, blue = colorsys.hsv_to_rgb(value * _GOLDEN % 1, 0.65, 0.95)
    colour = f'Red="{red:.3f}" Green="{green:.3f}" Blue="{blue:.3f}" Alpha="1"'
    return f'<Label Key="{value}" {colour}>{escape(_NOT_IN_XML.sub("", name))}</Label>\n'
