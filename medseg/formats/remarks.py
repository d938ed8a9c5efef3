"""What readers and writers warn of, gathered so that a verb can say it beside the file that it concerns."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self.thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:  # another case may be read or written meanwhile
            self.messages.append(record.getMessage())


@contextmanager
def gathered_warnings() -> Iterator[list[str]]:
    """Collects the warnings of medseg's loggers in this thread while the block runs, instead of printing them."""
    collector = _Collector()
    logger = logging.getLogger("medseg")
    logger.addHandler(collector)
    try:
        yield collector.messages
    finally:
        logger.removeHandler(collector)


def remarks(notes: Iterable[str], warnings: Iterable[str]) -> list[str]:
    """Notes of a volume and the warnings that came with it, each once: readers log what they note."""
    said = list(dict.fromkeys(notes))
    return said + [text for text in dict.fromkeys(warnings) if not any(note in text for note in said)]
