"""Images read once to know them, and once more to prepare them; equal images are found by their voxels."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.classification.images import ImageCase, open_image
from medseg.classification.sight import VOXELS_PER_CASE, ImageFacts, Sight
from medseg.data.memory import available_bytes
from medseg.documents import parse_json
from medseg.errors import Code, MedsegError
from medseg.formats import Reading
from medseg.formats.atomic import whole_file
from medseg.volume import MODEL_ORIENTATION, Volume

SURVEY_FILE = "survey.json"
"""Of a run: what is known of each image. It knows them by the digests of their voxels."""
MEMORY_SHARE = 0.5
"""Of the free memory that prepared images may take; more lie in a file that is mapped."""

T = TypeVar("T")
Progress = Callable[[int, int], None]


def facts_of(case: ImageCase, reading: Reading) -> ImageFacts:
    """Read an image and look at it.

    Raises:
        MedsegError: what the readers refuse.
    """
    volume = open_image(case, reading)
    volume = volume if volume.grid.is_picture else volume.reoriented(MODEL_ORIENTATION)
    array = np.ascontiguousarray(volume.array, dtype=np.float32)
    flat = array.reshape(len(array), -1)
    step = max(1, flat.shape[1] // VOXELS_PER_CASE)
    return ImageFacts(
        shape=volume.grid.shape,
        spacing_mm=volume.grid.spacing_mm,
        num_channels=len(array),
        is_grey=bool((array == array[:1]).all()),
        is_picture=volume.grid.is_picture,
        modality=volume.modality,
        digest=_digest(array),
        sample=flat[:, step // 2 :: step].copy(),
        notes=volume.notes,
    )


def digest_of(volume: Volume) -> str:
    """What an image is known by in `SURVEY_FILE`."""
    volume = volume if volume.grid.is_picture else volume.reoriented(MODEL_ORIENTATION)
    return _digest(np.ascontiguousarray(volume.array, dtype=np.float32))


def _digest(array: NDArray[np.float32]) -> str:
    return hashlib.sha256(repr(array.shape).encode() + array.data).hexdigest()


def survey_images(
    cases: Sequence[ImageCase], reading: Reading, *, threads: int, progress: Progress | None = None
) -> tuple[dict[str, ImageFacts], dict[str, MedsegError]]:
    """What each image is like, and what is wrong with those that cannot be read, by their ids."""

    def look(case: ImageCase) -> ImageFacts | MedsegError:
        try:
            return facts_of(case, reading)
        except MedsegError as error:
            return error

    facts: dict[str, ImageFacts] = {}
    bad: dict[str, MedsegError] = {}
    for case, found in zip(cases, _in_threads(look, cases, threads, progress), strict=True):
        if isinstance(found, MedsegError):
            bad[case.case_id] = found
        else:
            facts[case.case_id] = found
    return facts, bad


def equal_images(facts: Mapping[str, ImageFacts]) -> list[tuple[str, ...]]:
    """The ids of images with the same voxels, for each such image that there is more than once."""
    of_digest: dict[str, list[str]] = {}
    for case_id, one in facts.items():
        of_digest.setdefault(one.digest, []).append(case_id)
    return [tuple(ids) for ids in of_digest.values() if len(ids) > 1]


def write_survey(run: Path, cases: Sequence[ImageCase], facts: Mapping[str, ImageFacts]) -> None:
    """Write `SURVEY_FILE` into a run's folder: no path, no name of a patient."""
    rows = [
        {
            "case_id": case.case_id,
            "class": case.class_name,
            "shape": list(facts[case.case_id].shape),
            "spacing_mm": [round(s, 6) for s in facts[case.case_id].spacing_mm],
            "num_channels": facts[case.case_id].num_channels,
            "modality": facts[case.case_id].modality,
            "sha256": facts[case.case_id].digest,
            "notes": list(facts[case.case_id].notes),
        }
        for case in cases
    ]
    with whole_file(run / SURVEY_FILE, ".json") as temporary:
        temporary.write_text(json.dumps({"format": 1, "cases": rows}, ensure_ascii=False), encoding="utf-8")


def read_digests(run: Path) -> dict[str, str]:
    """Case id → digest, of a run's survey.

    Raises:
        MedsegError: E_RUN if it cannot be read.
    """
    try:
        table = parse_json((run / SURVEY_FILE).read_text(encoding="utf-8"))
        return {str(row["case_id"]): str(row["sha256"]) for row in table["cases"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MedsegError(
            Code.RUN, "the run's survey cannot be read", where=SURVEY_FILE, got=f"{type(error).__name__}: {error}"
        ) from error


def prepare_images(
    cases: Sequence[ImageCase],
    sight: Sight,
    reading: Reading,
    *,
    threads: int,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """All images as the network sees them, in the order of the cases.

    Args:
        cases: to read.
        sight: what the network sees.
        reading: as in `open_volume`.
        threads: images read at a time.
        folder: where a file is mapped that holds them if they do not fit into the memory; None: they must.
        progress: told of each.
    Returns:
        float32 (N, C, *size).
    Raises:
        MedsegError: what the readers and `Sight.prepare` refuse.
    """
    shape = (len(cases), sight.num_channels, *sight.size)
    needed = 4 * math.prod(shape)
    images: NDArray[np.float32]
    if folder is not None and needed > MEMORY_SHARE * available_bytes():
        folder.mkdir(parents=True, exist_ok=True)
        images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.float32, shape=shape)
    else:
        images = np.empty(shape, dtype=np.float32)

    def prepare(case: ImageCase) -> NDArray[np.float32]:
        return sight.prepare(open_image(case, reading), where=case.case_id)

    for number, image in enumerate(_in_threads(prepare, cases, threads, progress)):
        images[number] = image
    return torch.from_numpy(images)


def _in_threads(
    work: Callable[[ImageCase], T], cases: Sequence[ImageCase], threads: int, progress: Progress | None
) -> Iterator[T]:
    """Results in the order of the cases; a few at a time, so that memory holds no more."""
    done = 0
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(cases), 4 * threads):
            for result in pool.map(work, cases[start : start + 4 * threads]):
                yield result
                done += 1
                if progress is not None:
                    progress(done, len(cases))


def plain_counts(cases: Iterable[ImageCase], classes: Sequence[str]) -> dict[str, int]:
    """How many of some cases have each class."""
    counts: dict[str, Any] = dict.fromkeys(classes, 0)
    for case in cases:
        if case.class_name is not None:
            counts[case.class_name] += 1
    return counts
