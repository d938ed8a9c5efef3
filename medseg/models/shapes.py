"""Networks without values: built and run for their shapes alone.

`torch.device("meta")` does the same, but loads torch's compiler (a second and more of every start) on its first tensor,
and takes as long again for each convolution and normalisation, whose shapes it finds in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_IN_PLACE = frozenset(
    getattr(_aten, name).default for name in ("uniform_", "normal_", "zero_", "relu_", "leaky_relu_", "elu_")
) | {_aten.fill_.Scalar, _aten.add_.Tensor}
"""What changes values in place: there are none."""


class ShapesOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, new tensors have a shape and no values (torch's meta device), and what is computed of them as well.

    Whatever asks for a value (`item`, `if tensor:`) raises, as on that device. What the usual networks consist of is
    answered here; all else by torch itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by torch when this class is made: no, for that is what would load the compiler."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch calls for each operation."""
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if function is _aten.cat.default and all(_is_shape_alone(value) for value in first):
            shape = _joined(*args, **kwargs)
            return function(*args, **kwargs) if shape is None else first[0].new_empty(shape)
        if not _is_shape_alone(first):
            return function(*args, **({**kwargs, "device": "meta"} if _makes_tensor(function, args) else kwargs))
        if function in _IN_PLACE:
            return first
        if function is _aten.convolution.default and (shape := _convolved(*args, **kwargs)) is not None:
            return first.new_empty(shape)
        if function is _aten.repeat.default and len(args[1]) == first.dim():  # of the weights of instance normalisation
            return first.new_empty([n * times for n, times in zip(first.shape, args[1], strict=True)])
        if function is _aten.native_batch_norm.default and args[5]:  # training: with the mean and deviation of channels
            return first.new_empty(first.shape), *(first.new_empty(first.shape[1]) for _ in range(2))
        if function is _aten.add.Tensor and _is_shape_alone(args[1]) and first.shape == args[1].shape:
            return first.new_empty(first.shape)
        return function(*args, **kwargs)


def _is_shape_alone(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _makes_tensor(function: Any, args: Sequence[object]) -> bool:
    """Whether an operation makes a tensor of none: torch.empty and its like."""
    names = (argument.name for argument in function._schema.arguments)
    is_read = function is _aten.linspace.default  # MONAI's rates of drop path: small, and looked at
    return not any(isinstance(value, Tensor) for value in args) and "device" in names and not is_read


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> list[int] | None:
    """Shape of the result of torch.cat; None where torch has to say what is wrong, or knows of an exception."""
    shape = list(tensors[0].shape)
    for tensor in tensors[1:]:
        if tensor.dtype != tensors[0].dtype or tensor.dim() != len(shape):
            return None
        shape[dim] += tensor.shape[dim]
    fit = all(tensor.shape[axis] == n for axis, n in enumerate(shape) for tensor in tensors if axis != dim % len(shape))
    return shape if fit else None


def _convolved(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> list[int] | None:
    """Shape of the result of a convolution; None where torch has to say what is wrong.

    Source:
        torch.nn.Conv3d and ConvTranspose3d, section "Shape".
    """
    if image.dim() != weight.dim() or image.shape[1] != (weight.shape[0] if transposed else weight.shape[1] * groups):
        return None
    shape = [image.shape[0], weight.shape[1] * groups if transposed else weight.shape[0]]
    for axis, length in enumerate(image.shape[2:]):
        reach = dilation[axis] * (weight.shape[2 + axis] - 1)
        if transposed:
            shape.append((length - 1) * stride[axis] - 2 * padding[axis] + reach + output_padding[axis] + 1)
        else:
            shape.append((length + 2 * padding[axis] - reach - 1) // stride[axis] + 1)
    return shape if min(shape) > 0 else None
