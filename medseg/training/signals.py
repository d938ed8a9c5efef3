"""Ctrl-C and SIGTERM ask a training to stop at its next step, where everything can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

STOPPING = (signal.SIGINT, signal.SIGTERM)
SIGNAL_EXIT_BASE = 128
"""Exit status of a process that a signal ended: this plus the signal's number."""


class StopSignals:
    """While the block runs, the first signal is only noted; a second one acts as usual.

    Outside the main thread Python takes no signal handlers, and this does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def raise_received(self) -> None:
        """Leave as the noted signal asks: KeyboardInterrupt for Ctrl-C, else SystemExit with 128 + its number."""
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(SIGNAL_EXIT_BASE + self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
