"""From images to survival, with times that are made up: docs/benchmarks/survival.{json,md}.

    python scripts/bench_survival.py --data FOLDER [--run RUN] [--write]

No image set at hand comes with outcomes. So times are drawn for the hippocampi of FOLDER/segmentation/hippocampus,
with a hazard that falls with the volume: what there is to find is known. RUN, a run trained on such images, adds what
its network sees. The last rows shuffle the times among the cases: then there is nothing to find.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medseg import __version__
from medseg.features.settings import Settings
from medseg.measurement.cases import find_cases
from medseg.measurement.table import measure_cases, write_table
from medseg.survival.analysis import analyse
from medseg.survival.concordance import concordance
from medseg.survival.data import read_cohort

ROOT = Path(__file__).resolve().parents[1]
HAZARD = 0.03
"""Events a month of a hippocampus of mean volume."""
RATIO, PER_MM3 = 4.0, 500.0
"""So many times the hazard for a volume that is so much smaller."""
OBSERVED_MONTHS = (12.0, 60.0)
FEW = ("shape_volume", "shape_sphericity", "intensity_mean", "glcm_joint_entropy")
"""Four features that were chosen before looking."""


def main() -> None:
    """Measure, make times up, analyse, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("MEDSEG_DATA", ROOT.parent / "shared" / "data"))
    )
    parser.add_argument("--run", type=Path, help="a run trained on hippocampi: its embeddings are looked at too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/survival.json and .md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(arguments.data / "segmentation" / "hippocampus", arguments.run, Path(folder), arguments.seed)
    page = as_page(rows)
    print(page)
    if arguments.write:
        text = json.dumps({"version": __version__, "seed": arguments.seed, "rows": rows}, indent=1) + "\n"
        (ROOT / "docs" / "benchmarks" / "survival.json").write_text(text, encoding="utf-8")
        (ROOT / "docs" / "benchmarks" / "survival.md").write_text(page, encoding="utf-8")


def compare(data: Path, run: Path | None, folder: Path, seed: int) -> list[dict[str, Any]]:
    """One row for each set of columns."""
    cases = find_cases(data / "images", data / "labels")
    features = folder / "features.csv"
    measured = measure_cases(cases, Settings(), wanted=("1",), num_threads=2)  # the anterior part
    write_table(features, measured)
    volumes = {row.about["case"]: row.values["shape_volume"] for row in measured}
    tables: dict[str, tuple[Path, tuple[str, ...]]] = {"4 features": (features, FEW), "all features": (features, ())}
    if run is not None:
        from medseg.measurement.embedding import Embedder

        embeddings = folder / "embeddings.csv"
        asked = measure_cases(cases, Settings(families=()), wanted=("1",), embedder=Embedder(run))
        write_table(embeddings, asked)
        tables["embeddings"] = (embeddings, ("embedding_*",))
    rows = []
    for times, shuffled in (("depend on the volume", False), ("shuffled", True)):
        outcomes = folder / "outcomes.csv"
        write_outcomes(outcomes, volumes, seed, shuffled=shuffled)
        for columns, (table, names) in tables.items():
            cohort = read_cohort([table, outcomes], time="months", event="event", features=names)
            found = analyse(cohort, seed=seed)
            true = -np.asarray([volumes[case] for case in cohort.ids])
            rows.append(
                {
                    "times": times,
                    "columns": columns,
                    "number": len(cohort.features),
                    "cases": len(cohort.ids),
                    "events": int(cohort.event.sum()),
                    "penalty": found.penalty,
                    "cross_validated": asdict(found.cross_validated),
                    "training_data": asdict(found.apparent),
                    "true_hazard": concordance(cohort.time, cohort.event, true).mean,
                    "logrank_p": found.logrank_p,
                }
            )
    return rows


def write_outcomes(path: Path, volumes: dict[str, float], seed: int, *, shuffled: bool) -> None:
    """Exponential times with a hazard that falls with the volume, and ends of observation at any time in a span."""
    rng = np.random.default_rng(seed)
    volume = np.asarray(list(volumes.values()))
    hazard = HAZARD * RATIO ** ((volume.mean() - volume) / PER_MM3)
    time, end = rng.exponential(1 / hazard), rng.uniform(*OBSERVED_MONTHS, size=len(volume))
    order = rng.permutation(len(volume)) if shuffled else np.arange(len(volume))
    months, event = np.minimum(time, end)[order], (time <= end)[order]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "months", "event"])
        writer.writerows((case, f"{t:.3f}", int(e)) for case, t, e in zip(volumes, months, event, strict=True))


def as_page(rows: list[dict[str, Any]]) -> str:
    """The table for people."""
    first = rows[0]
    lines = [
        "# From images to survival, with times that are made up",
        "",
        "Made by `python scripts/bench_survival.py --data FOLDER --run RUN --write`. No image set at hand comes with "
        f"outcomes: times were drawn for {first['cases']} hippocampi ({first['events']} events) with "
        f"a hazard {RATIO:g} times as high for {PER_MM3:g} mm³ less. *True hazard* is the C-index of the volume "
        "itself: no model can do better but by chance. Shuffled times have nothing to find, and 0.5 is right. Images "
        "are of both sides of the same people without saying whose: intervals take each for a person.",
        "",
        "| times | columns | number | ridge penalty | C-index, cross-validated | of training data | true hazard "
        "| log-rank p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        unseen, seen = row["cross_validated"], row["training_data"]
        p = "" if math.isnan(row["logrank_p"]) else f"{row['logrank_p']:.2g}"
        lines.append(
            f"| {row['times']} | {row['columns']} | {row['number']} | {row['penalty']:g} "
            f"| {unseen['mean']:.2f} ({unseen['low']:.2f} to {unseen['high']:.2f}) | {seen['mean']:.2f} "
            f"| {row['true_hazard']:.2f} | {p} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
