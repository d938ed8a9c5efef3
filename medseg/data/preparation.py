"""Labelled cases → `PreparedCase`s: from the store where it has them, else read, prepared and kept; in threads.

**Where the arrays lie.** Cases stay in memory as long as they fit into `MEMORY_SHARE` of what is free when preparing
begins (`in_memory="auto"`); patches of all others are read from the store. What is read is the same either way.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape

from medseg.data.cases import Case, blank_label, load_image, load_label
from medseg.data.memory import available_bytes
from medseg.data.plan import Plan
from medseg.data.prepared import PreparedCase
from medseg.data.preprocess import prepare_image, prepare_label
from medseg.data.store import Entry, Store, basis_of
from medseg.data.stored_array import (
    StoredArray,
    StoredPositions,
    block_edges,
    compressed,
    index_type,
    positions_of,
    rounded,
)
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading
from medseg.labels import UNLABELLED, Labels
from medseg.volume import Grid

InMemory = Literal["auto"] | bool

LOCATIONS_PER_CLASS = 10_000
"""Voxels of each class that are remembered for foreground sampling, drawn at random (as nnU-Net does)."""
MEMORY_SHARE = 0.5
"""Share of the free memory that prepared cases may take."""
SLAB_VOXELS = 1 << 22
"""Voxels of a label that are searched at a time."""
_PLAN_KEYS = ("configuration", "spatial_dims", "num_channels", "orientation", "spacing_mm", "crop", "normalisation")
"""What of a plan shapes every prepared case."""
_IMAGE, _LABEL, _LOCATIONS = "image.b2nd", "label.b2nd", "locations.bin"


@dataclass
class Preparation:
    """How the cases came to be prepared.

    Args:
        cases: in the order asked for.
        num_found: of them, those that the store had.
        in_memory: of them, those whose arrays are in memory.
        damaged: what the store had and was damaged, in words.
    """

    cases: list[PreparedCase]
    num_found: int
    in_memory: int
    damaged: tuple[str, ...]

    def lines(self, folder: Path | None) -> list[str]:
        """For the user: how many were prepared anew, where they are kept, and from where patches are read.

        Args:
            folder: the store's.
        """
        num = len(self.cases)
        disk = "" if self.in_memory == num else f"; patches of {num - self.in_memory} are read from there"
        *notes, line = preparation_lines(num, self.num_found, self.damaged, folder)
        return [*notes, line + disk]


def preparation_lines(num: int, num_found: int, damaged: Sequence[str], folder: Path | None) -> list[str]:
    """For the user: how many cases were prepared anew, and where they are kept; `Preparation` says what is what."""
    made = f"{num - num_found} of {num} cases prepared anew" if num_found else f"{num} cases prepared"
    if num_found == num:
        made = f"{num} cases found prepared"
    kept = "" if folder is None else f", kept in {escape(str(folder))}"
    return [*(f"[yellow]warning[/]    {escape(line)}" for line in damaged), f"prepared   {made}{kept}"]


class _Room:
    """Bytes that prepared cases may still take."""

    def __init__(self, budget: float, in_memory: InMemory) -> None:
        self.budget = budget
        self.in_memory = in_memory
        self._used = 0
        self._lock = threading.Lock()

    def take(self, needed: int, *, can_leave: bool) -> bool:
        """Whether a case stays in memory.

        Raises:
            MedsegError: E_LIMIT if it has to and cannot.
        """
        if self.in_memory is False and can_leave:
            return False
        with self._lock:
            if self._used + needed <= self.budget:
                self._used += needed
                return True
        if can_leave and self.in_memory == "auto":
            return False
        raise MedsegError(
            Code.LIMIT,
            "the prepared cases do not fit into memory",
            where="data.in_memory" if can_leave else "data.store",
            expected=f"at most {self.budget / 2**30:.1f} GiB ({MEMORY_SHARE:.0%} of what is free)",
            got=f"{(self._used + needed) / 2**30:.1f} GiB, and more to come",
            remedy="let patches be read from the disk: data.in_memory=auto"
            if can_leave
            else "name a folder that patches are read from: data.store=FOLDER",
        )


def prepare_cases(
    cases: Sequence[Case],
    plan: Plan,
    labels: Labels,
    *,
    num_threads: int,
    store: Store | None = None,
    in_memory: InMemory = "auto",
    reading: Reading = STRICT,
    progress: Callable[[int, int], None] | None = None,
) -> Preparation:
    """Prepare labelled cases, or find them prepared, in threads.

    Args:
        cases: with labels.
        plan: what the network sees.
        labels: the classes.
        num_threads: cases worked on at a time.
        store: where prepared cases are found and kept; None keeps none.
        in_memory: "auto" as the head of this module says; True all, False none.
        reading: what is asked of the readers beyond their strict defaults.
        progress: called with (done, total).
    Raises:
        MedsegError: what reading refuses; E_LIMIT if the cases do not fit into memory and must; E_OUTPUT if the store
            cannot be written; E_CONFIG if nothing may be kept anywhere.
    """
    store = store or Store(None)
    if in_memory is False and store.folder is None:
        raise MedsegError(
            Code.CONFIG,
            "prepared cases can lie in memory or in the store, and neither is allowed",
            where="data.in_memory",
            remedy="name a folder (data.store=FOLDER), or set data.in_memory=auto",
        )
    basis = basis_of("prepared", settings_of(plan, labels), reading)
    room = _Room(MEMORY_SHARE * available_bytes(), in_memory)
    found = 0
    done: list[PreparedCase] = []
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # cases go in parallel: torch's own threads would only meet each other
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(_prepare, case, plan, labels, basis, store, room, reading) for case in cases]
            try:
                for number, future in enumerate(futures, start=1):
                    case, was_found = future.result()
                    done.append(case)
                    found += was_found
                    if progress is not None:
                        progress(number, len(futures))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(torch_threads)
    return Preparation(done, found, sum(case.in_memory for case in done), tuple(store.damaged))


def settings_of(plan: Plan, labels: Labels) -> dict[str, Any]:
    """The settings that shape a prepared case, as plain values: a change of any other one changes no case."""
    values = {name: getattr(plan, name) for name in _PLAN_KEYS}
    return values | {
        # The training set's intensities matter to CT alone, where nothing matters to the mask
        "intensity": [i if n == "ct" else None for n, i in zip(plan.normalisation, plan.intensity, strict=True)],
        "mask": plan.mask_normalisation and "z-score" in plan.normalisation,
        "blocks": block_edges(plan.patch_size),
        "labels": [labels.values, labels.regions, labels.ignore],  # names change no voxel
    }


def _prepare(
    case: Case,
    plan: Plan,
    labels: Labels,
    basis: str,
    store: Store,
    room: _Room,
    reading: Reading,
) -> tuple[PreparedCase, bool]:
    """The case, and whether the store had it."""
    key = ""
    if store.folder is not None:
        with suppress(OSError):  # a file that is gone: its reader has better words for it
            key = store.key(case, basis)
    entry = store.read(key, case.case_id) if key else None
    if entry is not None:
        stored = _from_store(entry, case.case_id)
        return (_in_memory(stored) if room.take(_num_bytes(stored), can_leave=True) else stored), True
    decoded = store.decoded.take(case.case_id)
    if decoded is None:
        volume = load_image(case, num_channels=plan.num_channels, reading=reading)
        unlabelled = labels == UNLABELLED
        label_volume = blank_label(volume.grid) if unlabelled else load_label(case, labels, volume.grid, reading)
    else:
        volume, values = decoded
        label_volume = type(values)(labels.to_index(values.array, where=case.case_id), values.grid)
    image, grid = prepare_image(volume, plan)
    label = prepare_label(label_volume, plan, labels.num_classes, grid)
    del volume, label_volume, decoded
    codes, steps = rounded(image.numpy())
    found = _locations(label.numpy(), labels.num_classes, np.random.default_rng(zlib.crc32(case.case_id.encode())))
    locations = [positions_of(of_class, grid.shape) for of_class in found]
    prepared = PreparedCase(case.case_id, image, label, grid, locations)
    # Files that changed since their bytes made the key: whoever comes next prepares them again
    if key and store.is_unchanged(case):
        blocks = block_edges(plan.patch_size)
        files = {
            _IMAGE: compressed(codes, blocks),
            _LABEL: compressed(label.numpy(), blocks),
            _LOCATIONS: np.concatenate(found).astype(index_type(grid.shape)).tobytes(),
        }
        values_of = {
            "affine": grid.affine.tolist(),
            "frame": grid.frame,
            "shape": list(grid.shape),
            "steps": list(steps),
            "counts": [len(of_class) for of_class in locations],
        }
        entry = store.write(key, values_of, files)
    if not room.take(_num_bytes(prepared), can_leave=entry is not None) and entry is not None:
        prepared = _from_store(entry, case.case_id)
    return prepared, False


def _from_store(entry: Entry, case_id: str) -> PreparedCase:
    values: Mapping[str, Any] = entry.values
    shape = tuple(values["shape"])
    steps = tuple(values["steps"])
    locations, first = [], 0
    for count in values["counts"]:
        locations.append(StoredPositions(entry.folder / _LOCATIONS, range(first, first + count), shape, case_id))
        first += count
    return PreparedCase(
        case_id,
        StoredArray(entry.folder / _IMAGE, (len(steps), *shape), steps, case_id),
        StoredArray(entry.folder / _LABEL, shape, None, case_id),
        Grid(shape, np.array(values["affine"]), values["frame"]),
        locations,
    )


def _in_memory(stored: PreparedCase) -> PreparedCase:
    return PreparedCase(
        stored.case_id, stored.image, stored.label, stored.grid, [positions[:] for positions in stored.locations]
    )


def _num_bytes(case: PreparedCase) -> int:
    """Bytes of the case's arrays in memory: float32 and uint8."""
    voxels = int(np.prod(case.shape))
    return voxels * (4 * case.num_channels + 1) + 4 * len(case.shape) * sum(len(p) for p in case.locations)


def _locations(label: NDArray[np.uint8], num_classes: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Flat indices of up to `LOCATIONS_PER_CLASS` voxels of each class: ranks among the class's voxels are drawn first,
    so that only some planes are searched at a time."""
    step = max(1, SLAB_VOXELS // max(1, int(np.prod(label.shape[1:]))))
    slabs = [label[begin : begin + step] for begin in range(0, len(label), step)]
    counts = np.array([np.bincount(slab.reshape(-1), minlength=256)[:num_classes] for slab in slabs])
    found = []
    for index, total in enumerate(counts.sum(axis=0)):
        ranks = np.sort(rng.choice(total, LOCATIONS_PER_CLASS, replace=False)) if total > LOCATIONS_PER_CLASS else None
        parts, before = [np.empty(0, np.int64)], 0
        for number, slab in enumerate(slabs):
            here = int(counts[number, index])
            if not here:
                continue
            where = np.flatnonzero(slab.reshape(-1) == index)
            if ranks is not None:
                where = where[ranks[np.searchsorted(ranks, before) : np.searchsorted(ranks, before + here)] - before]
            parts.append(where + number * slabs[0].size)
            before += here
        found.append(np.concatenate(parts))
    return found
