"""Where medseg writes: room, and whether it may."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from pathlib import Path

import torch

from medseg.diagnosis.check import Check, Status, fail, gib, ok, warn

LITTLE_BYTES, NEEDED_BYTES = 10 * 2**30, 2**30
"""Free disk below which a long training may run out of it, and below which none should begin."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (looked at, not written to)


def disk(name: str, folder: Path) -> Check:
    """Room on the disk of a folder, which need not be there."""
    try:
        usage = shutil.disk_usage(_existing(folder))
    except OSError as error:
        return fail(name, _reason(error), "check that the disk is mounted")
    found = f"{gib(usage.free)} free of {gib(usage.total)}"
    if usage.free < NEEDED_BYTES:
        return fail(name, found, "make room, or choose another place: hydra.run.dir=FOLDER, data.store=FOLDER")
    if usage.free < LITTLE_BYTES:
        return warn(name, found, "checkpoints and prepared cases need room: delete prepared, or set data.store=FOLDER")
    return ok(name, found)


def writing(name: str, folder: Path) -> Check:
    """Whether files can be written, flushed to the disk and renamed, as checkpoints are."""
    place = _existing(folder)
    paths = [place / f".medseg-doctor-{uuid.uuid4().hex}{suffix}" for suffix in ("", ".new")]
    try:
        with paths[1].open("wb") as file:
            file.write(b"medseg")
            file.flush()
            os.fsync(file.fileno())
        paths[1].replace(paths[0])
        right = paths[0].read_bytes() == b"medseg"
    except OSError as error:
        return fail(name, f"no: {_reason(error)}", "take a folder of your own, or another: hydra.run.dir=FOLDER")
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    if not right:
        return fail(name, "what was written came back otherwise", "the disk is faulty: take another")
    there = "" if place == folder else "; the folder will be made"
    return ok(name, f"files are written, flushed and renamed{there}")


def temporary_files() -> Check:
    """Where zips are unpacked and compiled code is kept."""
    name = "temporary files"
    try:
        place = Path(tempfile.gettempdir())
    except FileNotFoundError:
        return fail(name, "there is no place for them", "export TMPDIR=FOLDER, one that you may write to")
    for check in (writing(name, place), disk(name, place)):
        if check.status is not Status.OK:
            return Check(name, check.status, check.found, "zips are unpacked there: make room, or export TMPDIR=FOLDER")
    return check


def shared_memory() -> Check:
    """The memory that processes share: threads and gloo (processes on CPUs) need none, NCCL (on several GPUs) does."""
    name = str(SHARED_MEMORY)
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return ok(name, "not there; only trainer.devices on several GPUs (NCCL) needs it")
    found = f"{gib(usage.free)} free of {gib(usage.total)}; only trainer.devices on several GPUs (NCCL) needs it"
    if usage.free >= NEEDED_BYTES or torch.cuda.device_count() < 2:
        return ok(name, found)
    return warn(name, found, "docker run --shm-size 1g; or export NCCL_SHM_DISABLE=1, which is slower")


def _existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
