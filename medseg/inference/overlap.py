"""Read, work, write: three stages of successive items at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Worked = TypeVar("Worked")


def overlapped(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Worked],
    write: Callable[[Item, Worked | Exception], None],
) -> None:
    """While an item is worked on, the next is read and the one before is written: three in memory, never more.

    `work` runs in the caller's thread, `read` and `write` each in one of their own. Where the caller is interrupted,
    the item that is being written is finished, and the others are dropped.

    Args:
        items: in the order in which they are worked on and written.
        read: the first stage.
        work: the second, with what the first returned.
        write: the last, with what the second returned, or with the exception that either raised. What it raises itself
            ends everything: no later item is written.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:

        def read_next() -> tuple[Item, Future[Read]] | None:
            for item in remaining:
                return item, reader.submit(read, item)
            return None

        ahead = read_next()
        behind: Future[None] | None = None
        try:
            while ahead is not None:
                item, reading = ahead
                reading.exception()  # waits
                ahead = read_next()
                if behind is not None and behind.done():
                    behind.result()  # before more work is done in vain
                worked = _attempted(work, item, reading)
                del reading
                if behind is not None:
                    behind.result()
                behind = writer.submit(write, item, worked)
                del worked
            if behind is not None:
                behind.result()
        finally:
            if ahead is not None:
                ahead[1].cancel()


def _attempted(work: Callable[[Item, Read], Worked], item: Item, reading: Future[Read]) -> Worked | Exception:
    try:
        return work(item, reading.result())
    except Exception as error:
        return error
