"""The resolution stages of an encoder–decoder: filters, filter size and stride of each."""

from __future__ import annotations

from dataclasses import dataclass

from medseg.errors import Code, MedsegError
from medseg.models.blocks.dimensions import PerAxis, per_axis

NUM_STAGES = 5
"""Stages where nothing says how many."""
NARROWEST = 32
"""Filters of the first stage where nothing says otherwise; each further stage has twice as many (nnU-Net)."""
WIDEST = {2: 512, 3: 320}
"""Most filters of a stage by spatial_dims, where nothing says otherwise (nnU-Net)."""

MAX_IN_A_ROW = 100
"""Most convolutions or blocks of a stage: networks have up to a third of that, and what asks for a billion is refused
before a list of them fills the memory."""


@dataclass(frozen=True)
class Stage:
    """One resolution of a network."""

    width: int
    """K, the filters of its convolutions."""
    kernel: tuple[int, ...]
    """F, their size per axis; odd."""
    stride: tuple[int, ...]
    """S, the factor per axis from the stage above to this one."""


def check_stages(
    widths: tuple[int, ...] | None,
    kernels: tuple[PerAxis, ...] | None,
    strides: tuple[PerAxis, ...] | None,
) -> None:
    """Refuse stages that contradict each other.

    Raises:
        MedsegError: E_CONFIG if the lists differ in length, there are fewer than two stages, a width is not
            positive, or the first stride is not 1.
    """
    given = {"widths": widths, "kernels": kernels, "strides": strides}
    counts = {name: len(values) for name, values in given.items() if values is not None}
    if len(set(counts.values())) > 1 or any(count < 2 for count in counts.values()):
        raise MedsegError(
            Code.CONFIG,
            "widths, kernels and strides state different numbers of stages, or fewer than two",
            where="model." + ", model.".join(counts),
            expected="one number of stages, at least 2",
            got=", ".join(f"{count} {name}" for name, count in counts.items()),
        )
    if widths is not None and min(widths) < 1:
        raise MedsegError(Code.CONFIG, "a stage has no filters", where="model.widths", expected="> 0", got=widths)
    first = strides[0] if strides is not None else 1
    if any(s != 1 for s in (first if isinstance(first, tuple) else (first,))):
        raise MedsegError(
            Code.CONFIG,
            "the first stage works at the resolution of the image",
            where="model.strides",
            expected="stride 1 first",
            got=strides,
        )


def resolve_stages(
    widths: tuple[int, ...] | None,
    kernels: tuple[PerAxis, ...] | None,
    strides: tuple[PerAxis, ...] | None,
    spatial_dims: int,
) -> list[Stage]:
    """The stages, highest resolution first; None means the usual.

    Args:
        widths: K per stage; None doubles from `NARROWEST`, at most `WIDEST`.
        kernels: F per stage; None is 3.
        strides: S per stage; None is 1, then 2.
        spatial_dims: 2 or 3.
    Raises:
        MedsegError: E_CONFIG if a stage does not fit the number of axes, or a filter has even size.
    """
    num_stages = next((len(values) for values in (widths, kernels, strides) if values is not None), NUM_STAGES)
    widths = widths or tuple(min(NARROWEST * 2**i, WIDEST[spatial_dims]) for i in range(num_stages))
    kernels = kernels or (3,) * num_stages
    strides = strides or (1,) + (2,) * (num_stages - 1)
    stages = [
        Stage(
            width,
            per_axis(kernel, spatial_dims, where=f"model.kernels[{i}]"),
            per_axis(stride, spatial_dims, where=f"model.strides[{i}]"),
        )
        for i, (width, kernel, stride) in enumerate(zip(widths, kernels, strides, strict=True))
    ]
    for i, stage in enumerate(stages):
        if any(k % 2 == 0 for k in stage.kernel):
            raise MedsegError(
                Code.CONFIG,
                "a filter of even size has no centre",
                where=f"model.kernels[{i}]",
                expected="odd sizes",
                got=stage.kernel,
            )
    return stages


def per_stage(
    numbers: tuple[int, ...] | None, usual: tuple[int, ...], num_stages: int, *, where: str, at_least: int = 1
) -> tuple[int, ...]:
    """How many convolutions or blocks each stage has, highest resolution first.

    Args:
        numbers: one for each stage; None takes the usual.
        usual: those of the first stages; further ones have as many as the last.
        num_stages: stages there are.
        where: the key that states the numbers, for the message.
        at_least: the smallest number allowed.
    Raises:
        MedsegError: E_CONFIG if a list has another length, or a number is out of bounds.
    """
    if numbers is None:
        return tuple(usual[min(i, len(usual) - 1)] for i in range(num_stages))
    if len(numbers) != num_stages or min(numbers) < at_least or max(numbers) > MAX_IN_A_ROW:
        raise MedsegError(
            Code.CONFIG,
            f"{where} needs one number for each stage",
            where=where,
            expected=f"{num_stages} numbers from {at_least} to {MAX_IN_A_ROW}",
            got=numbers,
        )
    return numbers
