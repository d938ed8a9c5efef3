"""The preflight: every case is read once before the first step, and everything that is wrong is said at once.

The survey keeps numbers, never arrays. Intensity statistics are over the foreground, because that is what has to be
told apart and what a CT normalisation is taken from (nnU-Net's rule).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.data.anomalies import find_anomalies
from medseg.data.cases import Case, DataFolder, blank_label, load_image, load_label_values
from medseg.data.facts import CaseInfo, ChannelStats, Problem, Survey
from medseg.data.store import Store
from medseg.data.structure_table import refuse_overlap
from medseg.data.survey_cache import remembered, survey_basis
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading
from medseg.label_values import integer_values
from medseg.labels import IGNORE_INDEX, UNLABELLED, Labels
from medseg.volume import MODEL_ORIENTATION

MAX_FOUND_VALUES = 64
"""More distinct values than this in undeclared labels are taken for numbered objects, not classes."""
MAX_PROBLEMS = 20
"""Most cases that the message about bad cases lists."""
MAX_REMEDIES = 3
"""Most different remedies of bad cases that it gives."""
SAMPLE_VOXELS = 100_000
"""Voxels of a case that its intensity statistics are taken from: the 0.5 % tails then still hold 500."""
POOLED_VOXELS = 4_000
"""Of these, voxels that the statistics of the whole data set are taken from."""
COUNTED_VOXELS = 1 << 20
"""Voxels of a label that are counted at a time."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _CaseRead:
    """What remains of a case after its arrays are dropped."""

    info: CaseInfo
    voxels_of_value: Mapping[int, int]
    model_shape: tuple[int, ...]
    model_spacing_mm: tuple[float, ...]
    pooled: NDArray[np.float32]
    """Sampled foreground voxels, shape (C, at most POOLED_VOXELS)."""


def survey(
    folder: DataFolder,
    declared_labels: Mapping[str, Any] | None = None,
    *,
    regions_order: Sequence[str] | None = None,
    num_threads: int,
    progress: Progress | None = None,
    on_bad_case: Literal["error", "skip"] = "error",
    training: Callable[[Sequence[CaseInfo]], Collection[str]] | None = None,
    reading: Reading = STRICT,
    store: Store | None = None,
    refused: dict[str, MedsegError] | None = None,
) -> Survey:
    """Read every case once, check it, and take its statistics.

    Args:
        folder: as `find_cases` gives it, with labels.
        declared_labels: class names → values as the user writes them; they win over those of a dataset.json, and
            these over the values that are found. Of a tree of DICOM files `folder.structures` holds them already.
            Those of `UNLABELLED` look at no label: intensities are then those of whole images.
        regions_order: names of the regions in the order in which predictions paint them (`Labels.from_mapping`).
        num_threads: cases that are read at a time; memory holds as many.
        progress: called with (cases read, cases in all).
        on_bad_case: "skip" leaves bad cases out and lists them in `Survey.quarantine`.
        training: chooses the cases that medians and intensities are taken from; all by default. It is given the good
            cases and gives ids back: folds are balanced by what only reading tells.
        reading: what is asked of the readers beyond their strict defaults.
        store: where what was read of unchanged files is found and kept, and decoded cases wait to be prepared.
        refused: where given, takes what is wrong with each case, by id, also where this raises.
    Raises:
        MedsegError: the one problem, or all of them in one table; E_LABEL where no table of labels fits the cases.
    """
    declared, labels_from = labels_declared(folder, declared_labels, regions_order)
    readings, problems = _read_all(folder, declared, num_threads, reading, store or Store(None), progress)
    if declared is not None:
        problems.update(_undeclared(readings.values(), declared))
    problems.update(_of_other_kind([r for case_id, r in readings.items() if case_id not in problems]))
    all_bad = all(case.case_id in problems for case in folder.cases)
    problems.update(folder.problems)
    if refused is not None:
        refused.update(problems)
    if on_bad_case == "error" or all_bad:
        raise_problems(problems, len({*problems, *(case.case_id for case in folder.cases)}), can_skip=not all_bad)
    good = [readings[case.case_id] for case in folder.cases if case.case_id not in problems]
    labels = declared or _labels_of_values(good)
    infos = tuple(_with_classes(reading, labels) for reading in good)
    if labels != UNLABELLED and not any(sum(info.label_voxels[1:]) for info in infos):
        raise MedsegError(
            Code.LABEL,
            "no case has a voxel of any class but the background",
            where="data.labels",
            expected=labels.to_json(),
            remedy="check the label files and the values in data.labels",
        )
    channels = len(infos[0].intensity)
    chosen = {info.case_id for info in infos} if training is None else set(training(infos))
    seen = [r for r in good if r.info.case_id in chosen]
    names = folder.channels or tuple(f"channel {number}" for number in range(channels))
    return Survey(
        layout=folder.layout,
        spatial_dims=len(infos[0].shape),
        num_channels=channels,
        channel_names=names,
        labels=labels,
        labels_from=labels_from,
        cases=infos,
        median_shape=tuple(round(float(s)) for s in np.median([r.model_shape for r in seen], axis=0)),
        median_spacing_mm=tuple(float(s) for s in np.median([r.model_spacing_mm for r in seen], axis=0)),
        intensity=_pooled(seen),
        quarantine=tuple(Problem(i, str(e.code), e.message) for i, e in sorted(problems.items())),
        structures=folder.structures.classes if folder.structures else None,
        left_out=folder.left_out,
        anomalies=find_anomalies(infos, labels, names),
    )


def labels_declared(
    folder: DataFolder, declared_labels: Mapping[str, Any] | None, regions_order: Sequence[str] | None
) -> tuple[Labels | None, str]:
    """The label table as somebody declares it, and who."""
    if folder.structures is not None:
        return folder.structures.labels, "data.labels" if folder.structures.is_declared else "structures found"
    if declared_labels:
        return Labels.from_mapping(declared_labels, regions_order=regions_order), "data.labels"
    if folder.labels is not None:
        return Labels.from_mapping(folder.labels, regions_order=regions_order), "dataset"
    if regions_order is not None:
        raise MedsegError(
            Code.LABEL,
            "an order of regions, but nobody says which values they are made of",
            where="data.regions_order",
            got=list(regions_order),
            remedy="declare them: data.labels={tumour: [1, 2], core: 2}",
        )
    return None, "values found"


def _read_all(
    folder: DataFolder,
    declared: Labels | None,
    num_threads: int,
    reading: Reading,
    store: Store,
    progress: Progress | None,
) -> tuple[dict[str, _CaseRead], dict[str, MedsegError]]:
    readings: dict[str, _CaseRead] = {}
    problems: dict[str, MedsegError] = {}
    read = case_reader(folder, declared, reading, store)
    with ThreadPoolExecutor(num_threads) as pool:
        running = {pool.submit(read, case): case for case in folder.cases}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                case_id = running[future].case_id
                try:
                    readings[case_id] = future.result()
                except MedsegError as error:
                    problems[case_id] = error
                except Exception as error:
                    error.add_note(f"while reading case {case_id}")
                    raise
                if progress is not None:
                    progress(done, len(running))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return readings, problems


def case_reader(
    folder: DataFolder, declared: Labels | None, reading: Reading, store: Store
) -> Callable[[Case], _CaseRead]:
    """What reads a case, or finds in the store what was read of it."""
    settings = {
        "channels": folder.channels,
        "declared": None if declared is None else asdict(declared),
        "structures": repr(folder.structures),
    }
    basis = survey_basis(_CaseRead, settings, reading)
    return lambda case: remembered(
        _CaseRead, lambda: _decode(case, folder, declared, reading, store), store, case, basis
    )


def _decode(case: Case, folder: DataFolder, declared: Labels | None, reading: Reading, store: Store) -> _CaseRead:
    """Read one case. Its arrays are left to `store.decoded`, where they wait to be prepared."""
    image = load_image(case, channels=folder.channels, reading=reading)
    unlabelled = declared == UNLABELLED
    drawn = blank_label(image.grid) if unlabelled else load_label_values(case, image.grid, reading)
    if folder.structures is not None:
        refuse_overlap(drawn.notes, case.case_id, folder.structures)
    label = integer_values(drawn.array, where=case.case_id)
    store.decoded.keep(case.case_id, image, drawn)
    voxels_of_value = _counts(label)
    foreground = np.isin(label, [value for value in voxels_of_value if _is_foreground(value, declared)])
    num_foreground = int(np.count_nonzero(foreground))
    random = np.random.default_rng(zlib.crc32(case.case_id.encode()))  # the same voxels whatever thread comes first
    candidates = num_foreground or label.size
    chosen = random.choice(candidates, min(SAMPLE_VOXELS, candidates), replace=False)
    if num_foreground:
        chosen = np.flatnonzero(foreground)[chosen]
    sample = image.array.reshape(len(image.array), -1)[:, chosen].astype(np.float32)
    grid = image.grid.reoriented(MODEL_ORIENTATION)
    stats = tuple(
        _statistics(sample[c], float(image.array[c].min()), float(image.array[c].max()), num_foreground)
        for c in range(len(image.array))
    )
    info = CaseInfo(
        case_id=case.case_id,
        shape=image.grid.shape,
        spacing_mm=image.grid.spacing_mm,
        orientation=image.grid.orientation,
        modality=image.modality,
        label_voxels=(),
        intensity=stats,
        nonzero_shape=_nonzero_shape(image.array),
        notes=tuple(dict.fromkeys((*image.notes, *drawn.notes))),
    )
    pooled = sample[:, : POOLED_VOXELS if num_foreground or unlabelled else 0].copy()
    return _CaseRead(info, voxels_of_value, grid.shape, grid.spacing_mm, pooled)


def _counts(label: NDArray[np.integer[Any]]) -> dict[int, int]:
    """Voxels of each value that occurs, in ascending order."""
    if label.size and label.min() >= 0 and label.max() < 1 << 16:  # nothing to sort or to hash
        counts = np.zeros(int(label.max()) + 1, np.int64)
        flat = label.ravel(order="K")
        for begin in range(0, flat.size, COUNTED_VOXELS):  # bincount copies what it counts to 64 bits
            counts += np.bincount(flat[begin : begin + COUNTED_VOXELS], minlength=len(counts))
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    return {int(value): int(count) for value, count in zip(*np.unique(label, return_counts=True), strict=True)}


def _nonzero_shape(array: NDArray[Any]) -> tuple[int, ...]:
    """Size of the box of nonzero voxels of (C, *S) along each axis; S where there are none."""
    nonzero = (array != 0).any(axis=0)
    lengths = []
    for axis in range(nonzero.ndim):
        along = np.flatnonzero(nonzero.any(axis=tuple(a for a in range(nonzero.ndim) if a != axis)))
        lengths.append(int(along[-1] - along[0] + 1) if len(along) else nonzero.shape[axis])
    return tuple(lengths)


def _is_foreground(value: int, declared: Labels | None) -> bool:
    if declared is None:
        return value != 0
    if value in declared.ignore:
        return False
    background = declared.values[0]
    return value not in background if background else any(value in values for values in declared.values[1:])


def _statistics(sample: NDArray[np.float32], low: float, high: float, num_foreground: int) -> ChannelStats:
    p00_5, p50, p99_5 = (float(p) for p in np.percentile(sample, (0.5, 50, 99.5)))
    return ChannelStats(
        minimum=low,
        maximum=high,
        mean=float(sample.mean(dtype=np.float64)),
        std=float(sample.std(dtype=np.float64)),
        p00_5=p00_5,
        p50=p50,
        p99_5=p99_5,
        num_foreground=num_foreground,
    )


def _pooled(readings: Sequence[_CaseRead]) -> tuple[ChannelStats, ...]:
    sample = np.concatenate([reading.pooled for reading in readings], axis=1)
    infos = [reading.info for reading in readings]
    return tuple(
        _statistics(
            sample[c],
            min(info.intensity[c].minimum for info in infos),
            max(info.intensity[c].maximum for info in infos),
            sum(info.intensity[c].num_foreground for info in infos),
        )
        for c in range(len(sample))
    )


def _undeclared(readings: Iterable[_CaseRead], labels: Labels) -> dict[str, MedsegError]:
    """E_LABEL for each case with values that no class claims."""
    problems: dict[str, MedsegError] = {}
    for reading in readings:
        try:
            labels.to_index(np.array(list(reading.voxels_of_value)), where=reading.info.case_id)
        except MedsegError as error:
            problems[reading.info.case_id] = error
    return problems


def _labels_of_values(readings: Sequence[_CaseRead]) -> Labels:
    """A label table from the values themselves."""
    values = sorted({value for reading in readings for value in reading.voxels_of_value})
    if len(values) > MAX_FOUND_VALUES or values[0] < 0:
        raise MedsegError(
            Code.LABEL,
            f"the labels hold {len(values)} different values, which looks like numbered objects"
            if values[0] >= 0
            else "the labels hold negative values",
            where="data.labels",
            expected=f"at most {MAX_FOUND_VALUES} classes, the background 0",
            got=f"values {values[0]} … {values[-1]}",
            remedy="for a map of objects set data.labels={object: rest}; otherwise name the classes: "
            "data.labels={name: value, …}",
        )
    if values == [0, 255]:
        return Labels.from_mapping({"background": 0, "foreground": 255})
    return Labels.from_mapping({"background": 0, **{f"class_{value}": value for value in values if value != 0}})


def _with_classes(reading: _CaseRead, labels: Labels) -> CaseInfo:
    """The case with its voxels counted by class."""
    values = list(reading.voxels_of_value)
    counts = np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
    np.add.at(counts, labels.to_index(np.array(values)), [reading.voxels_of_value[value] for value in values])
    label_voxels = tuple(int(n) for n in counts[: labels.num_classes])
    return replace(reading.info, label_voxels=label_voxels, ignored_voxels=int(counts[IGNORE_INDEX]))


def raise_problems(problems: Mapping[str, MedsegError], num_cases: int, *, can_skip: bool) -> None:
    """Raise the one problem, or all in a table; `can_skip`: cases remain without the bad ones."""
    if not problems:
        return
    ordered = [problems[case_id] for case_id in sorted(problems)]
    remedies = [*dict.fromkeys(error.remedy for error in ordered if error.remedy)][:MAX_REMEDIES]
    if can_skip:
        these = "this case" if len(ordered) == 1 else "these cases"
        remedies.append(f"{'or ' if remedies else ''}train without {these}: data.on_bad_case=skip")
    remedy = "; ".join(remedies) or None
    if len(ordered) == 1:
        one = ordered[0]
        raise MedsegError(one.code, one.message, where=one.where, expected=one.expected, got=one.got, remedy=remedy)
    table = [f"{case_id}: {problems[case_id].code} {problems[case_id].message}" for case_id in sorted(problems)]
    more = [f"and {len(table) - MAX_PROBLEMS} more: medseg inspect DATA lists all"] if len(table) > MAX_PROBLEMS else []
    raise MedsegError(
        ordered[0].code,
        f"{len(ordered)} of {num_cases} cases cannot be used",
        where="data.root",
        expected="cases that can all be used",
        got="\n    ".join(["", *table[:MAX_PROBLEMS], *more]),
        remedy=remedy,
    )


def _of_other_kind(readings: Sequence[_CaseRead]) -> dict[str, MedsegError]:
    """E_MIXED or E_CHANNELS for each case with other numbers of dimensions or channels than most have."""
    problems: dict[str, MedsegError] = {}
    for code, what, number_of in (
        (Code.CHANNELS, "channels", {r.info.case_id: len(r.info.intensity) for r in readings}),
        (Code.MIXED, "dimensions", {r.info.case_id: len(r.info.shape) for r in readings}),
    ):
        ((usual, num_usual),) = Counter(number_of.values()).most_common(1) or [(0, 0)]
        for case_id, number in number_of.items():
            if number != usual:
                problems[case_id] = MedsegError(
                    code,
                    f"another number of {what} than the rest",
                    where=case_id,
                    expected=f"{usual} {what}, as {num_usual} cases have",
                    got=f"{case_id}: {number}",
                    remedy="convert it, or leave it out with a manifest (case,image,label)",
                )
    return problems
