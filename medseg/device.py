"""Which device and precision a run uses."""

from __future__ import annotations

import torch

from medseg.errors import Code, MedsegError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


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
