"""Signals to a training: Ctrl-C and SIGTERM stop it at its next step, SIGUSR1 has it save there and go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAVING = getattr(signal, "SIGUSR1", None)
"""What schedulers of clusters send ahead of a limit (`sbatch --signal=USR1@60`); Windows has none."""
SIGNAL_EXIT_BASE = 128
"""Exit status of a process that a signal ended: this plus the signal's number."""


class TrainingSignals:
    """While the block runs, the first stopping signal is only noted, and a second one acts as usual.

    Outside the main thread Python takes no signal handlers, and this does nothing.

    Args:
        once: whether a second one acts; not where torchrun passes on the Ctrl-C that every process got already.
    """

    def __init__(self, *, once: bool = True) -> None:
        self.once = once
        self.received: signal.Signals | None = None
        self._is_save_wanted = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> TrainingSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note_stop) for number in STOPPING}
            if SAVING is not None:
                self._previous[SAVING] = signal.signal(SAVING, self._note_save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(tuple(self._previous))

    def take_save(self) -> bool:
        """Whether somebody has asked to save since the last call."""
        wanted, self._is_save_wanted = self._is_save_wanted, False
        return wanted

    def raise_received(self) -> None:
        """Leave as the noted signal asks: KeyboardInterrupt for Ctrl-C, else SystemExit with 128 + its number."""
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(SIGNAL_EXIT_BASE + self.received)

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self.once:
            self._restore(STOPPING)

    def _note_save(self, number: int, frame: FrameType | None) -> None:
        self._is_save_wanted = True

    def _restore(self, numbers: tuple[signal.Signals, ...]) -> None:
        for number in numbers:
            handler = self._previous.pop(number, None)
            if handler is not None:
                signal.signal(number, handler)  # type: ignore[arg-type]


@contextmanager
def save_signal_is_harmless() -> Iterator[None]:
    """While the block runs SIGUSR1 does not end the process: there is nothing to save before the first step and after
    the last one, and whoever asks for it cannot know."""
    if SAVING is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(SAVING, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(SAVING, before)
