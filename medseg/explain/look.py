"""`medseg inspect MODEL`: the table of layers, and with a folder the drawing and the pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from medseg.data.plan.memory import GIB, step_cost
from medseg.errors import Code, MedsegError, nearest
from medseg.explain.drawing import save_drawing
from medseg.explain.effective import EffectiveField, effective_field
from medseg.explain.equivariance import Shift, shift_table
from medseg.explain.excitation import STEPS, most_exciting
from medseg.explain.layers import LayerTable, layer_table
from medseg.explain.maps import around_middle, feature_maps, first_filters, map_places, module_named, plane
from medseg.explain.network import fitting_size, scores_of, steps_of
from medseg.explain.pictures import Album, filter_grid, heat_map, image_grid, map_grid, save_picture
from medseg.explain.saliency import answered, grad_cam, gradient_saliency, occlusion_saliency
from medseg.explain.subject import Subject, output_named
from medseg.explain.text import print_layers, times
from medseg.explain.tile import Scene
from medseg.formats.atomic import whole_file
from medseg.models import SegmentationModel

LAYERS_FILE, DRAWING_FILE, SHIFTS_FILE = "layers.json", "architecture.svg", "shifts.json"
WHAT = ("filters", "maps", "excitation", "saliency", "shifts")
"""Pictures and measurements; the last three of them take computing time, the last four a scan, but for excitation."""
NUM_EFFECTIVE = 4
"""Images of noise that an effective receptive field is averaged over."""
MAX_MAPS, MAX_EXCITED = 64, 8
"""Feature maps, and filters with what excites them, that one picture shows."""
OCCLUSION_WINDOWS = 8
"""Windows along the longest axis of what occlusion covers; each is two steps long."""


@dataclass(frozen=True)
class Wanted:
    """What is shown of a network.

    Args:
        effective: measure the effective receptive fields too.
        layers: paths of the layers to look at; () is the end of each stage.
        class_name: what saliency explains; None is the class with the most voxels.
        what: those of `WHAT`.
        steps: of the search for what excites filters.
    """

    effective: bool = False
    layers: tuple[str, ...] = ()
    class_name: str | None = None
    what: tuple[str, ...] = WHAT
    steps: int = STEPS

    def __post_init__(self) -> None:
        for name in self.what:
            if name not in WHAT:
                raise MedsegError(
                    Code.NAME, f"there is no {name!r} to show", where="--show", remedy=nearest(name, WHAT)
                )


def print_subject(
    subject: Subject,
    console: Console,
    *,
    as_json: bool,
    precision: str,
    every: bool,
    wanted: Wanted,
    folder: Path | None,
    scene: Scene | None = None,
) -> LayerTable:
    """Print the layers of a network as a table or JSON, and write them with the drawing into a folder.

    Args:
        subject: the network.
        console: where the user reads.
        as_json: JSON instead of a table.
        precision: of the feature maps, for their memory.
        every: a row for each normalisation and activation too.
        wanted: whether effective receptive fields are measured.
        folder: gets `layers.json` and `architecture.svg`; None writes nothing.
        scene: the scan in which effective receptive fields are measured; None is noise.
    Raises:
        MedsegError: E_MODEL for a size that does not fit; E_OUTPUT.
    """
    table = layer_table(subject.model, subject.size)
    fields = _effective(subject, table, scene) if wanted.effective else {}
    content = {"model": subject.name, **table.to_json(precision)}
    if isinstance(subject.model, SegmentationModel):
        content["training_step"] = _training(subject, precision)
    if fields:
        content["effective_on"] = "noise" if scene is None else "scan"
    for name, field in fields.items():
        entry = content["total"] if not name else next(s for s in content["stages"] if s["stage"] == name)
        entry |= {"effective_field": field.size, "effective_extent": list(field.extent)}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    if as_json:
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    else:
        console.print(f"[bold]{escape(subject.name)}[/bold]", highlight=False)
        for note in subject.notes:
            console.print(f"[dim]{escape(note)}[/dim]", highlight=False)
        print_layers(table, console, precision=precision, every=every)
        if (step := content.get("training_step")) is not None:
            console.print(
                f"A training step with {step['batch_size']} of these images takes about {step['gib']:.1f} GiB in "
                f"{precision} on a CPU (estimated).", style="dim", highlight=False,
            )  # fmt: skip
        if fields:
            _print_effective(fields, table, console, content["effective_on"])
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / LAYERS_FILE, ".json") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        save_drawing(folder / DRAWING_FILE, table, title=f"{subject.name}, image {times(subject.size)}")
        if fields:
            heat = next(iter(fields.values())).influence  # of the result; of a classifier, its last map
            middle = heat if heat.dim() == 2 else heat[heat.shape[0] // 2]
            below = torch.zeros_like(middle) if scene is None else plane(scene.tile(subject.size)[:1])[0]
            save_picture(folder / "effective_field.png", heat_map(below, middle))
    return table


def draw_subject(
    subject: Subject,
    table: LayerTable,
    folder: Path,
    console: Console,
    *,
    wanted: Wanted,
    scene: Scene | None,
    tensorboard: bool = False,
) -> None:
    """Write what a network has learnt into a folder: filters, feature maps, what excites them, saliency, shifts.

    Args:
        subject: the network, on the device to use.
        table: its layers.
        folder: where to; it is there.
        console: where the user reads.
        wanted: what.
        scene: the scan; None shows only what needs none.
        tensorboard: write the pictures for TensorBoard too.
    Raises:
        MedsegError: E_NAME for layers or classes that do not exist; E_OUTPUT; what the parts refuse.
    """
    for name in wanted.layers:  # before any work
        module_named(subject.model, name)
    output_named(subject, wanted.class_name, [0] * len(subject.outputs))
    places = map_places(subject.model, table)
    layers = wanted.layers or places.stages
    written: list[str] = []
    album = Album(folder)
    with Progress(console=console, transient=True) as progress:
        if "filters" in wanted.what:
            name, weights = first_filters(subject.model)
            album.add("filters", filter_grid(weights))
            written.append(f"filters.png: {len(weights)} filters of {name}; grey is 0")
        if "excitation" in wanted.what:
            written += _excitations(subject, table, wanted.layers or places.stages[:1], wanted.steps, album, progress)
        if scene is not None:
            tile = scene.tile(subject.size, _device(subject))
            share = scene.depth(subject.size)
            album.add("image", image_grid(plane(tile, share)))
            written.append(f"image.png: what the network sees, {times(subject.size)} voxels, each channel")
            if "maps" in wanted.what:
                for name, maps in feature_maps(subject.model, tile, layers).items():
                    album.add(f"maps/{name or 'result'}", map_grid(plane(maps, share)[:MAX_MAPS]))
                written.append(f"maps/: {len(layers)} layers, row by row from map 0 on, {MAX_MAPS} at most")
            if "saliency" in wanted.what:
                layer = wanted.layers[-1] if wanted.layers else places.before_scores
                written += _saliencies(subject, layer, wanted.class_name, tile, share, album, progress)
    shifts: list[Shift] = []
    if scene is not None and "shifts" in wanted.what and isinstance(subject.model, SegmentationModel):
        shifts = _shifts(subject, subject.model, scene, folder)
        for shift in shifts:
            if not any(shift.voxels[:-1]):
                album.note("equivariance/same class", shift.agreement_middle, shift.voxels[-1])
    if tensorboard:
        written.append(f"tensorboard --logdir {album.to_tensorboard()} shows this")
    for line in written:
        console.print(f"  {line}", highlight=False, markup=False)
    if shifts:
        print_shifts(shifts, steps_of(subject.model), console)


def _effective(subject: Subject, table: LayerTable, scene: Scene | None) -> dict[str, EffectiveField]:
    """The effective receptive fields of the stages and, under "", of the result: in the scan, or in noise."""
    if scene is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((NUM_EFFECTIVE, subject.model.in_channels, *subject.size), generator=generator)
    else:
        images = scene.tile(subject.size)[None]
    layers = ("", *map_places(subject.model, table).stages)
    if not table.output_size:  # the answer of a classifier lies nowhere
        layers = layers[:0:-1]
    return effective_field(subject.model, images.to(_device(subject)), layers=layers)


def _print_effective(fields: dict[str, EffectiveField], table: LayerTable, console: Console, source: str) -> None:
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in ("receptive field of", "in theory", "effective", "its extent"):
        view.add_column(title, justify="left" if title.endswith("of") else "right")
    for name, field in sorted(
        fields.items(), key=lambda item: (not item[0], table.stages.index(item[0]) if item[0] else 0)
    ):
        theory = table.of_stage(name)[-1].field if name else table.field
        seen = times("all" if n is None else n for n in theory)
        view.add_row(escape(name or "the result"), seen, f"{field.size:.1f}", times(field.extent))
    console.print(view)
    console.print(
        f"effective, in {'noise' if source == 'noise' else 'this scan'}: side of as many voxels as have more than "
        "4.6 % of the strongest gradient (Luo et al. 2016), which the image bounds; extent: from the first to the "
        "last of them.", style="dim", highlight=False,
    )  # fmt: skip


def _training(subject: Subject, precision: str) -> dict[str, Any]:
    model = subject.model
    cost = step_cost(
        subject.settings, in_channels=model.in_channels, num_outputs=model.num_classes, patch_size=tuple(subject.size)
    )
    held = cost.bytes_of(subject.batch_size, device="cpu", precision=precision)
    return {"batch_size": subject.batch_size, "device": "cpu", "precision": precision, "gib": round(held / GIB, 2)}


def _excitations(
    subject: Subject, table: LayerTable, layers: Sequence[str], steps: int, album: Album, progress: Progress
) -> list[str]:
    """What excites the filters of the layers that were named, or else of the first stage: deeper ones take minutes."""
    lines = []
    for name in layers:
        inside = (
            [layer for layer in table.layers if layer.name == name or layer.name.startswith(f"{name}.")]
            if name
            else list(table.layers)
        )
        field = inside[-1].field if inside else table.field
        # Twice the field: its middle is that of the image only up to a step between two voxels of the map. Twice the
        # divisor: normalisations need two voxels at the lowest resolution.
        lengths = zip(subject.size, field, steps_of(subject.model), strict=True)
        size = fitting_size(subject.model, tuple(min(n, max(2 * (f or n), 2 * d)) for n, f, d in lengths))
        size = tuple(min(n, m) for n, m in zip(size, subject.size, strict=True))
        number = inside[-1].output[0] if inside else subject.model.num_classes
        task = progress.add_task(f"what excites {name}", total=steps)
        found = most_exciting(
            subject.model, name, range(min(number, MAX_EXCITED)), size, steps=steps,
            progress=_advancing(progress, task),
        )  # fmt: skip
        seen = around_middle(found.images[:, 0], field)
        album.add(f"excitation/{name or 'result'}", image_grid(plane(seen)))
        lines.append(f"excitation/{name or 'result'}.png: what most excites its filters 0 … {len(found.after) - 1}")
    return lines


def _saliencies(
    subject: Subject,
    layer: str | None,
    class_name: str | None,
    tile: Tensor,
    share: float | None,
    album: Album,
    progress: Progress,
) -> list[str]:
    model, overlapping = subject.model, _overlapping(subject)
    with torch.no_grad():
        logits = scores_of(model, tile[None])[0]
    counts = [int(answered(logits, i, overlapping=overlapping).sum()) for i in range(len(logits))]
    output = output_named(subject, class_name, counts)
    name = subject.outputs[output]
    voxels = answered(logits, output, overlapping=overlapping)
    if not isinstance(model, SegmentationModel):  # its one answer can be explained for each class
        voxels = torch.ones_like(voxels)
    elif not counts[output] and class_name is None:
        return ["no saliency: the network sees no class here; --at or --class may change that"]
    sizes = [max(1, math.ceil(max(subject.size) / OCCLUSION_WINDOWS))] * len(subject.size)
    window = [min(n, 2 * s) for n, s in zip(subject.size, sizes, strict=True)]
    within = None
    if share is not None:  # in 3D the windows lie around the plane that is shown
        first = int(share * subject.size[0]) - window[0] // 2
        within = [slice(max(first, 0), max(first, 0) + 1), *(slice(0, n) for n in subject.size[1:])]
    parts = [
        math.ceil((1 if within and not axis else n) / s)
        for axis, (n, s) in enumerate(zip(subject.size, sizes, strict=True))
    ]
    task = progress.add_task("occlusion", total=math.prod(parts))
    heats = {
        "gradient": gradient_saliency(model, tile, output, voxels),
        "occlusion": occlusion_saliency(
            model, tile, output, voxels, window=window, step=sizes, within=within,
            progress=lambda number: progress.advance(task, number),
        ),
    }  # fmt: skip
    if layer is not None:  # see `grad_cam` for why it is the last map before the scores, and not the coarsest
        heats["grad_cam"] = grad_cam(model, tile, output, voxels, layer)
    below = plane(tile[:1], share)[0]
    for how, heat in heats.items():
        album.add(f"saliency_{how}", heat_map(below, plane(heat[None], share)[0], signed=how == "occlusion"))
    cam = "no Grad-CAM: no layer of this network gives maps" if layer is None else f"saliency_grad_cam.png (of {layer})"
    return [
        f"saliency_gradient.png, saliency_occlusion.png (red: needed for it), {cam}: "
        f"why {name} is seen" + (f" in {counts[output]} voxels" if isinstance(model, SegmentationModel) else "")
    ]


def _shifts(subject: Subject, model: SegmentationModel, scene: Scene, folder: Path) -> list[Shift]:
    shifts = shifts_of(model.divisor)
    largest = [max(shift[axis] for shift in shifts) for axis in range(model.spatial_dims)]
    start = scene.start([n + m for n, m in zip(subject.size, largest, strict=True)])
    image = scene.image.to(_device(subject))
    found = shift_table(model, image, subject.size, shifts, start=start, overlapping=_overlapping(subject))
    with whole_file(folder / SHIFTS_FILE, ".json") as temporary:
        temporary.write_text(json.dumps([shift.to_json() for shift in found], indent=2) + "\n", encoding="utf-8")
    return found


def shifts_of(divisor: Sequence[int]) -> list[tuple[int, ...]]:
    """Shifts that tell: along the last axis 1, 2, 4, … up to the divisor, and by the divisor along all axes."""
    lengths = sorted({*(1 << i for i in range(divisor[-1].bit_length())), divisor[-1]})
    along_last = [(*(0 for _ in divisor[1:]), n) for n in lengths if n <= divisor[-1]]
    return list(dict.fromkeys([*along_last, tuple(divisor)]))


def print_shifts(shifts: Sequence[Shift], divisor: Sequence[int], console: Console) -> None:
    """Print how far the result moves with the image."""
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in ("image moved by", "same class", "(middle)", "change of scores", "(middle)"):
        view.add_column(title, justify="right")
    for s in shifts:
        shares = (f"{share:.2%}" for share in (s.agreement, s.agreement_middle))
        view.add_row(times(s.voxels), *shares, f"{s.difference:.3g}", f"{s.difference_middle:.3g}")
    console.print("\n[bold]translation equivariance[/bold]: the result compared after moving back", highlight=False)
    console.print(view)
    console.print(
        "Change: mean size, over the standard deviation of the scores. Strides leave only multiples of "
        f"{times(divisor)} exact, padding none near the borders, and normalisation by the tile's own mean none at all.",
        style="dim", highlight=False,
    )  # fmt: skip


def _overlapping(subject: Subject) -> bool:
    return subject.info is not None and bool(subject.info.labels.regions)


def _device(subject: Subject) -> torch.device:
    device: torch.device = next(subject.model.parameters()).device
    return device


def _advancing(progress: Progress, task: Any) -> Callable[[], object]:
    return lambda: progress.advance(task)
