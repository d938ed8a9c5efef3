"""Configurations and their pairs, ranked by the Dice of validation cases, and which of them is worth its cost.

The best by mean Dice is not always the one to take: of those that are not worse by more than chance (Wilcoxon's
signed-rank test over the cases, paired, two-sided), the one with the fewest networks is chosen, and of these the one
with the highest mean. All were measured on the cases that choose: what comes first looks a little better than it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medseg import __version__
from medseg.formats.atomic import whole_file
from medseg.reports.evaluation import FOREGROUND
from medseg.statistics import paired_test

SELECTION_FILE = "selection.json"
"""In the folder of an ensemble: all that was compared. With .md the same for readers."""
CHANCE = 0.05
"""A difference is larger than chance where the test gives a p below this. Not corrected for the number of comparisons:
that would only make the simpler one win more often."""
UNDEFINED = "–"


@dataclass(frozen=True)
class Candidate:
    """A configuration, or several together.

    Args:
        name: for tables.
        sources: numbers of the runs that it consists of.
        num_models: networks that look at each tile.
    """

    name: str
    sources: tuple[int, ...]
    num_models: int


@dataclass(frozen=True)
class Difference:
    """By how much the best is better, over the cases where both have a Dice.

    Args:
        mean: of the differences of the cases' mean Dice.
        better: cases in which the best is better.
        worse: cases in which it is worse.
        p: of Wilcoxon's signed-rank test; 1 where no case differs.
    """

    mean: float
    better: int
    worse: int
    p: float

    @property
    def by_chance(self) -> bool:
        """True where nothing speaks against equality."""
        return not self.p < CHANCE

    @classmethod
    def of(
        cls, best: NDArray[np.float64], other: NDArray[np.float64], patients: Sequence[str] | None = None
    ) -> Difference:
        """From the mean Dice of each case, NaN where it has none, and its patient (`statistics.paired_test`)."""
        test = paired_test(other, best, patients)
        p = 1.0 if math.isnan(test.p) else test.p
        return cls(test.difference.mean, test.num_higher, test.num_lower, p)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Candidates in the order of their mean Dice.

    Args:
        candidates: the best first.
        dice: (candidates, cases, structures), NaN where a structure is in neither mask.
        cases: ids.
        structures: names.
        differences: of each candidate from the first.
        chosen: the one to use.
        reason: why, in words.
    """

    candidates: tuple[Candidate, ...]
    dice: NDArray[np.float64]
    cases: tuple[str, ...]
    structures: tuple[str, ...]
    differences: tuple[Difference, ...]
    chosen: Candidate
    reason: str

    @classmethod
    def of(
        cls,
        candidates: Sequence[Candidate],
        dice: NDArray[np.float64],
        cases: Sequence[str],
        structures: Sequence[str],
        patients: Mapping[str, str] | None = None,
    ) -> Ranking:
        """Rank and choose.

        Args:
            candidates: in any order.
            dice: (candidates, cases, structures).
            cases: ids.
            structures: names.
            patients: case id → patient; a case without one is one of its own.
        """
        of_case = [(patients or {}).get(case, case) for case in cases]
        per_case = _mean(dice, axis=2)
        means = _mean(per_case, axis=1)
        # Of equal ones the simpler stands first
        order = sorted(range(len(candidates)), key=lambda i: (-np.nan_to_num(means[i]), candidates[i].num_models, i))
        ranked = tuple(candidates[i] for i in order)
        differences = tuple(Difference.of(per_case[order[0]], per_case[i], of_case) for i in order)
        equal = [i for i in range(len(order)) if i == 0 or differences[i].by_chance]
        chosen = min(equal, key=lambda i: (ranked[i].num_models, i))
        reason = _reason(ranked, differences, chosen, means[order])
        return cls(ranked, dice[order], tuple(cases), tuple(structures), differences, ranked[chosen], reason)

    @property
    def means(self) -> list[dict[str, float]]:
        """For each candidate: structure, and `FOREGROUND` for the mean over them → mean Dice over the cases."""
        tables = []
        for dice in self.dice:
            table = dict(zip(self.structures, _mean(dice, axis=0).tolist(), strict=True))
            table[FOREGROUND] = float(_mean(_mean(dice, axis=1), axis=0))
            tables.append(table)
        return tables

    def write(self, folder: Path) -> None:
        """Write `selection.json`, with the Dice of every case, and `selection.md`.

        Raises:
            MedsegError: E_OUTPUT.
        """
        path = folder / SELECTION_FILE
        with whole_file(path, ".json") as temporary:
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        with whole_file(path.with_suffix(".md"), ".md") as temporary:
            temporary.write_text(self.markdown(), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; NaN becomes None."""
        return {
            "medseg": __version__,
            "chosen": self.chosen.name,
            "reason": self.reason,
            "chance": CHANCE,
            "num_cases": len(self.cases),
            "candidates": [
                {
                    "name": candidate.name,
                    "num_models": candidate.num_models,
                    "dice": {name: _plain(value) for name, value in means.items()},
                    "best_is_better_by": _plain(difference.mean),
                    "best_is_better_in": difference.better,
                    "best_is_worse_in": difference.worse,
                    "p": difference.p,
                    "cases": {
                        case: [_plain(v) for v in values.tolist()]
                        for case, values in zip(self.cases, dice, strict=True)
                    },
                }
                for candidate, means, difference, dice in zip(
                    self.candidates, self.means, self.differences, self.dice, strict=True
                )
            ],
        }

    def markdown(self) -> str:
        """The table with what it says."""
        header = ["", "models", *self.structures, "mean Dice", "best is better by", "in cases", "p"]
        if len(self.structures) == 1:
            del header[2]
        rows = [[f"**{row[0]}**" if row[0] == self.chosen.name else row[0], *row[1:]] for row in self.rows()]
        return "\n".join(
            [
                "# Selection",
                "",
                f"Chosen: **{self.chosen.name}**. {self.reason}",
                "",
                f"Dice on {len(self.cases)} validation cases, each predicted by the models that have not seen it.",
                "",
                *(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)),
                "",
                "p: Wilcoxon's signed-rank test of the cases' mean Dice against that of the first row, paired and",
                f"two-sided, not corrected for the number of rows. Above {CHANCE:g} the difference may be chance, and",
                "fewer models are preferred. The cases that chose are the ones that these numbers are from: expect a",
                "little less on new scans.",
                "",
            ]
        )

    def rows(self) -> list[list[str]]:
        """The cells of the table, the best first."""
        rows = []
        for candidate, means, difference in zip(self.candidates, self.means, self.differences, strict=True):
            first = candidate is self.candidates[0]
            per_structure = [] if len(self.structures) == 1 else [_number(means[name]) for name in self.structures]
            compared = [
                _number(difference.mean),
                f"{difference.better} of {difference.better + difference.worse}",
                f"{difference.p:.3g}",
            ]
            rows.append(
                [
                    candidate.name,
                    str(candidate.num_models),
                    *per_structure,
                    _number(means[FOREGROUND]),
                    *([""] * 3 if first else compared),
                ]
            )
        return rows


def print_ranking(ranking: Ranking, console: Console) -> None:
    """The table for the terminal; Dice of single structures are in the files."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for title in ("models", "mean Dice", "best better by", "in cases", "p"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in ranking.rows():
        chosen = row[0] == ranking.chosen.name
        cells = [escape(row[0]), row[1], *row[-4:]]
        table.add_row(*cells, style="bold" if chosen else None)
    console.print(
        f"\n[bold]{len(ranking.cases)} validation cases[/bold]  each predicted by models that have not seen it"
    )
    console.print(table)


def _reason(
    ranked: Sequence[Candidate], differences: Sequence[Difference], chosen: int, means: NDArray[np.float64]
) -> str:
    best, taken = ranked[0], ranked[chosen]
    if chosen:
        d = differences[chosen]
        return (
            f"{best.name} is better by {d.mean:.4f} mean Dice ({means[0]:.4f}), which may be chance "
            f"(p = {d.p:.2g}, better in {d.better} of {d.better + d.worse} cases that differ), and takes "
            f"{best.num_models} models instead of {taken.num_models}."
        )
    simpler = [i for i in range(1, len(ranked)) if ranked[i].num_models < best.num_models]
    text = f"It has the highest mean Dice, {means[0]:.4f}"
    if simpler:
        d = differences[simpler[0]]
        text += (
            f"; the best with fewer models, {ranked[simpler[0]].name}, is lower by {d.mean:.4f}, "
            f"more than chance (p = {d.p:.2g})"
        )
    elif len(ranked) > 1:
        d = differences[1]
        verdict = "which may be chance" if d.by_chance else "more than chance"
        text += f", and no other has fewer models; {ranked[1].name} is lower by {d.mean:.4f}, {verdict} (p = {d.p:.2g})"
    return f"{text}."


def _mean(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Mean that leaves NaN out; NaN where nothing is left, without a warning."""
    present = ~np.isnan(values)
    count = present.sum(axis)
    return np.where(count > 0, np.where(present, values, 0).sum(axis) / np.maximum(count, 1), np.nan)


def _number(value: float) -> str:
    return UNDEFINED if math.isnan(value) else f"{value:.4f}"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
