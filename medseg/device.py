"""Which device and precision a run uses, and what has to be avoided on it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from medseg.errors import Code, MedsegError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's parameters of `mallopt` (malloc.h)."""
_LARGEST = (2**31 - 1, 2**25)
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
Determinism = Literal["off", "warn", "strict"]
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""A workspace of fixed size for cuBLAS, without which its results may differ from run to run (its manual: results
reproducibility)."""
_REFUSED = "does not have a deterministic implementation"
"""How PyTorch says that an operation was refused; the operation stands before it."""


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" takes CUDA where it is there.

    Raises:
        MedsegError: E_CONFIG if the device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MedsegError(
            Code.CONFIG,
            f"there is no device {name!r} on this machine",
            where="device",
            expected="auto, cpu, cuda or cuda:N",
            got=str(error).splitlines()[0],
            remedy="device=auto takes the GPU where there is one, else the CPU",
        ) from error
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """The precision of a name; "auto" takes bf16 where the processor computes in it, else fp32.

    Raises:
        MedsegError: E_CONFIG for an unknown name, or fp16 on a CPU.
    """
    if name not in PRECISIONS or (name == "fp16" and device.type == "cpu"):
        raise MedsegError(
            Code.CONFIG,
            f"precision {name!r} is not on offer on {device.type}",
            where="precision",
            expected=", ".join(p for p in PRECISIONS if device.type != "cpu" or p != "fp16"),
            got=name,
        )
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions (AVX512-BF16 or AMX); without them bf16 is slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextmanager
def deterministic(choice: Determinism) -> Iterator[None]:
    """While the block runs, the same work gives the same bits on the same machine; it concerns the whole process.

    On CPUs nothing that medseg does needs it; on CUDA sums are otherwise made in whatever order threads come
    (docs/reproducibility.md has the list).

    Args:
        choice: "off" leaves everything as it is; "warn" takes deterministic algorithms where there are any, and warns
            of each operation that has none; "strict" refuses these.
    Raises:
        MedsegError: E_CONFIG, when the block runs into an operation that "strict" refuses.
    """
    if choice == "off":
        yield
        return
    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    flags = (cudnn.deterministic, cudnn.benchmark)
    os.environ.setdefault(*_CUBLAS)  # is read when the first product of matrices on the device is made
    torch.use_deterministic_algorithms(True, warn_only=choice == "warn")
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(_REFUSED)
        if not found:
            raise
        raise MedsegError(
            Code.CONFIG,
            "an operation of this training has no deterministic form on this device",
            where=f"trainer.deterministic={choice}",
            got=operation.split()[-1],
            remedy="docs/reproducibility.md says which parts avoid it; trainer.deterministic=warn goes on with it",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = flags


def keep_freed_memory() -> bool:
    """Make glibc keep what is freed for what comes next; it concerns the whole process.

    A step on a CPU makes and frees the same maps of some 50 MB again and again. glibc takes blocks of more than 32 MB
    from the kernel and gives them back at once, so each map is cleared and mapped anew, page by page, in the kernel's
    time. Kept, the memory stays with the process between steps, validations and scans. Prediction gains as well.

    Returns:
        Whether it could be set: elsewhere than on Linux with glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    # Older versions take no more than 32 MiB. Without the first the second would do harm: it ends glibc's own rule, by
    # which blocks are kept once they were freed.
    return any(mallopt(_MMAP_THRESHOLD, largest) for largest in _LARGEST) and bool(mallopt(_TRIM_THRESHOLD, -1))


def explicit_padding(device: torch.device) -> AbstractContextManager[Any]:
    """For the forward pass of training: on CPUs, maps too small for a filter are padded before they are convolved.

    PyTorch leaves convolutions on CPUs to oneDNN. Where a filter lies nowhere wholly inside a map (3x3x3 on maps 2
    voxels deep, padded), oneDNN's gradient of the weights comes from beyond the map, so from memory that nobody wrote:
    mostly wrong numbers, sometimes NaN; for some sizes memory is overwritten. Seen with oneDNN 3.12 (PyTorch 2.13):
    bf16 in its primitive jit_bf16:avx512_core_bf16, whose compute_od_loop_common() moves on to the next slice while
    the filter still touches the padding; fp32 with filters of 7. On data that is padded already, the same sums come
    out right. Results are the same either way; larger maps and other devices stay as they are.

    Args:
        device: of the model.
    """
    return _ExplicitPadding() if device.type == "cpu" else nullcontext()


class _ExplicitPadding(TorchFunctionMode):
    """Sees every convolution, also those in the networks of other packages."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        substitute = _SUBSTITUTES.get(func)
        if substitute is None:
            return func(*args, **(kwargs or {}))
        return substitute(func, *args, **(kwargs or {}))


def _convolution(
    convolve: Callable[..., Tensor],
    input: Tensor,  # PyTorch's names, because arguments come by name too
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """The convolution, without padding of its own where the map is too small."""
    num_axes = weight.dim() - 2
    extents, strides = _extents(weight, dilation), _each(stride, num_axes)
    if padding == "same":
        sides = [((e - 1) // 2, e // 2) for e in extents]
    else:
        sides = [(p, p) for p in _each(0 if isinstance(padding, str) else padding, num_axes)]
    lengths = input.shape[-num_axes:]
    if all(_fits_inside(n, e, s, p) for n, e, s, (p, _) in zip(lengths, extents, strides, sides, strict=True)):
        return convolve(input, weight, bias, stride, padding, dilation, groups)
    padded = pad(input, [p for side in reversed(sides) for p in side])  # PyTorch starts at the last axis
    return convolve(padded, weight, bias, stride, 0, dilation, groups)


def _transposed_convolution(
    convolve: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The transposed convolution; where its result is too small, cut out of the result without padding."""
    num_axes = weight.dim() - 2
    extents, strides = _extents(weight, dilation), _each(stride, num_axes)
    paddings, added = _each(padding, num_axes), _each(output_padding, num_axes)
    sizes = zip(input.shape[-num_axes:], extents, strides, paddings, added, strict=True)
    if all(_fits_inside((n - 1) * s - 2 * p + e + o, e, s, p) for n, e, s, p, o in sizes):
        return convolve(input, weight, bias, stride, padding, output_padding, groups, dilation)
    result = convolve(input, weight, bias, stride, 0, output_padding, groups, dilation)
    for axis, p in enumerate(paddings, start=-num_axes):
        result = result.narrow(axis, p, result.shape[axis] - 2 * p)
    return result


def _fits_inside(length: int, extent: int, stride: int, padding: int) -> bool:
    """Whether the filter, which starts at -padding and moves in strides, lies wholly inside the map somewhere."""
    return -padding % stride + extent <= length


def _extents(weight: Tensor, dilation: int | Sequence[int]) -> list[int]:
    """Voxels that a filter spans along each axis."""
    return [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], _each(dilation, weight.dim() - 2), strict=True)]


def _each(value: int | Sequence[int], num_axes: int) -> Sequence[int]:
    """One number for each axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * num_axes if len(values) == 1 else values


_SUBSTITUTES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    torch.conv_transpose2d: _transposed_convolution,
    torch.conv_transpose3d: _transposed_convolution,
}
