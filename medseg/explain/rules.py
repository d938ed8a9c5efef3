"""What each of torch's functions does to receptive fields, and which of them are layers.

A function that is not known here may let every voxel depend on every other one, so that a receptive field is never
stated smaller than it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from medseg.explain.reach import Reach

Axes = tuple[int, ...]
Reaches = tuple[Reach | None, ...]
"""One for each spatial axis; None: the whole image, or not known."""

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
POOLS = frozenset(
    {
        "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d",
    }
)  # fmt: skip
UNPOOLS = frozenset({"max_unpool2d", "max_unpool3d"})
ADAPTIVE_POOLS = frozenset({"adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d"})
REDUCTIONS = frozenset({"mean", "sum", "amax", "amin"})
"""Pooling where they leave no place of the image, as the mean over the axes of the image does."""
NORMALISATIONS = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm"})
ACTIVATIONS = frozenset(
    {
        "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid",
        "tanh", "softplus", "hardtanh", "hardswish", "hardsigmoid",
    }
)  # fmt: skip
PRODUCTS = frozenset({"linear", "matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"})
"""They mix what stands along one axis, which need not be one of the image's."""
MERGES = frozenset(
    {"cat", "concat", "concatenate", "add", "radd", "iadd", "sub", "mul", "rmul", "imul", "maximum", "minimum"}
)
SAME_PLACE = frozenset(
    {
        "dropout", "dropout2d", "dropout3d", "clone", "contiguous", "to", "type_as", "float", "detach", "identity",
        "div", "truediv", "neg", "rsub", "pow", "exp", "sqrt", "abs", "clamp", "clip", "softmax", "chunk", "split",
        "unbind", "stack", "view", "reshape", "flatten", "unsqueeze", "squeeze", "expand",
        "unflatten",
        "repeat", "tile",
    }
)  # fmt: skip
"""With the activations and merges: voxels depend on the same place only, where the spatial axes stay as they are."""


@dataclass(frozen=True)
class Window:
    """F, S and P of a layer, one number for each axis, as in (N − F + 2P) / S + 1.

    Args:
        kernel: F, without the gaps of a dilated filter.
        stride: S.
        padding: P.
        dilation: distance of the taps; the filter reaches over dilation · (F − 1) + 1 voxels.
    """

    kernel: Axes
    stride: Axes
    padding: Axes
    dilation: Axes

    @property
    def extent(self) -> Axes:
        """Voxels that the filter reaches over."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))


def plain_name(function: Any) -> str:
    """The name of a function, of an operator and of what works in place alike: "add" of `__iadd__` and `add_`."""
    return str(getattr(function, "__name__", "")).strip("_")


def window_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], num_axes: int) -> Window | None:
    """F, S and P of a convolution, transposed convolution, pooling or unpooling; None of other functions."""
    names: tuple[str, ...]
    if name in CONVOLUTIONS:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    elif name in TRANSPOSED:
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    elif name in POOLS:
        names = ("input", "kernel_size", "stride", "padding", "dilation" if name.startswith("max") else "ceil_mode")
    elif name in UNPOOLS:
        names = ("input", "indices", "kernel_size", "stride", "padding")
    else:
        return None
    given = _named(names, args, kwargs)
    pools = name in POOLS or name in UNPOOLS
    kernel = given["kernel_size"] if pools else tuple(given["weight"].shape[2:])
    kernel = _each(kernel, num_axes)
    dilation = _each(given.get("dilation") or 1, num_axes)
    stride = given.get("stride") or (kernel if pools else 1)
    padding = given.get("padding") or 0
    if padding == "same":  # odd filters; of even ones torch pads one voxel more at the far end
        padding = tuple((d * (k - 1)) // 2 for k, d in zip(kernel, dilation, strict=True))
    return Window(kernel, _each(stride, num_axes), _each(0 if padding == "valid" else padding, num_axes), dilation)


def reaches_after(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[tuple[Tensor, Reaches]], output: Tensor
) -> Reaches:
    """The receptive field of a function's result.

    Args:
        name: `plain_name` of it.
        args: its arguments.
        kwargs: its named arguments.
        inputs: those of its arguments that depend on the image, with their own receptive fields.
        output: its result.
    """
    num_axes = len(inputs[0][1])
    unknown: Reaches = (None,) * num_axes
    source, reaches = inputs[0]
    if output.dim() < num_axes + 1 or source.dim() < num_axes + 1:
        return unknown
    window = window_of(name, args, kwargs, num_axes)
    if window is not None:
        back = name in TRANSPOSED or name in UNPOOLS
        if name in UNPOOLS:  # where a value goes is said by the other map: the places of the maxima
            reaches = _merged([r for _, r in inputs])
        steps = zip(reaches, window.extent, window.stride, window.padding, strict=True)
        return tuple(
            r and (r.transposed(f, stride=s, padding=p) if back else r.windowed(f, stride=s, padding=p))
            for r, f, s, p in steps
        )
    if name == "interpolate":
        return _interpolated(args, kwargs, reaches, source, output)
    if name == "repeat_interleave":
        return _repeated(args, kwargs, reaches, source)
    if name in ADAPTIVE_POOLS or name in REDUCTIONS:
        return _pooled(name, args, kwargs, reaches, source, output)
    if name in ("narrow", "getitem", "pad"):
        return _moved(name, args, kwargs, reaches, source, output)
    known = MERGES | SAME_PLACE | ACTIVATIONS | NORMALISATIONS
    if name not in known or not _keeps_axes(name, args, kwargs, source, num_axes):
        return unknown
    of_output = _spatial(output, num_axes)
    if name in MERGES:
        return _merged([_spread(t, r, of_output) for t, r in inputs])
    same = all(_spatial(t, num_axes) == of_output for t, _ in inputs)
    return _merged([r for _, r in inputs]) if same else unknown


def _spread(tensor: Tensor, reaches: Reaches, output: Axes) -> Reaches:
    """Of a map that is merged: None along axes where one voxel is spread over many, as a weight of a whole map is."""
    if tensor.dim() < len(reaches) + 1:
        return (None,) * len(reaches)
    lengths = _spatial(tensor, len(reaches))
    return tuple(reach if n == m else None for reach, n, m in zip(reaches, lengths, output, strict=True))


def _merged(inputs: Sequence[Reaches]) -> Reaches:
    """Of maps on one grid. What is not known of one of them is not known of the result, but for its grid."""
    merged: list[Reach | None] = []
    for of_axis in zip(*inputs, strict=True):
        known = [reach for reach in of_axis if reach is not None]
        reach = known[0] if known else None
        for other in known[1:]:
            reach = reach and reach.merged(other)
        merged.append(reach.everywhere() if reach and len(known) < len(of_axis) else reach)
    return tuple(merged)


def _keeps_axes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], source: Tensor, num_axes: int) -> bool:
    """Whether what works along one axis leaves those of the image alone."""
    if name not in ("cat", "concat", "concatenate", "softmax", "chunk", "split", "unbind", "stack"):
        return name != "layer_norm"  # over the last axes
    place = {"softmax": 1, "chunk": 2, "split": 2}.get(name, 1)
    dim = kwargs.get("dim", args[place] if len(args) > place else 0)
    return isinstance(dim, int) and dim % source.dim() < source.dim() - num_axes


def _interpolated(
    args: Sequence[Any], kwargs: Mapping[str, Any], reaches: Reaches, source: Tensor, output: Tensor
) -> Reaches:
    """After up-sampling by whole numbers."""
    num_axes = len(reaches)
    given = _named(("input", "size", "scale_factor", "mode", "align_corners"), args, kwargs)
    mode, corners = str(given.get("mode", "nearest")), bool(given.get("align_corners"))
    found: list[Reach | None] = []
    for reach, before, after in zip(reaches, _spatial(source, num_axes), _spatial(output, num_axes), strict=True):
        if reach is not None and mode == "nearest" and before % after == 0:
            found.append(reach.windowed(1, stride=before // after))
        elif reach is None or after % before or not ("linear" in mode or mode.startswith("nearest")):
            found.append(None)
        else:
            found.append(reach.interpolated(after // before, linear="linear" in mode, corners=corners))
    return tuple(found)


def _repeated(args: Sequence[Any], kwargs: Mapping[str, Any], reaches: Reaches, source: Tensor) -> Reaches:
    """After each voxel was repeated along one axis."""
    num_axes = len(reaches)
    given = _named(("input", "repeats", "dim"), args, kwargs)
    times, dim = given.get("repeats"), given.get("dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return (None,) * num_axes
    axis = dim % source.dim() - (source.dim() - num_axes)
    return tuple(r and (r.interpolated(times, linear=False) if a == axis else r) for a, r in enumerate(reaches))


def _pooled(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], reaches: Reaches, source: Tensor, output: Tensor
) -> Reaches:
    """After pooling to a number of voxels, or a mean over axes; along an axis with one voxel left, places are gone."""
    num_axes = len(reaches)
    if name in REDUCTIONS:
        dims = _named(("input", "dim"), args, kwargs).get("dim")
        dims = (dims,) if isinstance(dims, int) else tuple(dims or range(source.dim()))
        lead = source.dim() - num_axes
        if output.dim() != source.dim() and any(dim % source.dim() >= lead for dim in dims):
            return (None,) * num_axes
    found: list[Reach | None] = []
    for reach, n, m in zip(reaches, _spatial(source, num_axes), _spatial(output, num_axes), strict=True):
        if reach is None or n == m:
            found.append(reach)
        else:
            found.append(reach.windowed(n // m, stride=n // m) if m > 1 and n % m == 0 else None)
    return tuple(found)


def _moved(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], reaches: Reaches, source: Tensor, output: Tensor
) -> Reaches:
    """After cutting or padding."""
    num_axes = len(reaches)
    starts, steps = [0] * num_axes, [1] * num_axes
    if name == "narrow":
        given = _named(("input", "dim", "start", "length"), args, kwargs)
        axis = given["dim"] % source.dim() - (source.dim() - num_axes)
        if axis >= 0:
            starts[axis] = int(given["start"])
    elif name == "pad":
        given = _named(("input", "pad"), args, kwargs)
        for number, before in enumerate(given["pad"][::2]):
            if number < num_axes:
                starts[num_axes - 1 - number] = -int(before)
    else:
        slices = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(not isinstance(s, (slice, int)) and s is not Ellipsis for s in slices):
            return (None,) * num_axes
        if Ellipsis in slices:
            cut = slices.index(Ellipsis)
            slices = (*slices[:cut], *[slice(None)] * (source.dim() - len(slices) + 1), *slices[cut + 1 :])
        slices = (*slices, *[slice(None)] * (source.dim() - len(slices)))
        for axis, part in enumerate(slices[source.dim() - num_axes :]):
            if isinstance(part, int):
                return (None,) * num_axes
            starts[axis], _, steps[axis] = part.indices(_spatial(source, num_axes)[axis])
            if steps[axis] < 1:
                return (None,) * num_axes
    return tuple(
        r and r.windowed(1, stride=step, padding=-start) for r, start, step in zip(reaches, starts, steps, strict=True)
    )


def _named(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _spatial(tensor: Tensor, num_axes: int) -> Axes:
    return tuple(tensor.shape[tensor.dim() - num_axes :])


def _each(value: Any, num_axes: int) -> Axes:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * num_axes if len(values) == 1 else values
