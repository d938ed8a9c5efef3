"""clDice, boundary IoU, lesions, instances and cells against other implementations; what empty masks get."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.measure import label as skimage_label
from skimage.measure import regionprops
from skimage.metrics import adapted_rand_error, contingency_table, variation_of_information
from skimage.morphology import skeletonize

from medseg.cli import cli
from medseg.errors import MedsegError
from medseg.metrics.boundary import rim
from medseg.metrics.case import measure_case
from medseg.metrics.centreline import skeleton
from medseg.metrics.components import Overlaps, components
from medseg.metrics.instances import panoptic_quality
from medseg.metrics.metric import known_metrics, metric_names, metrics
from medseg.metrics.partition import partition_scores, thinned_cells
from medseg.torchvision_compat import prepare_torchvision
from medseg.volume import Grid

Mask = NDArray[np.bool_]
SYMMETRIC = {"dice", "iou", "hd", "hd95", "asd", "surface_dice", "boundary_iou", "cldice", "pq", "sq", "rq"}
ALL = [m.name for m in known_metrics()]


def values(predicted: NDArray, reference: NDArray, names: list[str], spacing: tuple[float, ...] | None = None):
    shape = predicted.shape
    grid = Grid(shape, np.diag([*(spacing or [1.0] * len(shape)), 1.0]))
    (result,) = measure_case(predicted.astype(np.uint8), reference.astype(np.uint8), grid, num_classes=2, names=names)
    return result.values


def blob(seed: int, shape: tuple[int, ...], level: float = 0.5) -> Mask:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    mask: Mask = field > level * field.std()
    return mask


def pair(seed: int, shape: tuple[int, ...]) -> tuple[Mask, Mask]:
    """Two that overlap in part."""
    a = blob(seed, shape)
    b = ndimage.shift(a.astype(float), 1, order=0) > 0
    return a, (b ^ (blob(seed + 50, shape, 2.0))) & (np.arange(shape[0]) % 9 > 0)[(...,) + (None,) * (len(shape) - 1)]


# --- names ---


def test_names_as_users_write_them() -> None:
    default = tuple(m.name for m in metrics())
    assert metric_names("dice, hd95,dice") == ("dice", "hd95")
    assert metric_names("default,cldice") == (*default, "cldice")
    assert metric_names("all") == tuple(ALL)
    assert {"dice", "hd95", "asd", "surface_dice", "hd"} <= set(default)
    assert not {"cldice", "boundary_iou", "lesion_f1", "pq", "v_rand"} & set(default)
    with pytest.raises(MedsegError, match="did you mean 'cldice'"):
        metric_names("cldicee")
    with pytest.raises(MedsegError, match="E_CONFIG"):
        metric_names(" , ")


def test_metrics_by_name_on_the_command_line(tmp_path: Path) -> None:
    for folder, mask in (("ref", membranes()), ("pred", membranes(gap=1))):
        (tmp_path / folder).mkdir()
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / folder / "x.png")
    command = ["evaluate", str(tmp_path / "pred"), str(tmp_path / "ref"), "-o", str(tmp_path / "out"), "--metrics"]
    done = CliRunner().invoke(cli, [*command, "membrane_v_rand,hd95"])
    assert done.exit_code == 0 and "V_rand" in done.output, done.output
    (row,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["cases"]
    assert list(row) == ["case", "class", "state", "dice", "membrane_v_rand", "hd95_px"]
    assert row["membrane_v_rand"] < 0.8 < row["dice"]
    assert "did you mean 'cldice'" in str(CliRunner().invoke(cli, [*command, "cldise"]).exception)


# --- all metrics: perfection, symmetry, translation, empty masks ---


@pytest.mark.parametrize("shape", [(24, 20), (10, 14, 12)])
def test_perfection(shape: tuple[int, ...]) -> None:
    mask = blob(2, shape)
    found = values(mask, mask, ALL)
    for metric in known_metrics():
        if metric.better == "higher":
            assert found[metric.name] == pytest.approx(1), metric.name
        elif metric.better == "lower":
            assert found[metric.name] == 0, metric.name


@pytest.mark.parametrize("shape", [(26, 22), (10, 14, 12)])
def test_symmetry_and_translation(shape: tuple[int, ...]) -> None:
    a, b = pair(1, shape)
    spacing = (1.5, 0.8, 2.0)[: len(shape)]
    there, back = values(a, b, ALL, spacing), values(b, a, ALL, spacing)
    for name in SYMMETRIC:
        assert there[name] == pytest.approx(back[name]), name
    assert there["sensitivity"] == pytest.approx(back["precision"])
    assert there["lesion_f1"] < 1
    # Moved within a larger case: the same, but for what counts the background or takes the diagonal as a measure
    moved = [np.pad(mask, [(4, 9)] * mask.ndim) for mask in (a, b)]
    here = [np.pad(mask, [(8, 5)] * mask.ndim) for mask in (a, b)]
    assert values(*moved, ALL, spacing) == pytest.approx(values(*here, ALL, spacing))


@pytest.mark.parametrize("shape", [(9, 8), (5, 6, 7), (1, 9, 8)])
def test_empty_masks(shape: tuple[int, ...]) -> None:
    empty, box = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    box[tuple(slice(0 if n == 1 else 2, n - 1 or 1) for n in shape)] = True
    assert all(math.isnan(v) for v in values(empty, empty, ALL).values())
    missed, spurious = values(empty, box, ALL), values(box, empty, ALL)
    diagonal = math.sqrt(sum(n * n for n in shape))
    for metric in known_metrics():
        for found in (missed, spurious):
            if metric.better == "higher":
                assert found[metric.name] == 0 or math.isnan(spurious[metric.name]), metric.name
            elif metric.better == "lower":
                assert found[metric.name] == pytest.approx(diagonal), metric.name
    assert [n for n, v in missed.items() if math.isnan(v)] == []
    assert {n for n, v in spurious.items() if math.isnan(v)} == {
        "sensitivity",
        "lesion_sensitivity",
        "relative_volume_error",
    }
    assert (missed["reference_lesions"], missed["false_positive_lesions"]) == (1, 0)
    assert (spurious["reference_lesions"], spurious["false_positive_lesions"]) == (0, 1)


small = arrays(np.bool_, (3, 5, 4), elements=st.booleans())


@settings(max_examples=60, deadline=None)
@given(small, small)
def test_missing_a_structure_is_never_better_than_any_prediction_of_it(predicted: Mask, reference: Mask) -> None:
    reference[0, 0, 0] = predicted[2, 4, 3] = True
    found = values(predicted, reference, ALL, (3.0, 1.0, 0.5))
    missed = values(np.zeros_like(reference), reference, ALL, (3.0, 1.0, 0.5))
    for metric in known_metrics():
        if metric.better == "higher":
            assert 0 <= missed[metric.name] <= found[metric.name] <= 1 + 1e-12, metric.name
        elif metric.better == "lower":
            assert missed[metric.name] > found[metric.name], metric.name


# --- overlap, against MONAI and by hand ---


def test_overlap_agrees_with_monai_and_with_counting() -> None:
    prepare_torchvision()
    from monai.metrics import compute_confusion_matrix_metric, get_confusion_matrix

    a, b = pair(4, (18, 15, 11))
    counts = get_confusion_matrix(*(torch.from_numpy(m)[None, None].float() for m in (a, b)))
    found = values(a, b, ["sensitivity", "specificity", "precision"])
    for name, value in found.items():
        assert value == pytest.approx(float(compute_confusion_matrix_metric(name, counts)))
    assert found["sensitivity"] == pytest.approx((a & b).sum() / b.sum())
    assert found["specificity"] == pytest.approx((~a & ~b).sum() / (~b).sum())
    assert found["precision"] == pytest.approx((a & b).sum() / a.sum())


# --- clDice ---


def test_cldice_of_lines_by_hand() -> None:
    """A line of 12 pixels, found but for 4 of them, and 3 pixels of another line."""
    reference, predicted = np.zeros((2, 9, 16), dtype=bool)
    reference[4, 2:14] = predicted[4, 2:10] = predicted[1, 3:6] = True
    precision, sensitivity = 8 / 11, 8 / 12
    expected = 2 * precision * sensitivity / (precision + sensitivity)
    assert values(predicted, reference, ["cldice"])["cldice"] == pytest.approx(expected)


def test_cldice_forgives_the_width_and_not_the_gap() -> None:
    thick, thin, broken = np.zeros((3, 11, 40), dtype=bool)
    thick[3:8, 3:37], thin[5, 3:37] = True, True
    broken[3:8, 3:37], broken[:, 15:25] = True, False
    scores = {name: values(mask, thick, ["cldice", "dice"]) for name, mask in (("thin", thin), ("broken", broken))}
    assert scores["thin"]["cldice"] > 0.95 and scores["thin"]["dice"] < 0.4
    assert scores["broken"]["cldice"] < 0.9


@pytest.mark.parametrize("shape", [(40, 36), (16, 18, 14)])
def test_cldice_agrees_with_the_papers_program_and_with_monai(shape: tuple[int, ...]) -> None:
    prepare_torchvision()
    from monai.losses import SoftclDiceLoss

    a, b = pair(7, shape)

    def share(mask: Mask, line: Mask) -> float:
        return float((mask.astype(int) * line).sum() / line.sum())

    tprec, tsens = share(b, skeletonize(a)), share(a, skeletonize(b))
    assert values(a, b, ["cldice"])["cldice"] == pytest.approx(2 * tprec * tsens / (tprec + tsens))

    # MONAI has the differentiable form only, whose skeleton of a straight line of one voxel is the line
    line, other = np.zeros((2, *shape), dtype=bool)
    middle = tuple(n // 2 for n in shape[:-1])
    line[middle][2:12] = other[middle][5:13] = True
    soft = SoftclDiceLoss(iter_=3, smooth_nr=0, smooth_dr=0, smooth=1e-9)
    pairs = [torch.from_numpy(m)[None, None].float() for m in (line, other)]
    assert values(other, line, ["cldice"])["cldice"] == pytest.approx(1 - float(soft(*pairs)), abs=1e-5)


def test_a_skeleton_is_never_empty() -> None:
    for n in (1, 2, 3):
        for ndim in (1, 2, 3):
            mask = np.zeros((5,) * ndim, dtype=bool)
            mask[(slice(1, 1 + n),) * ndim] = True
            line = skeleton(mask)
            assert line.any() and not (line & ~mask).any() and line.shape == mask.shape


# --- boundary IoU ---


@pytest.mark.parametrize(("shape", "spacing"), [((30, 26), (1.0, 1.0)), ((9, 14, 12), (3.0, 1.0, 1.5))])
def test_boundary_iou_agrees_with_brute_force_and_with_erosion(
    shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    a, b = pair(3, shape)
    diagonal = float(np.linalg.norm(np.multiply(shape, spacing)))
    width = max(0.02 * diagonal, *spacing)
    rims, eroded = [], []
    radius = [int(width / s) for s in spacing]
    offsets = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in radius), indexing="ij"), axis=-1)
    ball = np.linalg.norm(offsets * spacing, axis=-1) <= width + 1e-9
    for mask in (a, b):
        padded = np.pad(mask, 1)
        outside = np.argwhere(~padded) * spacing
        inside = np.argwhere(padded)
        depth = np.linalg.norm(inside[:, None] * spacing - outside[None], axis=-1).min(axis=1)
        near = np.zeros_like(padded)
        near[tuple(inside[depth <= width + 1e-9].T)] = True
        rims.append(near[(slice(1, -1),) * mask.ndim])
        eroded.append(mask & ~ndimage.binary_erosion(mask, ball))
    found = values(a, b, ["boundary_iou"], spacing)["boundary_iou"]
    for first, second in (rims, eroded):
        assert found == pytest.approx((first & second).sum() / (first | second).sum())
    assert 0 < found < 1


def test_the_rim_is_as_wide_as_it_says() -> None:
    plate = np.zeros((20, 5), dtype=bool)
    plate[2:18] = True
    assert rim(plate, (1.0, 100.0), 3.0).any(axis=1).sum() == 6
    assert values(plate, plate, ["boundary_iou"])["boundary_iou"] == 1


# --- lesions ---


def dots(shape: tuple[int, int], *corners: tuple[int, int], size: int = 2) -> Mask:
    mask = np.zeros(shape, dtype=bool)
    for i, j in corners:
        mask[i : i + size, j : j + size] = True
    return mask


def test_lesions_by_hand() -> None:
    """Of three lesions two are touched, by one find; two finds are none."""
    reference = dots((20, 20), (2, 2), (2, 6), (12, 12))
    predicted = dots((20, 20), (16, 2), (8, 16))
    predicted[3, 3:7] = True
    found = values(predicted, reference, ["lesion_sensitivity", "lesion_f1", "false_positive_lesions"])
    assert found["lesion_sensitivity"] == pytest.approx(2 / 3)
    assert found["false_positive_lesions"] == 2
    assert found["lesion_f1"] == pytest.approx(2 / (2 + (2 + 1) / 2))


@pytest.mark.parametrize("shape", [(40, 36), (14, 16, 15)])
@pytest.mark.parametrize("seed", range(3))
def test_lesions_agree_with_scikit_image_and_with_flooding(shape: tuple[int, ...], seed: int) -> None:
    a, b = blob(seed, shape, 1.4), blob(seed + 100, shape, 1.4)
    found = values(a, b, ["lesion_sensitivity", "lesion_f1", "false_positive_lesions", "reference_lesions"])

    def by_regions(of: Mask, other: Mask) -> tuple[int, int]:
        regions = regionprops(skimage_label(of, connectivity=of.ndim))
        return sum(bool(other[tuple(r.coords.T)].any()) for r in regions), len(regions)

    def by_flooding(of: Mask, other: Mask) -> tuple[int, int]:
        left, hit, total = {tuple(x) for x in np.argwhere(of).tolist()}, 0, 0
        while left:
            heap, lesion = [left.pop()], []
            while heap:
                voxel = heap.pop()
                lesion.append(voxel)
                near = [n for n in left if max(abs(p - q) for p, q in zip(n, voxel, strict=True)) <= 1]
                left.difference_update(near)
                heap += near
            total += 1
            hit += any(other[v] for v in lesion)
        return hit, total

    for count in (by_regions, by_flooding):
        (tp, total), (right, finds) = count(b, a), count(a, b)
        assert total > 2
        assert found["lesion_sensitivity"] == pytest.approx(tp / total)
        assert found["false_positive_lesions"] == finds - right
        assert found["reference_lesions"] == total
        assert found["lesion_f1"] == pytest.approx(tp / (tp + (total - tp + finds - right) / 2))


# --- instances ---


def test_panoptic_quality_by_hand() -> None:
    reference, predicted = np.zeros((2, 6, 20), dtype=np.uint16)
    reference[1:5, 1:5], reference[1:5, 8:12], reference[1:5, 15:19] = 7, 300, 2
    predicted[1:5, 1:5], predicted[1:5, 9:13], predicted[0, 19] = 1, 5, 9  # IoU 1, 12/20, none
    found = panoptic_quality(predicted, reference)
    assert (found.tp, found.fp, found.fn) == (2, 1, 1)
    assert found.sq == pytest.approx((1 + 0.6) / 2)
    assert found.rq == pytest.approx(2 / 3)
    assert found.pq == pytest.approx(1.6 / 3)


def test_panoptic_quality_of_nothing() -> None:
    nothing, one = np.zeros((3, 3), int), np.eye(3, dtype=int)
    assert math.isnan(panoptic_quality(nothing, nothing).pq)
    for pair_ in ((nothing, one), (one, nothing)):
        assert (panoptic_quality(*pair_).pq, panoptic_quality(*pair_).rq) == (0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_panoptic_quality_agrees_with_monai_and_with_brute_force(seed: int) -> None:
    prepare_torchvision()
    from monai.metrics import compute_panoptic_quality

    shape = (48, 44)
    reference, _ = components(blob(seed, shape, 0.8))
    predicted, _ = components(
        ndimage.shift(blob(seed, shape, 0.8).astype(float), 1, order=0) > 0 if seed % 2 else blob(seed, shape, 1.0)
    )
    found = panoptic_quality(predicted, reference)
    assert found.tp > 0 and found.fp + found.fn > 0
    maps = [torch.from_numpy(m.astype(np.int64)) for m in (predicted, reference)]
    for name in ("pq", "sq", "rq"):
        assert getattr(found, name) == pytest.approx(float(compute_panoptic_quality(*maps, metric_name=name)), rel=1e-4)
    ious = []
    for p in np.unique(predicted)[1:]:
        for r in np.unique(reference)[1:]:
            iou = ((predicted == p) & (reference == r)).sum() / ((predicted == p) | (reference == r)).sum()
            ious += [iou] if iou > 0.5 else []
    assert (found.tp, found.iou_sum) == (len(ious), pytest.approx(sum(ious)))
    by_class = values(predicted > 0, reference > 0, ["pq", "sq", "rq"])
    assert by_class["pq"] == pytest.approx(found.pq)
    assert by_class["sq"] * by_class["rq"] == pytest.approx(found.pq)


def test_maps_that_are_no_instances_are_refused() -> None:
    with pytest.raises(MedsegError, match=r"E_GRID(.*\n)*.*\(2, 2\)(.*\n)*.*\(2, 3\)"):
        Overlaps.of(np.zeros((2, 3), int), np.zeros((2, 2), int))
    for wrong in (np.full((2, 2), -1), np.zeros((2, 2))):
        with pytest.raises(MedsegError, match="E_LABEL.*prediction"):
            Overlaps.of(wrong, np.zeros((2, 2), int))


# --- cells and membranes ---


def cells_of(seed: int, shape: tuple[int, int] = (40, 44)) -> NDArray[np.int32]:
    rng = np.random.default_rng(seed)
    seeds = rng.integers(0, shape, (7, 2))
    nearest = np.argmin([np.hypot(*(np.indices(shape) - s[:, None, None])) for s in seeds], axis=0)
    return (nearest + 1).astype(np.int32)


def test_partition_scores_agree_with_all_pairs_and_with_scikit_image() -> None:
    reference, predicted = cells_of(0), cells_of(1)
    reference[::9] = 0
    found = partition_scores(predicted, reference)
    # scikit-image has no segment of one voxel, so here the prediction has no membrane. It counts pairs of different
    # voxels, the challenge all pairs: recomputed from its table, and its own score to that difference.
    table = contingency_table(reference, predicted, ignore_labels=(0,), normalize=True).toarray()
    both = (table**2).sum()
    split, merge = both / (table.sum(1) ** 2).sum(), both / (table.sum(0) ** 2).sum()
    assert (found.rand_split, found.rand_merge) == (pytest.approx(split), pytest.approx(merge))
    assert found.v_rand == pytest.approx(2 * split * merge / (split + merge))
    error, _, _ = adapted_rand_error(reference, predicted, ignore_labels=(0,))
    assert found.v_rand == pytest.approx(1 - error, abs=2e-3)
    given_reference, given_predicted = variation_of_information(reference, predicted, ignore_labels=(0,)) * math.log(2)
    entropy = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (table.sum(0), table.sum(1))]
    for shared in (entropy[1] - given_predicted, entropy[0] - given_reference):
        assert found.v_info == pytest.approx(2 * shared / sum(entropy), rel=1e-6)


def test_partition_scores_agree_with_all_pairs_where_membranes_are_single() -> None:
    reference, predicted = np.kron(np.arange(1, 5).reshape(2, 2), np.ones((3, 4), int)), np.ones((6, 8), int)
    predicted[:, 4], predicted[:, 5:] = 0, 2
    reference[0] = 0
    counted = np.flatnonzero(reference.ravel())
    ours, theirs = predicted.ravel().copy(), reference.ravel()
    ours[ours == 0] = 100 + np.arange((ours == 0).sum())  # each one a segment of its own
    total = len(counted)
    same = dict.fromkeys(("ours", "theirs", "both"), total)  # every voxel with itself
    for i, j in combinations(counted, 2):
        same["ours"] += 2 * (ours[i] == ours[j])
        same["theirs"] += 2 * (theirs[i] == theirs[j])
        same["both"] += 2 * (ours[i] == ours[j] and theirs[i] == theirs[j])
    found = partition_scores(predicted, reference)
    assert found.rand_split == pytest.approx(same["both"] / same["theirs"])
    assert found.rand_merge == pytest.approx(same["both"] / same["ours"])
    assert found.v_rand == pytest.approx(2 * same["both"] / (same["ours"] + same["theirs"]))

    def entropy(*maps: NDArray) -> float:
        _, counts = np.unique(np.stack([m[counted] for m in maps]), axis=1, return_counts=True)
        return float(-(counts / total * np.log(counts / total)).sum())

    shared = entropy(ours) + entropy(theirs) - entropy(ours, theirs)
    assert found.v_info == pytest.approx(2 * shared / (entropy(ours) + entropy(theirs)))
    assert found.info_split == pytest.approx(shared / entropy(ours))
    assert found.info_merge == pytest.approx(shared / entropy(theirs))


def membranes(shape: tuple[int, int] = (40, 60), width: int = 1, gap: int = 0) -> Mask:
    """Two lines across, the second with a gap."""
    mask = np.zeros(shape, dtype=bool)
    mask[:, 20 : 20 + width] = mask[:, 40 : 40 + width] = True
    mask[10 : 10 + gap, 40 : 40 + width] = False
    return mask


def test_a_gap_of_one_pixel_costs_and_the_width_does_not() -> None:
    truth = membranes()
    names = ["v_rand", "v_info"]
    wide, broken = ~membranes(width=3), ~membranes(gap=1)
    assert values(wide, ~truth, names)["v_rand"] > 0.95
    assert values(broken, ~truth, names)["v_rand"] < 0.8
    assert values(broken, ~truth, names)["v_info"] < 0.85
    assert values(broken, ~truth, ["dice"])["dice"] > 0.99
    for mask in (membranes(width=3), membranes(gap=1)):
        # the same class as cells or as membranes, also where the box around the membranes is not the whole case
        both = values(mask, truth, ["membrane_v_rand", "membrane_v_info"])
        assert list(both.values()) == pytest.approx(list(values(~mask, ~truth, names).values()))


def test_thinned_membranes_are_one_pixel_wide_and_separate() -> None:
    segments = thinned_cells(~membranes(width=4))
    assert (segments == 0).sum() == 2 * 40
    assert len(np.unique(segments)) == 4
    spur = ~membranes()
    spur[20, 45:50] = False
    assert (thinned_cells(spur) == 0).sum() == 2 * 40  # what ends within a cell separates nothing


def test_a_crop_does_not_change_what_membranes_separate() -> None:
    """A ring: inside and outside are two cells, and outside reaches beyond the box of the ring."""
    i, j = np.indices((50, 70)) - np.array([22, 30])[:, None, None]
    ring = np.abs(np.hypot(i, j) - 9) < 1.2
    open_ring = ring & ~((i == 0) & (j > 0))
    whole = values(open_ring, ring, ["membrane_v_rand"])["membrane_v_rand"]
    (cells,) = [components(~ring, by_faces=True)[0]]
    assert whole == pytest.approx(partition_scores(thinned_cells(~open_ring), cells).v_rand)
    assert whole < 1


def test_real_membranes(real_data) -> None:
    """A slice of the ISBI 2012 challenge: perfect against itself, and worse the thinner its membranes become."""
    path = sorted((real_data / "segmentation" / "isbi2012_em" / "label").glob("*.png"))[0]
    cells = np.asarray(Image.open(path))[:200, :200] > 0
    names = ["v_rand", "v_info"]
    assert values(cells, cells, names) == pytest.approx(dict.fromkeys(names, 1.0))
    found = [values(ndimage.binary_dilation(cells, iterations=n), cells, names) for n in (1, 2)]
    for name in names:
        scores = [f[name] for f in found]
        assert 1 > scores[0] > scores[1] >= 0, name
