"""Largest-component post-processing, kept only where the validation cases say that it helps.

Two kinds of step are tried: only the largest component of all foreground together stays, and only the largest
component of one structure stays. What is removed becomes background. A step is kept if it raises the mean Dice of the
validation cases and lowers no structure. So a structure that has two parts (lungs, hippocampi) keeps both: to remove
one costs Dice.

Source: nnU-Net 2.8.1, `determine_postprocessing` and `remove_all_but_largest_component`. What differs: structures are
tried one by one on what was kept before, and the second condition (no structure is lowered) holds for them as well,
which matters where regions overlap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg import __version__
from medseg.data.cases import Case, load_label_values
from medseg.documents import parse_json
from medseg.errors import Code, MedsegError
from medseg.formats import STRICT, Reading, open_label
from medseg.formats.atomic import whole_file
from medseg.inference.components import Indices, boxes_of, outside_largest
from medseg.labels import IGNORE_INDEX, Labels

POSTPROCESSING_FILE = "postprocessing.json"
"""In a run's folder: what `predict` does to its label maps. `POSTPROCESSING_FILE` with .md is the same for readers."""
FORMAT = 1
"""Raised when the file changes in a way that older code would misread."""
ALL_FOREGROUND = "(foreground)"
"""The step that takes all structures together; no structure can be meant by it."""
RULE = "a step is kept if it raises the mean Dice over the cases and lowers no structure"
CONNECTIVITY = "voxels that share a face, an edge or a corner are connected"

Load = Callable[[str], tuple[Indices, Indices]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trial:
    """One step that was tried.

    Args:
        step: `ALL_FOREGROUND` or the name of a structure.
        kept: whether it is done.
        reason: why, in words.
        before: mean Dice of the foreground without it (with the steps kept before).
        after: the same with it.
    """

    step: str
    kept: bool
    reason: str
    before: float
    after: float


@dataclass(frozen=True)
class PostProcessing:
    """What is done to label maps, and why.

    Args:
        steps: `ALL_FOREGROUND` or names of structures, of which only the largest component stays, in this order.
        trials: everything that was tried.
        before: structure, and `ALL_FOREGROUND` for the mean over them → mean Dice of the validation cases as predicted.
        after: the same with `steps`.
        num_cases: validation cases that decided.
    """

    steps: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None
    num_cases: int = 0

    def apply(self, indices: Indices, labels: Labels) -> Indices:
        """Class indices with only what the steps leave; the array itself where there is nothing to remove.

        Args:
            indices: class indices, any shape.
            labels: the classes.
        """
        boxes = boxes_of(indices) if self.steps else ()
        result = indices
        for step in self.steps:
            removed = outside_largest(result, members_of(step, labels), boxes)
            if removed is not None:
                result = indices.copy() if result is indices else result
                box, voxels = removed
                result[box][voxels] = 0
        return result

    def describe(self) -> str:
        """One line for who predicts."""
        if not self.steps:
            return "none"
        parts = ["all foreground together" if step == ALL_FOREGROUND else step for step in self.steps]
        line = f"only the largest component stays of: {', '.join(parts)}"
        if self.before and self.after:
            line += f" (Dice of {self._cases} {self.before[ALL_FOREGROUND]:.4f} →"
            line += f" {self.after[ALL_FOREGROUND]:.4f})"
        return line

    @property
    def _cases(self) -> str:
        return f"{self.num_cases} validation {'case' if self.num_cases == 1 else 'cases'}"

    def write(self, run: Path) -> None:
        """Write `postprocessing.json` and its table `postprocessing.md` into a run's folder.

        Raises:
            MedsegError: E_OUTPUT.
        """
        content = {
            "format": FORMAT,
            "medseg": __version__,
            "rule": RULE,
            "connectivity": CONNECTIVITY,
            "steps": list(self.steps),
            "num_cases": self.num_cases,
            "dice": {
                name: {"before": _plain(value), "after": _plain((self.after or {}).get(name, math.nan))}
                for name, value in (self.before or {}).items()
            },
            "trials": [{**asdict(t), "before": _plain(t.before), "after": _plain(t.after)} for t in self.trials],
        }
        path = run / POSTPROCESSING_FILE
        with whole_file(path, ".json") as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with whole_file(path.with_suffix(".md"), ".md") as temporary:
            temporary.write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """The table: Dice before and after for each structure, and each step with its reason."""
        rows = [
            f"| {'mean' if name == ALL_FOREGROUND else name} | {_number(value)} | {_number((self.after or {})[name])} |"
            for name, value in (self.before or {}).items()
        ]
        trials = [
            f"| {'all foreground' if t.step == ALL_FOREGROUND else t.step} | {'yes' if t.kept else 'no'} | {t.reason} |"
            for t in self.trials
        ]
        return "\n".join(
            [
                "# Post-processing",
                "",
                f"`medseg predict`: {self.describe()}.",
                "",
                f"Decided on {self._cases}: {RULE}; {CONNECTIVITY}.",
                "The numbers after it are of the cases that chose it.",
                "",
                "| structure | Dice before | Dice after |",
                "|---|---|---|",
                *rows,
                "",
                "| only the largest component of | done | why |",
                "|---|---|---|",
                *trials,
                "",
            ]
        )

    @classmethod
    def read(cls, run: Path, labels: Labels) -> PostProcessing:
        """Read what `write` wrote; no steps where the run has no such file.

        Raises:
            MedsegError: E_RUN if the file cannot be read, or names structures that the model does not know.
        """
        path = run / POSTPROCESSING_FILE
        if not path.is_file():
            return cls()
        try:
            content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']} of medseg {content.get('medseg')}")
            dice = content["dice"]
            result = cls(
                tuple(str(step) for step in content["steps"]),
                tuple(
                    Trial(t["step"], t["kept"], t["reason"], _float(t["before"]), _float(t["after"]))
                    for t in content["trials"]
                ),
                {name: _float(values["before"]) for name, values in dice.items()},
                {name: _float(values["after"]) for name, values in dice.items()},
                int(content["num_cases"]),
            )
            for step in result.steps:
                members_of(step, labels)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MedsegError(
                Code.RUN,
                "the run's post-processing cannot be read",
                where=path,
                expected=f"format {FORMAT}",
                got=f"{type(error).__name__}: {error}",
                remedy="remove the file, or predict with --no-postprocess",
            ) from error
        return result


def structures_of(labels: Labels) -> dict[str, tuple[int, ...]]:
    """The structures that are measured: name → the class indices that a label map has in it."""
    return dict(zip(labels.foreground, labels.parts, strict=True))


def members_of(step: str, labels: Labels) -> tuple[int, ...]:
    """The class indices that a step takes together.

    Raises:
        KeyError: no structure has that name.
    """
    structures = structures_of(labels)
    if step == ALL_FOREGROUND:
        return tuple(sorted({index for members in structures.values() for index in members}))
    return structures[step]


def decide_postprocessing(
    run: Path,
    predictions: Mapping[str, Path],
    cases: Mapping[str, Case],
    labels: Labels,
    *,
    reading: Reading = STRICT,
    progress: Progress | None = None,
) -> PostProcessing:
    """Decide from the label files of validation cases, and write it into the run's folder.

    Args:
        run: a run, a run of several folds or an ensemble.
        predictions: validation case → the label file that a model wrote which has not seen it.
        cases: id → case, at least those of `predictions`.
        labels: the classes.
        reading: what is asked of the readers beyond their strict defaults.
        progress: called with (done, total).
    """

    def load(case_id: str) -> tuple[Indices, Indices]:
        predicted = open_label(predictions[case_id])
        reference = load_label_values(cases[case_id], predicted.grid, reading)
        return labels.to_index(predicted.array), labels.to_index(reference.array)

    chosen = choose_postprocessing(sorted(predictions), load, labels, progress=progress)
    chosen.write(run)
    return chosen


def choose_postprocessing(
    case_ids: Sequence[str], load: Load, labels: Labels, *, progress: Progress | None = None
) -> PostProcessing:
    """Try all steps on validation cases and keep those that help.

    Args:
        case_ids: the cases.
        load: case id → predicted and reference class indices, of one shape; called once in each round.
        labels: the classes.
        progress: called with (done, total).
    """
    structures = structures_of(labels)
    disjoint = sum(map(len, structures.values())) == len(members_of(ALL_FOREGROUND, labels))
    names = list(structures) if len(structures) > 1 else []  # one structure is all the foreground
    # Where regions overlap, to take a part of one changes others: each is tried on what the one before it left.
    rounds = [[ALL_FOREGROUND], *([names] if disjoint else [[name] for name in names])]
    rounds = [steps for steps in rounds if steps]
    steps: tuple[str, ...] = ()
    trials: list[Trial] = []
    first: NDArray[np.float64] | None = None
    done, total = 0, len(rounds) * len(case_ids)
    for tried in rounds:
        before = np.empty((len(case_ids), len(structures)))
        after = {step: np.empty_like(before) for step in tried}
        for number, case_id in enumerate(case_ids):
            predicted, reference = load(case_id)
            predicted = PostProcessing(steps).apply(predicted, labels)
            joint = _joint(predicted, reference, labels)
            before[number] = _dice(joint, structures)
            boxes = boxes_of(predicted)
            for step in tried:
                removed = outside_largest(predicted, members_of(step, labels), boxes)
                if removed is None:
                    after[step][number] = before[number]
                    continue
                box, voxels = removed
                moved = _joint(predicted[box][voxels], reference[box][voxels], labels)
                changed = joint - moved
                changed[0] += moved.sum(axis=0)
                after[step][number] = _dice(changed, structures)
            done += 1
            if progress is not None:
                progress(done, total)
        first = before if first is None else first
        for step in tried:
            trials.append(_judged(step, before, after[step], list(structures)))
        kept = tuple(t.step for t in trials[-len(tried) :] if t.kept)
        steps += kept
        last = _together(before, [after[step] for step in kept])
    if first is None:
        return PostProcessing()
    return PostProcessing(
        steps, tuple(trials), _means(first, list(structures)), _means(last, list(structures)), len(case_ids)
    )


def _together(before: NDArray[np.float64], kept: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Dice (cases, structures) with all steps kept in a round: those of one round touch different structures."""
    result = before.copy()
    for after in kept:
        changed = (after != before) & ~(np.isnan(after) & np.isnan(before))
        result[changed] = after[changed]
    return result


def _judged(step: str, before: NDArray[np.float64], after: NDArray[np.float64], names: list[str]) -> Trial:
    """Keep a step or not, by the Dice (cases, structures) without and with it."""
    means, changed = _means(before, names), _means(after, names)
    old, new = means[ALL_FOREGROUND], changed[ALL_FOREGROUND]
    lowered = [name for name in names if changed[name] < means[name]]
    num_changed = int((~((before == after) | (np.isnan(before) & np.isnan(after)))).any(axis=1).sum())
    figures = f"mean Dice {_number(old)} → {_number(new)}"
    if not num_changed:
        return Trial(step, False, "nothing would change in any case", old, new)
    if not new > old:
        return Trial(step, False, f"{figures}: no gain", old, new)
    if lowered:
        worst = ", ".join(f"{name} {_number(means[name])} → {_number(changed[name])}" for name in lowered)
        return Trial(step, False, f"{figures}, but it lowers {worst}", old, new)
    return Trial(step, True, f"{figures}, no structure lower; {num_changed} of {len(before)} cases change", old, new)


def _joint(predicted: Indices, reference: Indices, labels: Labels) -> NDArray[np.int64]:
    """Joint histogram [predicted, reference] of class indices, without voxels whose reference is ignored."""
    from medseg.metrics.case import confusion  # here, because predicting needs none, and scipy.spatial is slow

    counted = reference != IGNORE_INDEX
    return confusion(predicted[counted], reference[counted], labels.num_classes)


def _dice(joint: NDArray[np.int64], structures: Mapping[str, tuple[int, ...]]) -> NDArray[np.float64]:
    """Dice of each structure; NaN where it is neither predicted nor in the reference (as `metrics.overlap.dice`)."""
    values = []
    for members in structures.values():
        rows = list(members)
        size = int(joint[rows].sum() + joint[:, rows].sum())
        values.append(2 * int(joint[np.ix_(rows, rows)].sum()) / size if size else math.nan)
    return np.array(values)


def _means(dice: NDArray[np.float64], names: list[str]) -> dict[str, float]:
    """Mean over the cases of each structure, and over the cases of the mean over their structures."""
    result = {name: _nanmean(dice[:, i]) for i, name in enumerate(names)}
    result[ALL_FOREGROUND] = _nanmean(np.array([_nanmean(case) for case in dice]))
    return result


def _nanmean(values: NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else math.nan


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)
