"""medseg inspect MODEL: what `medseg inspect` does with a run, a plan or a configuration instead of data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.reading import reading_options
from medseg.errors import MedsegError

if TYPE_CHECKING:
    from medseg.explain.subject import Subject
    from medseg.explain.tile import Scene
    from medseg.formats import Reading

RUN_FILES = ("bundle.json", "folds.json", "ensemble.json")
"""One of them lies in a run, a run of several folds, or an ensemble."""
PLAN_FILE = "plan.yaml"
_OVERRIDE = re.compile(r"(task|model|preset)(\.\w+)*=")
_SHOWN = "filters,maps,excitation,saliency,shifts"


def is_about_model(arguments: Sequence[str]) -> bool:
    """Whether the arguments of `medseg inspect` name a model: a run, its bundle, a plan, or model=NAME."""
    named = (argument for argument in arguments if not argument.startswith("-"))
    return any(_OVERRIDE.match(argument) or _holds_model(Path(argument)) for argument in named)


def _holds_model(path: Path) -> bool:
    from medseg.formats.dicom.archive import is_zip, listed

    try:
        if path.is_dir():
            return any((path / name).is_file() for name in (*RUN_FILES, PLAN_FILE))
        if path.name == PLAN_FILE:
            return path.is_file()
        return is_zip(path) and any(PurePosixPath(name) in listed(path) for name in RUN_FILES)
    except (OSError, ValueError, MedsegError):  # an option's value that is no path, a damaged zip: not a model
        return False


class OfDataOrModel(click.Command):
    """`medseg inspect` of data, which gives way to `inspect_model` where a model is named."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the command that the arguments are for."""
        if is_about_model(args):
            return inspect_model.make_context(info_name, args, parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command("inspect")
@click.argument("subject", nargs=-1, required=True, metavar="MODEL")
@click.option("--size", metavar="NxNxN", help="Size of the image; by default that of the plan's patches.")
@click.option("--channels", default=1, show_default=True, help="Of a configuration: channels of the image.")
@click.option("--classes", default=2, show_default=True, help="Of a configuration or plan: classes, with background.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]),
              help="Of the feature maps, for their memory.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of a table.")
@click.option("--all", "every", is_flag=True, help="A row for each normalisation and activation, too.")
@click.option(
    "--effective",
    is_flag=True,
    help="Measure the effective receptive fields from gradients, too: in --image, or in noise.",
)
@click.option("-o", "--output", "folder", metavar="FOLDER", type=click.Path(path_type=Path),
              help="Write layers.json, architecture.svg and, of a run, pictures of what it has learnt.")  # fmt: skip
@click.option("--image", metavar="SCAN", type=click.Path(path_type=Path),
              help="A scan to look at through the network: feature maps, saliency, shifts. Needs -o.")  # fmt: skip
@click.option("--at", metavar="I,J,K", help="Voxel of the scan that lies in the middle; by default the scan's middle.")
@click.option("--layer", "layers", multiple=True, help="Look at this layer (a name of the table); may be repeated.")
@click.option("--class", "class_name", metavar="NAME", help="The class that saliency explains.")
@click.option("--show", default=_SHOWN, show_default=True, metavar="LIST", help="Which pictures, with commas.")
@click.option("--steps", default=32, show_default=True, help="Steps towards what excites a filter.")
@click.option("--tensorboard", is_flag=True, help="With -o of a run: write the pictures for TensorBoard, too.")
@click.option("--checkpoint", default="best", show_default=True, type=click.Choice(["best", "latest"]),
              help="The weights of the best validation, or the last ones.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@reading_options
def inspect_model(
    subject: tuple[str, ...],
    size: str | None,
    channels: int,
    classes: int,
    precision: str,
    as_json: bool,
    every: bool,
    effective: bool,
    folder: Path | None,
    image: Path | None,
    at: str | None,
    layers: tuple[str, ...],
    class_name: str | None,
    show: str,
    steps: int,
    tensorboard: bool,
    checkpoint: str,
    device: str,
    reading: Reading,
) -> None:
    """Look inside a network: its layers, what they see and cost, and what they have learnt.

    MODEL is a run (or what medseg select or export made of runs), a plan (a folder or plan.yaml, also with
    model=NAME), or a configuration: model=NAME and keys of it, as medseg train takes them. Classifiers (model=resnet18)
    have a table and pictures like segmenters.

    The table says of each layer the size of its result, its receptive field, weights (with and without weight
    sharing), multiply-adds and memory. A size that the network cannot take is refused, with the nearest that fit.

    \b
      medseg inspect model=unet_2015 --size 572x572
      medseg inspect model=fusionnet model.skip=concat --size 640x640 -o drawing
      medseg inspect model=resnet18 --channels 3 --classes 1000
      medseg inspect PLAN
      medseg inspect RUN --effective
      medseg inspect RUN --image scan.nii.gz -o inside
      medseg inspect RUN --image scan.nii.gz -o inside --layer encoder.2 --class liver --show maps,saliency
    """
    from rich.console import Console

    from medseg.device import choose_device
    from medseg.errors import Code, MedsegError
    from medseg.explain.look import Wanted, draw_subject, print_subject

    console = Console()
    where = choose_device(device)
    chosen = _subject(subject, size=size, channels=channels, classes=classes, checkpoint=checkpoint, device=where)
    if image is not None and not (chosen.is_trained and folder is not None):
        raise MedsegError(
            Code.CONFIG,
            "a scan is looked at through a trained network, into a folder",
            where="--image",
            remedy="medseg inspect RUN --image SCAN -o FOLDER",
        )
    if tensorboard and not (chosen.is_trained and folder is not None):
        raise MedsegError(
            Code.CONFIG,
            "TensorBoard gets pictures of a trained network, in a folder",
            where="--tensorboard",
            remedy="medseg inspect RUN --image SCAN -o FOLDER --tensorboard",
        )
    if (folder is None and layers) or (image is None and (at or class_name)):
        raise MedsegError(
            Code.CONFIG,
            "there is nothing to show of it",
            where="--layer" if layers else "--at" if at else "--class",
            expected="--layer with -o, --at and --class with --image",
            remedy="medseg inspect RUN --image SCAN -o FOLDER",
        )
    wanted = Wanted(effective, layers, class_name, tuple(part.strip() for part in show.split(",")), steps)
    scene = None
    if image is not None:
        scene = _scene(chosen, Path(subject[0]), image, _place(at), reading)
    chosen.model.to(where)
    table = print_subject(
        chosen, console, as_json=as_json, precision=precision, every=every, wanted=wanted, folder=folder, scene=scene
    )
    if folder is not None and chosen.is_trained:
        said = Console(stderr=True) if as_json else console
        draw_subject(chosen, table, folder, said, wanted=wanted, scene=scene, tensorboard=tensorboard)


def _subject(
    arguments: tuple[str, ...], *, size: str | None, channels: int, classes: int, checkpoint: str, device: Any
) -> Subject:
    """The network that the arguments name."""
    from medseg.errors import Code, MedsegError
    from medseg.explain.subject import Subject, of_plan, of_run, of_settings, parsed_size
    from medseg.inference.members import is_model

    lengths = None if size is None else parsed_size(size)
    paths = [Path(argument) for argument in arguments if not _OVERRIDE.match(argument)]
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]
    settings = None
    if len(paths) > 1 or (paths and not paths[0].exists()):
        raise MedsegError(
            Code.CONFIG,
            "this names no model",
            where=paths[-1],
            expected="one run, bundle or plan, or model=NAME with keys such as model.skip=add",
            got=" ".join(arguments),
        )
    if overrides:
        from medseg.config import compose
        from medseg.tasks import task_of

        stated = _with_task(overrides)
        settings = compose(task_of(stated).config, stated).model
    if not paths:
        return of_settings(settings or {}, in_channels=channels, num_classes=classes, size=lengths)
    if not is_model(paths[0]):
        return of_plan(paths[0], settings, num_classes=classes, size=lengths)
    if overrides:
        raise MedsegError(
            Code.CONFIG,
            "a run has its network: no key changes it",
            where=overrides[0],
            remedy="leave it out, or leave the run out: medseg inspect " + " ".join(overrides),
        )
    from medseg.classification.bundle import is_classifier, load_classifier

    if is_classifier(paths[0]):
        found = load_classifier(paths[0], checkpoint=checkpoint, device=device)
        name = f"{found.info.model['name']} of {paths[0].name}"
        return Subject(
            name, found.model, found.info.model, lengths or found.info.sight.size, classes=found.info.classes
        )
    return of_run(paths[0], checkpoint=checkpoint, device=device, size=lengths)


def _with_task(overrides: Sequence[str]) -> list[str]:
    """The same, with the first task that has such a network where none is named."""
    from medseg.tasks import TASKS

    names = [override.partition("=")[2] for override in overrides if override.startswith("model=")]
    if not names or any(override.startswith("task=") for override in overrides):
        return list(overrides)
    able = {name: key for key, task in reversed(TASKS.items()) for name in task.options("model")}
    (alike,) = get_close_matches(names[-1], able, n=1, cutoff=0)  # of a name that is none: whose refusal helps most
    return [f"task={able[alike]}", *overrides]


def _scene(subject: Subject, run: Path, path: Path, at: tuple[float, ...] | None, reading: Reading) -> Scene:
    """The scan as the network sees it, and where in it to look."""
    from medseg.explain.tile import Scene

    if subject.info is not None:
        return Scene.read(path, subject.info, at, reading)
    import torch

    from medseg.classification.bundle import ClassifierInfo
    from medseg.classification.images import ImageCase, open_image
    from medseg.errors import Code, MedsegError

    if at is not None:
        raise MedsegError(Code.CONFIG, "a classifier sees the whole image", where="--at", remedy="leave it out")
    sight = ClassifierInfo.read(run).sight
    image = torch.from_numpy(sight.prepare(open_image(ImageCase(path.name, path), reading), where=path.name))
    return Scene(image, tuple(n // 2 for n in image.shape[1:]))


def _place(text: str | None) -> tuple[float, ...] | None:
    from medseg.errors import Code, MedsegError

    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise MedsegError(
            Code.CONFIG, "this is no place", where="--at", expected="numbers with commas: 120,88,40", got=repr(text)
        ) from error
