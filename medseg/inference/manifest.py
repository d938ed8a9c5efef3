"""What was made of which input by which model: `predictions.jsonl` beside the label files.

One JSON object a line, only ever added to, so that ten thousand cases cost no more for each than ten. Lines are of two
kinds. A *session* (`{"session": id, …}`) holds what all its cases share: model, options, versions, device; its id is
the digest of model and options, of all that decides the voxels. A *case* (`{"case": id, "session": id, …}`) holds
SHA-256 of the input and of each file, where files went that did not stay, seconds, warnings, and for bad cases code and
message. Of several lines of a case the last counts. A line that was cut short by a crash counts as not there.

Files that replace others elsewhere are announced in `DELIVERING` before they go: a process that is killed between the
delivery and the line has left objects that are known to be ours, and not taken for somebody's correction.

Neither paths nor names of patients stand in it: cases are named by their ids, files relative to the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from medseg import __version__
from medseg.documents import parse_json
from medseg.environment import environment
from medseg.errors import Code, MedsegError
from medseg.formats.label_table import CaseRecord
from medseg.inference.ensemble import Ensemble

MANIFEST_FILE = "predictions.jsonl"
FORMAT = 1
"""Raised when the lines change in a way that older code would misread."""
DELIVERING = ".delivering"
"""Folder beside the manifest: for each case whose files are on their way, their digests."""
NOT_DECIDING = ("batch_size", "skip")
"""Options of the tiling that change how fast the voxels come, not what they are."""


@dataclass(frozen=True)
class Entry:
    """The line of a case.

    Args:
        case: its id.
        session: id of the session that made it.
        input: SHA-256 of its files; None where they could not be read.
        files: name, relative to the folder → SHA-256.
        seconds: stage → how long it took.
        notes: `Volume.notes` of the scan.
        warnings: what else was said.
        delivered: name of a file that does not stay in the folder → digest of the place where it is.
        failed: code and message of a bad case.
        statistics: rows of its structures; written, but not kept in memory.
    """

    case: str
    session: str
    input: str | None
    files: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    delivered: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] | None = None
    statistics: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Entry:
        """From a line; the statistics are left out."""
        return cls(
            str(content["case"]),
            str(content["session"]),
            content["input"],
            {str(name): str(digest) for name, digest in content["files"].items()},
            {},
            tuple(content["notes"]),
            (),
            {str(name): str(place) for name, place in content.get("delivered", {}).items()},
            content.get("failed"),
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The label files: those that lie in the folder itself."""
        return tuple(name for name in self.files if "/" not in name)


class Manifest:
    """The lines of a folder, read once; new ones are added as cases are done, from any thread.

    Args:
        folder: of the label files.
        model: digest of the models.
        options: what decides the voxels besides, plain values.
        context: versions and device.
    """

    def __init__(
        self, folder: Path, model: str, options: Mapping[str, Any], context: Mapping[str, Any] | None = None
    ) -> None:
        self.path = folder / MANIFEST_FILE
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.written: dict[str, set[str]] = {}
        """File → the digests that it has had by our hand."""
        self.sessions: dict[str, dict[str, Any]] = {}
        deciding = json.loads(json.dumps({"model": model, "options": options}, sort_keys=True, default=str))
        self.session = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]
        self._content = {"session": self.session, "format": FORMAT, **deciding, **(context or {})}
        self._lock = threading.Lock()
        self._opened = False
        for content in _contents(self.path):
            self._learn(content)

    def _learn(self, content: dict[str, Any]) -> None:
        try:
            if "case" not in content:
                self.sessions[str(content["session"])] = content
                return
            entry = Entry.of(content)
            announced = {str(name): set(map(str, digests)) for name, digests in content.get("announced", {}).items()}
        except (KeyError, TypeError, AttributeError):
            return
        self._keep(entry, announced)

    def _keep(self, entry: Entry, announced: Mapping[str, Iterable[str]]) -> None:
        self.entries[entry.case] = entry
        for name, digest in entry.files.items():
            self.written.setdefault(name, set()).add(digest)
        for name, digests in announced.items():
            self.written.setdefault(name, set()).update(digests)

    def reset(self) -> None:
        """Forget everything, also on disk: the folder is given to another model."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / DELIVERING, ignore_errors=True)
        self.entries, self.written, self.sessions = {}, {}, {}

    def append(self, entry: Entry) -> None:
        """Add the line of a case, and before the first one that of the session. It is on the disk when this returns.

        Raises:
            MedsegError: E_OUTPUT.
        """
        content = {key: value for key, value in asdict(entry).items() if value or key in ("input", "files", "notes")}
        announced = self._announced(entry.case)
        if announced and entry.failed is not None:  # some of them may have arrived
            content["announced"] = {name: sorted(digests) for name, digests in announced.items()}
        with self._lock:
            lines = [content]
            if not self._opened:
                lines.insert(0, {**self._content, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
            text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
            try:
                _add(self.path, text.encode())
            except OSError as error:
                raise self._refusal(error) from error
            self._opened = True
            self._keep(replace(entry, statistics=()), announced)
        if announced:
            with suppress(OSError):
                self._announcement(entry.case).unlink()

    def close(self) -> None:
        """The work has ended: nothing is on its way, unless its process was killed."""
        with suppress(OSError):  # not there, or not empty
            (self.folder / DELIVERING).rmdir()

    def announce(self, case_id: str, files: Mapping[str, str]) -> None:
        """Note files that are about to be delivered; it is on the disk when this returns. `append` ends it.

        Args:
            case_id: whose they are.
            files: name → SHA-256.
        Raises:
            MedsegError: E_OUTPUT.
        """
        earlier = self._announced(case_id)
        content = {name: sorted({*earlier.get(name, ()), digest}) for name, digest in files.items()}
        path = self._announcement(case_id)
        new = path.with_suffix(".new")
        try:
            path.parent.mkdir(exist_ok=True)
            new.unlink(missing_ok=True)
            _add(new, json.dumps(content).encode())
            new.replace(path)
        except OSError as error:
            raise self._refusal(error) from error

    def _announcement(self, case_id: str) -> Path:
        return self.folder / DELIVERING / f"{case_id}.json"

    def _announced(self, case_id: str) -> dict[str, set[str]]:
        """File → digests, of a case whose files were on their way when the work ended."""
        try:
            content = _parsed(self._announcement(case_id).read_bytes()) or {}
            return {str(name): set(map(str, digests)) for name, digests in content.items()}
        except (OSError, TypeError):
            return {}

    def _refusal(self, error: OSError) -> MedsegError:
        return MedsegError(
            Code.OUTPUT,
            "the manifest cannot be written",
            where=self.path.name,
            got=error.strerror or type(error).__name__,
            remedy="check that the folder is writable and has room",
        )

    def records(self) -> dict[str, CaseRecord]:
        """Of each case that is done, its label files and what is to be known of it; also of what other processes have
        added meanwhile."""
        for content in _contents(self.path):
            self._learn(content)
        done = (entry for entry in self.entries.values() if entry.failed is None and entry.labels)
        return {entry.case: CaseRecord(entry.labels, entry.notes) for entry in done}

    def refuse_foreign(self, case_id: str, found: Mapping[str, str]) -> None:
        """Refuse to replace files of a case (name → SHA-256 of what is there) that are not ours.

        Raises:
            MedsegError: E_OUTPUT for a file that was changed since it was written: it may be somebody's correction.
        """
        announced = self._announced(case_id)
        ours = {name: self.written.get(name, set()) | announced.get(name, set()) for name in found}
        foreign = [name for name, value in found.items() if value not in ours[name]]
        if foreign:
            raise MedsegError(
                Code.OUTPUT,
                "a file was changed after it was written, or is not ours",
                where=foreign[0],
                remedy="move it away if it was corrected by hand, or replace it with --resume --overwrite",
            )

    def outstanding(
        self,
        case_id: str,
        digest: str,
        names: Collection[str],
        *,
        overwrite: bool,
        delivered: Mapping[str, str] = MappingProxyType({}),
    ) -> str | None:
        """Why a case is to be done; None where it is done.

        Args:
            case_id: the case.
            digest: of its input as it is now.
            names: all files that it is to have in the folder.
            overwrite: a file that somebody else has changed may be replaced.
            delivered: the files that it is to have elsewhere, as `Entry` has them.
        Raises:
            MedsegError: as `refuse_foreign`.
        """
        entry = self.entries.get(case_id)
        found = {name: digest_of_file(path) for name in names if (path := self.folder / name).is_file()}
        if not overwrite:
            self.refuse_foreign(case_id, found)
        if entry is None:
            return "it is new"
        if entry.failed is not None:
            return "it was bad"
        if entry.input != digest:
            return "its input has changed"
        if entry.session != self.session:
            return f"{self.difference(entry.session)} made it"
        if entry.delivered != delivered:
            return "its files are to go elsewhere"
        if any(found.get(name) != entry.files.get(name) for name in names):
            return "files of it are missing" if set(found) < set(names) else "files of it have changed"
        return None

    def difference(self, session: str) -> str:
        """What differs between a session and this one, in words."""
        earlier, ours = self.sessions.get(session, {}), self._content
        if earlier.get("model") != ours["model"]:
            return "another model"
        options: dict[str, Any] = earlier.get("options", {})
        keys = sorted(key for key in {*options, *ours["options"]} if options.get(key) != ours["options"].get(key))
        return f"other options ({', '.join(keys)})"

    def rows(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The statistics of the cases that are done, sorted by id, one case in memory at a time."""
        places: dict[str, int] = {}
        place = 0
        if not self.path.is_file():
            return
        with self.path.open("rb") as stream:
            for line in stream:
                content = _parsed(line)
                if content is not None and "case" in content:
                    places[str(content["case"])] = place
                place += len(line)
            for case_id in sorted(places):
                stream.seek(places[case_id])
                content = _parsed(stream.readline())
                if content is not None and content.get("failed") is None:
                    yield case_id, list(content.get("statistics", ()))


def model_digest(ensemble: Ensemble) -> str:
    """SHA-256 of what the models are and of all their weights, whatever files they came from."""
    digest = hashlib.sha256()
    for predictor, weight in zip(ensemble.predictors, ensemble.weights, strict=True):
        info = predictor.info
        what = [dict(info.model), info.plan.to_json(), info.labels.to_json(), list(info.channels), weight]
        digest.update(json.dumps(what, sort_keys=True, default=str).encode())
        for tensor in predictor.model.state_dict().values():
            digest.update(str(tuple(tensor.shape)).encode())
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(plain.view(torch.uint8).numpy()))
    return digest.hexdigest()


def maker_of(ensemble: Ensemble) -> str:
    """The program and the kind of device: other ones may draw other voxels from the same weights and options."""
    device = next(ensemble.predictors[0].model.parameters()).device
    return f"medseg {__version__} {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"


def has_begun(folder: Path) -> bool:
    """Whether cases were predicted into a folder, or were about to be."""
    return (folder / MANIFEST_FILE).is_file() or (folder / DELIVERING).is_dir()


def options_of(ensemble: Ensemble) -> dict[str, Any]:
    """The options of the models that decide the voxels."""
    window = asdict(ensemble.predictors[0].config)
    return {
        **{key: value for key, value in window.items() if key not in NOT_DECIDING},
        "compile": ensemble.predictors[0].compile,
        "postprocessing": list(ensemble.postprocessing.steps),
    }


def context_of(ensemble: Ensemble) -> dict[str, Any]:
    """Versions, hardware and device, for who wants to know them later."""
    device = next(ensemble.predictors[0].model.parameters()).device
    is_gpu = device.type == "cuda"
    return {
        **environment(),
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{device.type}, {torch.get_num_threads()} threads",
        "num_models": ensemble.num_models,
        "architecture": ensemble.model_names,
    }


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def failed_with(error: Exception) -> dict[str, str]:
    """Code and message of a bad case. Of faults of the program the kind alone: their text may hold paths."""
    if isinstance(error, MedsegError):
        return {"code": str(error.code), "message": error.message}
    return {"code": "fault", "message": f"a fault of medseg: {type(error).__name__}"}


def _contents(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as stream:
        parsed: Iterable[dict[str, Any] | None] = (_parsed(line) for line in stream)
        yield from (content for content in parsed if content is not None)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line; None where it was cut short."""
    try:
        content = parse_json(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _add(path: Path, data: bytes) -> None:
    """Add whole lines in one write, which other processes do not break into."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":  # a line was cut short
            data = b"\n" + data
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
    finally:
        os.close(handle)
