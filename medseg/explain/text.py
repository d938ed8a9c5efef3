"""The table of layers for the terminal, and how layers and numbers are called in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medseg.explain.layers import ELEMENT_BYTES, FILTERING, Layer, LayerTable

WIDE = 118
"""Columns of a terminal that holds all columns of the table."""
FOLLOWING = ("normalisation", "activation")
"""Kinds of layers that stand in the row of what they follow."""
WHOLE = "all"
"""Of receptive fields: the whole image, or not known."""
_MIB = 2**20
_NAMES = {
    "cat": "concat", "concat": "concat", "concatenate": "concat", "add": "add", "radd": "add", "iadd": "add",
    "sub": "subtract", "mul": "multiply", "rmul": "multiply", "imul": "multiply", "batch_norm": "batch norm",
    "instance_norm": "instance norm", "group_norm": "group norm", "layer_norm": "layer norm",
    "leaky_relu": "leaky ReLU",
    "relu": "ReLU", "relu6": "ReLU6", "elu": "ELU", "prelu": "PReLU", "silu": "SiLU", "gelu": "GELU",
    "scaled_dot_product_attention": "attention",
    "interpolate": "interpolation", "linear": "linear",
}  # fmt: skip
_LETTERS = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def print_layers(table: LayerTable, console: Console, *, precision: str = "fp32", every: bool = False) -> None:
    """Print the layers, stage by stage, with their sums.

    Args:
        table: the layers.
        console: where the user reads; narrow ones get fewer columns.
        precision: of the feature maps, for their memory.
        every: a row for each normalisation and activation too, instead of one with what they follow.
    """
    wide = console.width >= WIDE
    element = ELEMENT_BYTES[precision]
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    view.add_column("layer", overflow="fold")
    view.add_column("does", overflow="fold", min_width=16 if wide else 10)
    more = ("unshared", "dense", "mult-adds") if wide else ("mult-\nadds",)
    for title in ("gives", "sees", "jump", "weights", *more, "MiB"):
        view.add_column(title, justify="right", no_wrap=True)
    for stage in table.stages:
        layers = table.of_stage(stage)
        for row in _rows(layers, every=every):
            first = row[0]
            does = " + ".join(_what(layer) for layer in row)
            view.add_row(escape(_below(first.name, stage)), escape(does), *_numbers(row, element, wide))
        view.add_row(f"[bold]{escape(stage or 'network')}[/bold]", "", *_numbers(layers, element, wide), style="dim")
        view.add_section()
    view.add_row("[bold]in all[/bold]", "", *_numbers(table.layers, element, wide))
    console.print(
        f"image {times((table.in_channels, *table.size))} → {times(table.layers[-1].output)}", highlight=False
    )
    console.print(view)
    console.print(_legend(table, precision, wide), highlight=False, style="dim")


def _legend(table: LayerTable, precision: str, wide: bool) -> str:
    lines = [
        "F filter size, S stride, P padding: a convolution gives (N − F + 2P) / S + 1 voxels along an axis of N.",
        f"sees: receptive field in voxels of the image ({WHOLE}: the whole image, or not known); jump: voxels of the "
        "image from one voxel of the map to the next.",
        f"MiB: feature maps of one image in {precision} that take memory of their own.",
    ]
    if wide:
        lines.append(
            "unshared: weights if each place had filters of its own; dense: if each number of the result were "
            "connected to each of the input."
        )
    else:
        lines.append(f"From {WIDE} columns on, and in JSON: also the weights without weight sharing.")
    if table.weights_elsewhere:
        lines.append(
            f"{table.weights_elsewhere:,} of {table.weights:,} weights stand in no layer: heads that only training "
            "uses (deep supervision), or numbers that are looked up or added."
        )
    return "\n".join(lines)


def short_name(layer: Layer) -> str:
    """What a layer is, in a word or two."""
    if layer.kind == "convolution":
        return "conv"
    if layer.kind == "transposed convolution":
        return "transposed conv"
    if layer.kind in ("pooling", "unpooling"):
        what = layer.function.removeprefix("adaptive_").partition("_")[0].replace("avg", "mean").removeprefix("a")
        return f"{'global ' if math.prod(layer.output[1:]) <= 1 else ''}{what} {layer.kind.removesuffix('ing')}"
    if layer.function == "linear" and len(layer.inputs[0]) == 1:
        return "fully connected"
    return _NAMES.get(layer.function, layer.function.replace("_", " "))


def times(numbers: Iterable[object]) -> str:
    """Sizes along axes, with ×."""
    return "×".join(str(number) for number in numbers)


def quantity(number: float) -> str:
    """A number with three digits and a letter for thousands, millions, …"""
    for letter in _LETTERS:
        if abs(number) < 999.5 or letter == _LETTERS[-1]:
            break
        number /= 1000
    return f"{number:.3g} {letter}".rstrip() if letter or number == int(number) else f"{number:.3g}"


def _rows(layers: Sequence[Layer], *, every: bool) -> list[list[Layer]]:
    """Layers that share a row."""
    rows: list[list[Layer]] = []
    for layer in layers:
        if rows and not every and layer.kind in FOLLOWING:
            rows[-1].append(layer)
        else:
            rows.append([layer])
    return rows


def _what(layer: Layer) -> str:
    name = short_name(layer)
    if layer.window is None:
        return name
    words = [f"{name} {_same(layer.window.kernel)}"]
    if max(layer.window.stride) > 1:
        words.append(f"S {_same(layer.window.stride)}")
    if max(layer.window.padding) > 0:
        words.append(f"P {_same(layer.window.padding)}")
    return ", ".join(words)


def _numbers(layers: Sequence[Layer], element: int, wide: bool) -> list[str]:
    last = layers[-1]
    weights = sum(layer.weights for layer in layers)
    filtering = any(layer.kind in FILTERING for layer in layers)
    unshared, dense = (sum(getattr(layer, of) for layer in layers) for of in ("weights_unshared", "weights_dense"))
    macs = sum(layer.macs for layer in layers)
    return [
        times(last.output),
        _same(WHOLE if n is None else n for n in last.field),
        _same("–" if jump is None else f"{jump:g}" for jump in last.jump),
        quantity(weights) if weights else "",
        *((quantity(unshared), quantity(dense)) if wide and filtering else ("", "") if wide else ()),
        quantity(macs) if macs else "",
        _mebibytes(element * sum(layer.elements for layer in layers)),
    ]


def _mebibytes(number: int) -> str:
    """Without digits that nobody needs, for they cost columns."""
    size = number / _MIB
    return f"{size:.0f}" if size >= 99.5 else f"{size:.3g}" if size >= 1 else f"{size:.2f}" if size >= 0.005 else "0"


def _same(numbers: Iterable[object]) -> str:
    """One number where all axes have the same."""
    texts = [str(number) for number in numbers]
    return texts[0] if len(set(texts)) == 1 else times(texts)


def _below(name: str, stage: str) -> str:
    return name.removeprefix(stage).lstrip(".") or "·"
