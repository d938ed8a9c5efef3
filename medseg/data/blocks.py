"""Folds of neighbouring cases, for cases whose patients are not known, or not all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medseg.data.stratify import Traits, deal, fewest_lacking

MIN_BLOCK = 3
"""Fewest neighbours in a block, on average: of smaller blocks every case would lie at a border."""

LARGEST_FOLD = 1.25
"""Cases of the largest fold, in even shares, where known patients join blocks."""


def folds_of_blocks(
    ids: Sequence[str], patients: Mapping[str, str], traits: Traits, num_folds: int, seed: int
) -> tuple[list[tuple[str, ...]], int]:
    """Folds of the largest blocks that leave no more classes and strata out of folds than smaller ones do.

    No block ends within a run of one known patient's cases, and blocks that share a patient become one. Where that
    leaves too few blocks, or folds of very different sizes (a patient's cases lie far apart), the cases of each known
    patient are dealt by themselves, and the other cases in blocks.

    Args:
        ids: of the cases, sorted.
        patients: case id → patient, for the cases whose patient is known.
        traits: what each fold should have a like share of.
        num_folds: folds.
        seed: which of the equally good ways is taken.
    Returns:
        The ids of each fold, sorted, and the number of blocks.
    """
    fewest, tries = fewest_lacking(ids, traits, num_folds), []
    runs = _runs(ids, patients)
    for pieces in range(1, max(len(ids) // (MIN_BLOCK * num_folds), 1) + 1):
        parts = np.array_split(np.arange(len(runs)), max(min(num_folds * pieces, len(runs)), 1))
        blocks = _merged([[i for k in part for i in runs[k]] for part in parts], patients)
        folds, lacking = deal(blocks, traits, num_folds, seed)
        too_few = max(num_folds - len(blocks), 0)
        too_large = bool(patients) and max(map(len, folds)) > LARGEST_FOLD * len(ids) / num_folds
        tries.append((too_few + too_large, lacking, len(blocks), folds))
        if lacking <= fewest and not too_few and not too_large:
            break
    uneven, _, num_blocks, best = min(tries, key=lambda found: found[:3])
    if patients and uneven:
        return _apart(ids, patients, traits, num_folds, seed)
    return best, num_blocks


def _apart(
    ids: Sequence[str], patients: Mapping[str, str], traits: Traits, num_folds: int, seed: int
) -> tuple[list[tuple[str, ...]], int]:
    """The cases of each known patient dealt apart from blocks of the others, so that folds are of like size."""
    of_patient: dict[str, list[str]] = {}
    for case_id in ids:
        if case_id in patients:
            of_patient.setdefault(patients[case_id], []).append(case_id)
    others = [case_id for case_id in ids if case_id not in patients]
    blocks = [[others[i] for i in part] for part in np.array_split(np.arange(len(others)), num_folds) if len(part)]
    known, _ = deal(list(of_patient.values()), traits, num_folds, seed)
    unknown, _ = deal(blocks, traits, num_folds, seed)
    folds = [tuple(sorted((*a, *b))) for a, b in zip(known, reversed(unknown), strict=True)]
    return folds, len(of_patient) + len(blocks)


def _runs(ids: Sequence[str], patients: Mapping[str, str]) -> list[list[str]]:
    """Neighbours of one known patient together, every other case alone."""
    runs: list[list[str]] = []
    for case_id in ids:
        if runs and case_id in patients and patients.get(runs[-1][-1]) == patients[case_id]:
            runs[-1].append(case_id)
        else:
            runs.append([case_id])
    return runs


def _merged(blocks: Sequence[Sequence[str]], patients: Mapping[str, str]) -> list[list[str]]:
    """The blocks, those that share a patient as one; in the order of their first cases."""
    merged: list[list[str]] = []
    for block in blocks:
        own = {patients[i] for i in block if i in patients}
        sharing = [other for other in merged if own.intersection(patients[i] for i in other if i in patients)]
        if not sharing:
            merged.append(list(block))
            continue
        first = sharing[0]
        for other in (*sharing[1:], block):
            first.extend(other)
        merged = [other for other in merged if all(other is not gone for gone in sharing[1:])]
    return merged
