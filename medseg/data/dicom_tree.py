"""A tree of DICOM files as a data set: series of images, and the SEG and RTSTRUCT files that were drawn on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg.data.layouts import Case, DataFolder, name_some
from medseg.data.structure_table import structure_table
from medseg.errors import Code, MedsegError
from medseg.formats.dicom.annotations import DrawnLabel
from medseg.formats.dicom.catalog import Catalog, CatalogSeries, read_catalog
from medseg.formats.dicom.structures import Annotation

LAYOUT = "tree of DICOM series with SEG or RTSTRUCT"
MODALITIES = {"PET": "PT", "MRI": "MR"}
"""What people write for DICOM's modalities."""
DAMAGED = "damaged files"
"""What the list of problems calls files that cannot be read: their names may hold the patient's."""


def read_tree(
    root: Path,
    *,
    labels: Mapping[str, Any] | None = None,
    modality: str | None = None,
    require_labels: bool = True,
    without_preamble: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DataFolder | None:
    """The annotated series of a tree as cases; None where it holds no DICOM series or annotation.

    Ids and patients are pseudonyms. Series that cannot be read are cases too: reading them says why. Annotations whose
    images are not there, and damaged files, are `DataFolder.problems`.

    Args:
        root: the folder; what lies how deep in it does not matter.
        labels: class name → structures (see `medseg.data.structure_table`).
        modality: take the series of this modality only.
        require_labels: refuse a tree of series without any annotation; otherwise it is none.
        without_preamble: try DICOM on files without "DICM" at byte 128 too.
        progress: called with (files looked at, all files).
    Raises:
        MedsegError: E_NO_CASES if no series is annotated or none of those has the modality, E_MIXED if they have
            several and none was chosen, E_REFERENCE if all annotations lack their images, E_LABEL for a table that does
            not fit, and what `read_catalog` refuses.
    """
    catalog = read_catalog(root, progress, without_preamble=without_preamble)
    annotated = [series for series in catalog.series if series.annotations]
    problems = _problems(catalog)
    if not annotated and (not (catalog.series or catalog.orphans) or not require_labels):
        return None
    if not annotated:
        raise problems[0][1] if problems else _without_annotations(catalog)
    chosen = _of_modality(annotated, modality)
    cases = [Case(s.case_id, (s.info,), DrawnLabel(s.annotations, (), s.case_id), patient=s.patient) for s in chosen]
    table = structure_table(cases, labels)
    return DataFolder(
        root,
        LAYOUT,
        tuple(map(table.of, cases)),
        structures=table,
        problems=problems,
        left_out=tuple(_left_out(catalog, annotated, chosen)),
    )


def of_modality(series: Sequence[CatalogSeries], modality: str) -> list[CatalogSeries]:
    """Those of one modality, in any case; PET and MRI are understood."""
    wanted = modality.strip().upper()
    return [s for s in series if s.info.modality.upper() == MODALITIES.get(wanted, wanted)]


def count_modalities(series: Sequence[CatalogSeries]) -> str:
    """How many series there are of each modality: "MR (3), CT (2)"."""
    counts = Counter(s.info.modality or "unknown" for s in series)
    return name_some(f"{name} ({count})" for name, count in counts.most_common())


def _of_modality(annotated: Sequence[CatalogSeries], modality: str | None) -> list[CatalogSeries]:
    if modality is None:
        modalities = Counter(s.info.modality for s in annotated)
        if len(modalities) > 1:
            raise MedsegError(
                Code.MIXED,
                "the annotated series are of several modalities",
                where="data.modality",
                expected="one modality",
                got=count_modalities(annotated),
                remedy=f"choose one, for example data.modality={modalities.most_common(1)[0][0]}",
            )
        return list(annotated)
    chosen = of_modality(annotated, modality)
    if not chosen:
        raise MedsegError(
            Code.NO_CASES,
            "no annotated series has this modality",
            where="data.modality",
            expected=count_modalities(annotated),
            got=modality,
            remedy="choose one of those that are annotated",
        )
    return chosen


def _without_annotations(catalog: Catalog) -> MedsegError:
    return MedsegError(
        Code.NO_CASES,
        "no SEG or RTSTRUCT belongs to the DICOM series here, and there are no label files",
        where=catalog.root.resolve().name,
        expected="SEG or RTSTRUCT files among the series, or a label file named seg or …_seg beside each",
        got=f"{len(catalog.series)} series: {count_modalities(catalog.series)}",
        remedy="add the annotations, or list images and labels in a manifest.csv (case,image,label,patient)",
    )


def _problems(catalog: Catalog) -> tuple[tuple[str, MedsegError], ...]:
    """Orphans under a digest of their UID, and the damaged files together."""
    problems = [(annotation.pseudonym, _orphan(annotation, why)) for annotation, why in catalog.orphans]
    if catalog.damaged:
        remedy = "export or copy them again, or leave them out with data.on_bad_case=skip"
        problems.append((DAMAGED, damage(catalog.damaged, remedy)))
    return tuple(sorted(problems, key=lambda p: p[0]))


def _orphan(annotation: Annotation, why: str) -> MedsegError:
    return MedsegError(
        Code.REFERENCE,
        "an annotation belongs to no series: " + why.removeprefix(f"{Code.REFERENCE}: "),
        where=annotation.pseudonym,
        got=f"file {annotation.path.name}",
        remedy="add the images that it was drawn on, or leave it out with data.on_bad_case=skip",
    )


def damage(files: Sequence[tuple[Path, str]], remedy: str) -> MedsegError:
    """The refusal of files that cannot be read, as `Catalog.damaged` lists them."""
    return MedsegError(
        Code.TRUNCATED,
        f"{len(files)} files cannot be read as DICOM: series may lack slices or annotations",
        where=name_some(path.name for path, _ in files),
        got=files[0][1],
        remedy=remedy,
    )


def _left_out(catalog: Catalog, annotated: Sequence[CatalogSeries], chosen: Sequence[CatalogSeries]) -> list[str]:
    """What lies in a tree and is no case, in words."""
    bare = [series for series in catalog.series if not series.annotations]
    other = [series for series in annotated if series not in chosen]
    lines = [
        f"{len(group)} series {why}: {count_modalities(group)}"
        for group, why in ((bare, "without annotations"), (other, "of another modality"))
        if group
    ]
    if catalog.others:
        lines.append("other DICOM objects: " + name_some(f"{kind} ({n})" for kind, n in catalog.others.items()))
    return lines
