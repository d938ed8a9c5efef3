"""`trainer.devices`: the processes of this machine that train together, from their start to their end.

**Nobody else takes part.** They meet in a file of a private folder and talk over the loopback interface alone. torchrun
meets at a server that its whole network reaches and that unpickles what it is sent: several machines need that, one
does not.

**They end together.** This process passes signals on and waits. Where it is killed, or one of them ends, the others end
too: nothing is left behind that goes on writing into the run.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from medseg.errors import Code, MedsegError, of_machine
from medseg.training.distributed import MEETING_FILE
from medseg.training.signals import SAVING, SIGNAL_EXIT_BASE, STOPPING, save_signal_is_harmless

GRACE_S = 15.0
"""How long the others have to end by themselves once one has ended, and again when they were told to."""
LAST_SAVE_S = 300.0
"""How long a process whose parent is gone has for the checkpoint that it leaves."""
TWICE_S = 1.0
"""Later than this after the first, a second signal to stop ends all at once; earlier it is the same one, sent to this
process and to its group."""
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
REFUSED = 2
"""Exit status of a process that was refused."""


@dataclass(eq=False)
class _Member:
    """One of the processes, and the end of the pipe where it leaves what it returns, or was refused."""

    process: BaseProcess
    pipe: Connection
    has_told: bool = False
    told: Any = None

    def hear(self) -> None:
        """Take what it has left, if it has."""
        with suppress(EOFError, OSError):
            if self.has_told or not self.pipe.poll():
                return
            self.told = self.pipe.recv()
        self.has_told = True


def launch(work: Callable[..., Any], num_processes: int, *arguments: Any) -> Any:
    """Start processes on this machine and wait for them.

    SIGUSR1, SIGTERM and Ctrl-C go to all of them. A second SIGTERM or Ctrl-C ends them at once.

    Args:
        work: what each does; a function of a module.
        num_processes: how many.
        arguments: of the function.
    Returns:
        What the main one returned.
    Raises:
        MedsegError: what the first process that was refused says; E_PROCESS where one ended otherwise.
    """
    members: list[_Member] = []
    with tempfile.TemporaryDirectory(prefix="medseg-") as folder, _noted() as signals:
        try:
            for rank in range(num_processes):
                members.append(_start(rank, num_processes, str(Path(folder, "meeting")), work, arguments))
            first, received = _watch(members, signals)
        finally:
            _end([member.process for member in members])
    if first is None:
        return members[0].told
    refusals = [member.told for member in members if isinstance(member.told, MedsegError)]
    others = [refusal for refusal in refusals if refusal.code is not Code.PROCESS]
    if others:
        raise others[0]
    statuses = {member.process.exitcode for member in members}
    if received is None:  # a signal that came to one of them stops all, at the same step
        received = next((number for number in STOPPING if statuses == {SIGNAL_EXIT_BASE + number}), None)
    if received is not None:
        raise KeyboardInterrupt if received is signal.SIGINT else SystemExit(SIGNAL_EXIT_BASE + received)
    raise MedsegError(
        Code.PROCESS,
        "a process of the training has ended",
        where=f"process {members.index(first)} of {num_processes}",
        got=f"exit status {first.process.exitcode}",
        remedy="what ended it stands above; go on by: medseg train resume=RUN",
    )


@contextmanager
def _noted() -> Iterator[deque[signal.Signals]]:
    """Signals that come while the block runs, to be passed on; none outside the main thread, which alone gets them."""
    signals: deque[signal.Signals] = deque()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in (*STOPPING, SAVING) if number is not None}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(rank: int, size: int, meeting: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> _Member:
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe(duplex=False)
    process = context.Process(target=_take_part, args=(rank, size, meeting, end, work, arguments))
    with save_signal_is_harmless():  # which a new process inherits
        process.start()
    end.close()
    return _Member(process, pipe)


def _watch(members: list[_Member], signals: deque[signal.Signals]) -> tuple[_Member | None, signal.Signals | None]:
    """Wait until all have ended, of which the others have not long once one has failed.

    Returns:
        The first that failed, and the first signal to stop.
    """
    first: _Member | None = None
    received: signal.Signals | None = None
    received_at = until = math.inf
    running = members
    while running:
        wait(
            [member.process.sentinel for member in running] + [m.pipe for m in running if not m.has_told],
            timeout=0.2,  # for signals, after which it goes on waiting
        )
        for member in running:
            member.hear()
        now = time.monotonic()
        while signals:
            number = signals.popleft()
            if number in STOPPING and received is None:
                received, received_at = number, now
            is_enough = number in STOPPING and now - received_at > TWICE_S
            for member in running:
                if is_enough:
                    member.process.kill()
                elif member.process.pid is not None and member.process.exitcode is None:
                    os.kill(member.process.pid, number)
        ended = [member for member in running if member.process.exitcode is not None]
        running = [member for member in running if member not in ended]
        for member in ended:
            member.hear()
            if member.process.exitcode and first is None:
                first, until = member, min(until, now + GRACE_S)
        if now > until:
            _end([member.process for member in running])
    return first, received


def _end(processes: list[BaseProcess]) -> None:
    """End those that still run: told to first, and killed where that does not help."""
    for end in (BaseProcess.terminate, BaseProcess.kill):
        left = [process for process in processes if process.exitcode is None]
        for process in left:
            end(process)
        until = time.monotonic() + GRACE_S
        for process in left:
            process.join(max(0.0, until - time.monotonic()))


def _take_part(
    rank: int, size: int, meeting: str, pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """What each process does, from its first line on."""
    _end_with_the_parent()
    signal.signal(signal.SIGINT, _interrupt_once)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {MEETING_FILE: meeting} | {name: str(number) for name, number in numbers.items()}
    if sys.platform in LOOPBACK:
        os.environ |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), LOOPBACK[sys.platform])
    try:
        result = work(*arguments)
    except KeyboardInterrupt:
        raise SystemExit(SIGNAL_EXIT_BASE + signal.SIGINT) from None
    except (MedsegError, OSError, MemoryError, RuntimeError) as error:
        refusal = error if isinstance(error, MedsegError) else of_machine(error)
        if refusal is None:
            raise
        names = ("where", "expected", "got", "remedy")
        texts = {name: None if (value := getattr(refusal, name)) is None else str(value) for name in names}
        with suppress(OSError):
            pipe.send(MedsegError(refusal.code, refusal.message, **texts))
        raise SystemExit(REFUSED) from error
    if rank == 0:
        with suppress(OSError):
            pipe.send(result)


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Ctrl-C comes twice: from the terminal, and passed on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_the_parent() -> None:
    """Stop, as SIGTERM asks, when the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_SAVE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
