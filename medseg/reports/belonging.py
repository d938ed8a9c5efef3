"""Whose the cases of an evaluation are: what intervals over patients, and tests of `medseg compare`, are drawn by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from medseg.data.layouts import Case, name_some
from medseg.data.manifest import read_json, read_patients
from medseg.data.splits import patients_of
from medseg.errors import Code, MedsegError
from medseg.reports.pairs import case_id

MANIFESTS = ("manifest.csv", "manifest.json")
"""Names of tables of cases that are looked for."""


def patients_by_case(cases: Sequence[str], reference: Path, table: Path | None = None) -> dict[str, str]:
    """Case id → patient, for the cases whose patient is known: by a table, else by their names in BIDS
    (`data.splits.patients_of`, as training does).

    Args:
        cases: ids of the evaluated cases.
        reference: the file or folder of references. Where no table is given, the manifest of their data set is read if
            it lies in their folder or the one above.
        table: columns case and patient, CSV or JSON; a manifest is one. Its ids may be names of files.
    Raises:
        MedsegError: E_MISSING if the table is not there or tells nothing of a case, E_CONFIG where it is not
            understood, E_DUPLICATE_ID for a case of two patients.
    """
    if table is not None and not table.is_file():
        raise MedsegError(Code.MISSING, "there is no such table of patients", where=table.name)
    found = table if table is not None else _manifest_beside(reference)
    patients: dict[str, str] = {}
    for name, patient in read_patients(found) if found is not None else ():
        case = case_id(Path(name))
        if patients.setdefault(case, patient) != patient:
            raise MedsegError(
                Code.DUPLICATE_ID,
                "a case is of two patients",
                where=f"{found.name if found else ''}: {case}",
                remedy="correct the column patient, or take one of the rows out",
            )
    unknown = [case for case in cases if case not in patients]
    if table is not None and unknown:
        raise MedsegError(
            Code.MISSING,
            f"the patient of {len(unknown)} cases is not in the table",
            where=table.name,
            expected="a row for each case: case,patient",
            got=f"none for {name_some(unknown)}",
            remedy="add them; a case whose patient has no other one gets a name of its own",
        )
    return patients_of([Case(case, (), None, patients.get(case)) for case in cases])


def _manifest_beside(reference: Path) -> Path | None:
    folder = reference.absolute() if reference.is_dir() else reference.absolute().parent
    places = (at / name for at in (folder, folder.parent) for name in MANIFESTS)
    return next((path for path in places if path.is_file() and not _is_of_a_run(path)), None)


def _is_of_a_run(path: Path) -> bool:
    """Whether it is the manifest that medseg writes of a run or a bundle: files and digests, no cases."""
    table = read_json(path) if path.suffix == ".json" else None
    return isinstance(table, Mapping) and "files" in table and "cases" not in table
