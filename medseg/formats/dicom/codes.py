"""What structures are called in DICOM's own words: SNOMED CT concepts for names of classes, and their colours.

A name is compared by its words, whatever their order, case and separators ("kidney_left", "Left Kidney"), with the
concepts that DICOM lists for segments: anatomical structures (PS3.16 CID 7192), morphologically abnormal ones (CID
7159) and tissues (CID 7166), as pydicom carries them. Words that only say where a part lies are tried, then left out;
left and right are kept as a modifier of the type. What no list holds gets the category and the type "Tissue".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from medseg.formats.dicom.structures import Concept, Structure

PALETTE = (
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
    (0, 128, 128),
    (220, 190, 255),
    (170, 110, 40),
    (255, 250, 200),
    (128, 0, 0),
    (170, 255, 195),
    (128, 128, 0),
    (255, 215, 180),
    (0, 0, 128),
    (128, 128, 128),
)
"""RGB of structure 1, 2, …; it starts again after the last. Colours that people tell apart (Trubetskoy 2017)."""
LISTS = (("cid7192", "AnatomicalStructure"), ("cid7159", "MorphologicallyAbnormalStructure"), ("cid7166", "Tissue"))
"""Context groups of types, and the category (CID 7150) of each. Of the same words the earlier list wins."""
FALLBACK = "Tissue"
"""Category and type of what is not known."""
SYNONYMS = {
    "tumour": "neoplasm",
    "tumor": "neoplasm",
    "cancer": "neoplasm",
    "gtv": "neoplasm",
    "metastasis": "secondary neoplasm",
    "metastases": "secondary neoplasm",
    "lesions": "lesion",
    "oedema": "edema",
    "haemorrhage": "hemorrhage",
    "oesophagus": "esophagus",
    "vessel": "blood vessel",
    "vessels": "blood vessel",
    "vertebrae": "vertebra",
    "bronchi": "bronchus",
    "hippocampi": "hippocampus",
    "femora": "femur",
    "humeri": "humerus",
    "brainstem": "brain stem",
    "adrenal": "adrenal gland",
    "parotid": "parotid gland",
    "bowel": "intestine",
}
"""Words that DICOM's lists spell in another way."""
PHRASES = {
    frozenset({"urinary", "bladder"}): "bladder",
    frozenset({"gall", "bladder"}): "gallbladder",
    frozenset({"small", "intestine"}): "small intestine",
    frozenset({"spinal", "column"}): "spine",
    frozenset({"femoral", "head"}): "head of femur",
    frozenset({"thyroid", "gland"}): "thyroid",
}
"""The same for several words."""
ABNORMAL = ("neoplasm", "edema", "necrosis", "hemorrhage", "cyst", "abscess", "nodule", "mass", "lesion")
"""What a name means if it holds one of these words among others ("liver tumour", "GTV-1"), the first one first."""
SIDES = {"left": "Left", "l": "Left", "right": "Right", "r": "Right"}
PLACES = frozenset({*SIDES, "anterior", "posterior", "superior", "inferior", "upper", "lower", "medial", "lateral"})
"""Words that say where a part lies in a whole: "hippocampus anterior" is coded as hippocampus."""
EMPTY_WORDS = frozenset({"of", "the", "and", "structure"})


def structures_of(names: Sequence[str]) -> tuple[Structure, ...]:
    """Structures 1 … n of class names, with their concepts and colours.

    Args:
        names: of classes 1 … n, without the background.
    """
    structures = []
    for number, name in enumerate(names, start=1):
        concept, category = concept_of(name)
        color = PALETTE[(number - 1) % len(PALETTE)]
        structures.append(Structure(number, name, concept, category, color))
    return tuple(structures)


def concept_of(name: str) -> tuple[Concept, Concept]:
    """(type, category) of a structure by its name; both "Tissue" where no list holds it."""
    known = _known()
    plain = [word for word in _words(name) if not word.isdigit()]
    kept = [word for word in plain if word not in PLACES]
    without_side = [word for word in plain if word not in SIDES]
    for words in (plain, without_side, kept):
        for form in (words, [SYNONYMS.get(word, word) for word in words], [_singular(word) for word in words]):
            key = _key(" ".join(form))
            key = _key(PHRASES[key]) if key in PHRASES else key
            if key in known:
                return known[key]
    meant = _key(" ".join(_singular(word) for word in plain))
    for word in ABNORMAL:
        if word in meant and frozenset({word}) in known:
            return known[frozenset({word})]
    return _coded(FALLBACK), _coded(FALLBACK)


def side_of(name: str) -> Concept | None:
    """Left or right (CID 244), if the name says exactly one of them."""
    sides: set[str] = {SIDES[word] for word in _words(name) if word in SIDES}
    return _coded(sides.pop()) if len(sides) == 1 else None


def lab_to_rgb(lab: Sequence[int]) -> tuple[int, int, int]:
    """A colour of a RecommendedDisplayCIELabValue (three 16-bit numbers) as RGB from 0 to 255."""
    from highdicom.color import CIELabColor

    red, green, blue = CIELabColor.from_dicom_value(lab).to_rgb(clip=True)
    return int(red), int(green), int(blue)


@cache
def _known() -> dict[frozenset[str], tuple[Concept, Concept]]:
    """Words of each listed concept → (type, category)."""
    from pydicom.sr.codedict import codes

    known: dict[frozenset[str], tuple[Concept, Concept]] = {}
    for group, category in LISTS:
        for code in getattr(codes, group).concepts.values():
            concept = Concept(code.value, code.scheme_designator, code.meaning)
            known.setdefault(_key(code.meaning), (concept, _coded(category)))
    return known


def _coded(keyword: str) -> Concept:
    from pydicom.sr.codedict import codes

    code = getattr(codes.SCT, keyword)
    return Concept(code.value, code.scheme_designator, code.meaning)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _key(text: str) -> frozenset[str]:
    return frozenset(_words(text)) - EMPTY_WORDS


def _singular(word: str) -> str:
    """The synonym of a word or of its singular, as far as an "s" at its end tells."""
    single = word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
    return SYNONYMS.get(word, SYNONYMS.get(single, single))
