"""Whether another process trains into a run: two that write the same files would spoil both trainings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from medseg.bundle import FOLDS_FILE
from medseg.errors import Code, MedsegError

LOCK_FILE = ".lock"
"""In a run's folder while it is trained. The system gives the lock free when its process ends, however it ends."""


@contextmanager
def locked(run: Path, *, is_main: bool = True) -> Iterator[None]:
    """Keep other trainings out of a run while the block runs.

    Folds that each go on alone keep only the training of all folds out, not each other. File systems without locks
    (and systems: Windows) keep nobody out.

    Args:
        run: its folder, which exists.
        is_main: whether this process is the one that writes; the others take no lock.
    Raises:
        MedsegError: E_OUTPUT if another process trains into it.
    """
    with ExitStack() as stack:
        if is_main:
            if (run.parent / FOLDS_FILE).is_file():
                stack.enter_context(_locked(run.parent, shared=True))
            stack.enter_context(_locked(run, shared=False))
        yield


@contextmanager
def _locked(folder: Path, *, shared: bool) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / LOCK_FILE
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            os.close(handle)
            raise MedsegError(
                Code.OUTPUT,
                "another process trains into this run",
                where=folder,
                remedy="wait until it has ended, or end it: SIGTERM has it save and stop",
            ) from None
        except OSError:  # no locks here
            break
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # its last owner removed it meanwhile
    try:
        yield
    finally:
        with suppress(OSError):  # others share it, or there are no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        os.close(handle)
