"""Which structures of DICOM annotations mean which class: as the user says, or as all cases agree.

Structures are known by their names ("GTV-1"), compared without case and outer blanks. A table names, for each class,
the structures that mean it: `{tumour: [GTV-1, gtv], liver: Liver}`. The order of the table is the order of the
classes: where structures of two classes overlap, the later one takes the voxels.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medseg.data.layouts import MAX_NAMED, Case, name_some
from medseg.errors import Code, MedsegError
from medseg.formats.dicom.annotations import DrawnLabel, folded, overlap_of
from medseg.labels import IGNORE_INDEX, Labels

MAX_CLASSES = IGNORE_INDEX - 1
"""Label maps are uint8; 0 is the background."""
BACKGROUND = "background"
"""The class of all voxels that no structure covers. A table may state it, as 0."""

EXAMPLE = "'data.labels={tumour: [GTV-1, gtv]}'"
"""A table as it stands on a command line."""
HYDRA_WORDS = ("null", "true", "false", "nan", "inf")
"""Words that Hydra does not read as words."""


@dataclass(frozen=True)
class StructureTable:
    """Classes and the structures that mean them."""

    classes: Mapping[str, tuple[str, ...]]
    """Class name → names of structures; class 1, 2, … in this order."""
    is_declared: bool
    """Whether the user wrote it; otherwise the names are those that all cases have."""

    @property
    def labels(self) -> Labels:
        """The classes with the background; the files that we write hold 0, 1, 2, …"""
        return Labels.from_mapping({BACKGROUND: 0, **{name: i for i, name in enumerate(self.classes, start=1)}})

    def of(self, case: Case) -> Case:
        """The case with its label drawn from the structures of this table."""
        if not isinstance(case.label, DrawnLabel):
            return case
        return replace(case, label=replace(case.label, classes=tuple(self.classes.values())))


def structure_table(cases: Sequence[Case], declared: Mapping[str, Any] | None) -> StructureTable:
    """The table of a tree of DICOM files.

    Args:
        cases: with labels drawn from annotations.
        declared: what the user wrote, class name → name or names of structures; None takes the names of the
            structures, where all cases have the same ones.
    Raises:
        MedsegError: E_LABEL for a table that is none, names a structure twice or has a class that no case has; or
            without a table where cases have different structures: it lists them, and a table to begin with.
    """
    names = {case.case_id: _names(case) for case in cases}
    table = declared_table(declared) if declared else _agreed(names)
    if len(table.classes) > MAX_CLASSES:
        raise MedsegError(
            Code.LABEL,
            "too many classes",
            where="data.labels",
            expected=f"at most {MAX_CLASSES}",
            got=len(table.classes),
            remedy=_remedy(names),
        )
    known = {key: name for of_case in names.values() for key, name in of_case.items()}
    for name, structures in table.classes.items():
        if not any(folded(structure) in known for structure in structures):
            raise MedsegError(
                Code.LABEL,
                f"no case has a structure that means the class {name!r}",
                where=f"data.labels.{name}",
                expected=", ".join(structures),
                got=_counted(names),
                remedy=_nearest(structures, known),
            )
    return table


def _nearest(structures: Sequence[str], known: Mapping[str, str]) -> str:
    """What structures may have been meant, compared without case and shown as the files have them."""
    close = [key for name in structures for key in difflib.get_close_matches(folded(name), known, n=2, cutoff=0.55)]
    if close:
        return "did you mean " + " or ".join(repr(known[key]) for key in dict.fromkeys(close)) + "?"
    return "choose among: " + name_some(sorted(known.values()))


def _names(case: Case) -> dict[str, str]:
    """The structures of a case: folded name → name."""
    if not isinstance(case.label, DrawnLabel):
        return {}
    return {folded(s.name): s.name.strip() for a in case.label.annotations for s in a.structures}


def declared_table(table: Mapping[str, Any], *, key: str = "data.labels", example: str = EXAMPLE) -> StructureTable:
    """The table as a user wrote it: {class: structure or list of structures}.

    Args:
        table: as it was written; `background: 0` may stand in it.
        key: what the user calls it, for messages.
        example: a good one, in the form in which it was written.
    Raises:
        MedsegError: E_LABEL.
    """
    classes: dict[str, tuple[str, ...]] = {}
    for name, value in table.items():
        if str(name).casefold() == BACKGROUND:
            if value not in (0, [0]):
                raise MedsegError(
                    Code.LABEL,
                    "the background is what no structure covers; it has no structure of its own",
                    where=f"{key}.{name}",
                    got=value,
                    remedy="leave it out",
                )
            continue
        structures = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not structures or not all(isinstance(s, str) and s.strip() for s in structures):
            raise MedsegError(
                Code.LABEL,
                "classes of DICOM annotations are named structures, not values",
                where=f"{key}.{name}",
                expected="the name of a structure, or a list of names",
                got=value,
                remedy=f"for example {example}; quote names that are numbers",
            )
        classes[str(name)] = tuple(s.strip() for s in structures)
    owners = Counter(key for structures in classes.values() for key in {folded(s) for s in structures})
    twice = [name for structures in classes.values() for name in structures if owners[folded(name)] > 1]
    if twice or not classes:
        raise MedsegError(
            Code.LABEL,
            f"the structure {twice[0]!r} stands in two classes" if twice else "the table names no structure",
            where=key,
            got=dict(table),
            remedy="name each structure once",
        )
    return StructureTable(classes, is_declared=True)


def _agreed(names: Mapping[str, Mapping[str, str]]) -> StructureTable:
    """The structures as classes, where all cases have the same ones."""
    kinds = {frozenset(of_case) for of_case in names.values()}
    if len(kinds) > 1:
        raise MedsegError(
            Code.LABEL,
            "the cases have different structures: say which of them mean a class",
            where="data.labels",
            got=_counted(names),
            remedy=_remedy(names),
        )
    shown = next(iter(names.values()), {})
    cleaned = {key: re.sub(r"\W+", "_", name).strip("_") for key, name in sorted(shown.items())}
    known = Counter(name.casefold() for name in cleaned.values())
    if not shown or any(count > 1 or name in ("", BACKGROUND) for name, count in known.items()):
        raise MedsegError(
            Code.LABEL,
            "the names of the structures do not make names of classes",
            where="data.labels",
            got=_counted(names) or "no structure",
            remedy=_remedy(names),
        )
    return StructureTable({cleaned[key]: (shown[key],) for key in cleaned}, is_declared=False)


def refuse_overlap(notes: Iterable[str], case_id: str, table: StructureTable) -> None:
    """Refuse overlapping structures where nobody said which class takes the voxels.

    Args:
        notes: of the label as `annotations.read_label` gives it.
        case_id: the case.
        table: the classes.
    Raises:
        MedsegError: E_LABEL.
    """
    overlap = overlap_of(notes)
    if overlap is None or table.is_declared:
        return
    raise MedsegError(
        Code.LABEL,
        "structures overlap, and nobody said which class takes these voxels",
        where=case_id,
        expected="classes without common voxels, or a table in data.labels: its later classes win",
        got=overlap,
        remedy=override(table.classes) + " in the order that you want",
    )


def override(classes: Mapping[str, Sequence[str]]) -> str:
    """A table as an argument that can be pasted into a shell: `'data.labels={tumour: [GTV-1, gtv]}'`.

    Names of classes are reduced to what Hydra takes as a key.
    """
    table: dict[str, Sequence[str]] = {}
    for name, structures in classes.items():
        key = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_")
        key = key if re.match("[A-Za-z]", key) and key.casefold() not in HYDRA_WORDS else f"class_{key}".strip("_")
        table[key if key not in table else f"{key}_{len(table) + 1}"] = structures
    parts = (f"{key}: [{', '.join(map(_quoted, structures))}]" for key, structures in table.items())
    return shlex.quote("data.labels={" + ", ".join(parts) + "}")


def _quoted(name: str) -> str:
    """A word as Hydra reads it: bare where it is plain, else in double quotes."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.\-]*( [A-Za-z0-9_.\-]+)*", name) and name.casefold() not in HYDRA_WORDS:
        return name
    # backslashes count only before a quote: there each of them is doubled
    return '"' + re.sub(r"(\\+)$", r"\1\1", re.sub(r'(\\*)"', r'\1\1\\"', name)) + '"'


def _counted(names: Mapping[str, Mapping[str, str]]) -> str:
    """Each structure and how many cases have it, the most frequent first."""
    counts = Counter(key for of_case in names.values() for key in of_case)
    shown = {key: name for of_case in names.values() for key, name in of_case.items()}
    return name_some(f"{shown[key]} ({count} of {len(names)})" for key, count in counts.most_common())


def _remedy(names: Mapping[str, Mapping[str, str]]) -> str:
    """A table that could be meant: the most frequent structures, those whose names look alike as one class."""
    counts = Counter(key for of_case in names.values() for key in of_case)
    shown = {key: name for of_case in names.values() for key, name in of_case.items()}
    groups: dict[str, list[str]] = {}
    for key, _ in counts.most_common(MAX_NAMED):
        groups.setdefault(re.sub(r"[\W\d_]+", "", key) or "structure", []).append(shown[key])
    return f"for example {override(groups)}" if groups else "draw structures, or give the labels as files"
