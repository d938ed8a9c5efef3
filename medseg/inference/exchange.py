"""Where the scans of a case come from and where its files go, when that is not the disk: `Exchange`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from medseg.data.layouts import Case
from medseg.data.store import case_digest
from medseg.errors import Code, MedsegError


class Exchange:
    """Scans that lie on the disk and files that stay there; `medseg.remote` has those that come and go."""

    def digest(self, case: Case) -> str:
        """What the input of a case is, before it is fetched: another digest means that the case is to be done again.

        Raises:
            MedsegError: E_MISSING where a file cannot be read.
        """
        try:
            return case_digest(case)
        except OSError as error:
            raise MedsegError(
                Code.MISSING,
                "a file of the case cannot be read",
                where=case.case_id,
                got=error.strerror or type(error).__name__,
                remedy="check that it is still there and may be read",
            ) from error

    def fetch(self, case: Case) -> Case:
        """The case with its images on this disk, where they stay until `drop`."""
        return case

    def staying(self, names: Collection[str]) -> list[str]:
        """Those of a case's files that lie in the output folder when the case is done."""
        return list(names)

    def delivered(self, names: Collection[str]) -> dict[str, str]:
        """The others: name → digest of the place where it goes."""
        return {}

    def replacing(self, names: Collection[str]) -> list[str]:
        """Those of the others that would take the place of an object of the same name."""
        return []

    def standing(self, names: Collection[str]) -> dict[str, str]:
        """The objects whose place files of these names would take: name → SHA-256."""
        return {}

    def deliver(self, case: Case, files: Mapping[str, Path], identity: str) -> None:
        """Bring the files of a case to where they go. They are whole; those that do not stay may be changed.

        Args:
            case: as `fetch` gave it.
            files: name, relative to the output folder → where it is now.
            identity: of what they are made of and by: input, model, options, program and device.
        """

    def drop(self, case: Case) -> None:
        """The case is done or set aside: forget what was fetched for it."""

    def is_fatal(self, error: Exception) -> bool:
        """Whether an error is not the case's: the next case would fare no better."""
        return False


HERE = Exchange()
"""Everything lies on the disk."""
