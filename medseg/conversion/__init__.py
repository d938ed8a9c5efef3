"""`medseg convert`: DICOM to NIfTI, structures between SEG, RTSTRUCT and label files, nnU-Net's models to runs.

`images` writes series, alone or a whole tree of them; `structures` makes label maps of annotations; `drawing` makes
annotations of label maps; `nnunet` makes a run of a trained model. Nothing that identifies a patient goes into NIfTI
files or tables; a SEG or RTSTRUCT carries what its source carries.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from medseg.conversion.drawing import draw
from medseg.conversion.images import convert_series, convert_tree
from medseg.conversion.options import Options, form_of, is_file_name
from medseg.conversion.structures import convert_annotation
from medseg.data.layouts import is_annotation
from medseg.errors import Code, MedsegError
from medseg.formats.content import Kind, kind_of
from medseg.formats.dicom.archive import is_zip
from medseg.formats.dicom.export import Form

__all__ = ["Options", "convert"]


def convert(source: Path, target: Path, console: Console, options: Options) -> list[Path]:
    """Convert a file, a series or a tree.

    Args:
        source: a DICOM series, tree or zip; a SEG or RTSTRUCT file; a NIfTI label; a model that nnU-Net trained.
        target: a file, told by its ending, or a folder.
        console: where the user reads.
        options: how.
    Returns:
        The images, labels and annotations, or the files of a run, that were written.
    Raises:
        MedsegError: E_MISSING, E_OUTPUT, E_GRID, E_LABEL, E_REFERENCE, and what readers and writers refuse. Where
            parts of a tree cannot be converted, after all others are written.
    """
    if not source.exists():
        raise MedsegError(Code.MISSING, "the input is not there", where=source.name, remedy="check the path")
    if _is_nnunet(source):
        from medseg.conversion.nnunet import convert_model  # here, because it imports torch and nothing else does

        given = {"image": options.image, "format": options.form, "labels": options.labels, "separate": options.separate}
        _refuse_unused("a model of nnU-Net", **given)
        return convert_model(source, target, console, orientation=options.orientation, overwrite=options.overwrite)
    _refuse_unused("anything but a model of nnU-Net", orientation=options.orientation)
    form = form_of(target, options.form)
    if not _is_dicom(source, options):
        _refuse_unused("a label file", separate=options.separate)
        return draw(source, target, console, options, form)
    if form is not Form.NIFTI:
        raise MedsegError(
            Code.OUTPUT,
            "a SEG or RTSTRUCT is made from a label file, and this is DICOM already",
            where=source.name,
            expected="medseg convert label.nii.gz out.seg.dcm --image SERIES",
            remedy="convert to .nii.gz first",
        )
    if is_annotation(source):
        return convert_annotation(source, target, console, options)
    _refuse_unused("DICOM images", image=options.image)
    if is_file_name(target):
        _refuse_unused("one series; give a folder as OUT", labels=options.labels, separate=options.separate)
        return convert_series(source, target, console, options)
    return convert_tree(source, target, console, options)


def _refuse_unused(what: str, **given: object) -> None:
    """Refuse options that would change nothing: who gives them expects something else."""
    unused = [f"--{name}" for name, value in given.items() if value]
    if unused:
        raise MedsegError(
            Code.CONFIG, f"{unused[0]} means nothing for {what}", where=unused[0], remedy="see medseg convert --help"
        )


def _is_nnunet(source: Path) -> bool:
    """True for a folder of nnU-Net's results, one of its folds, or a checkpoint."""
    if source.is_dir():
        return (source / "plans.json").is_file() or any(source.glob("checkpoint_*.pth"))
    return source.suffix == ".pth"


def _is_dicom(source: Path, options: Options) -> bool:
    if source.is_dir() or is_zip(source):
        return True
    kind = kind_of(source)
    return kind is Kind.DICOM or (kind is None and options.reading.without_preamble)
