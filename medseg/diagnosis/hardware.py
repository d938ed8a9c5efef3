"""Cores, memory, devices, and the precisions that they really have."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import conv3d

from medseg.data.memory import CGROUP, available_bytes
from medseg.device import choose_device, choose_precision, cpu_has_bf16
from medseg.diagnosis.check import Check, fail, gib, in_short, ok, warn
from medseg.environment import driver, processor, usable_cores
from medseg.errors import MedsegError

LITTLE_MEMORY = 4 * 2**30
"""Free main memory below which most scans will not fit, beside torch itself."""
TAKEN = 0.5
"""Share of a GPU's memory that others hold, from which on it is said."""
TOLERANCES = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 1e-2}
"""Relative error of a result, as a norm: some units of the last place of each format; fp32 may be TF32 on a GPU."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cores() -> Check:
    """Cores that may be used, containers' limits respected, and threads that are used."""
    usable, quota, threads = usable_cores(), cpu_quota(), torch.get_num_threads()
    found = f"{processor()}: {usable} of {os.cpu_count()} cores, {threads} threads"
    limit = float(usable)
    if quota is not None:
        found += f", at most {quota:g} cores' time (container)"
        limit = min(limit, quota)
    whole = max(1, int(limit))
    if threads > limit + 0.5:
        remedy = f"more threads than cores stand in each other's way: export OMP_NUM_THREADS={whole}"
        return warn("cores", found, remedy)
    if threads < whole / 2 and threads < 4:
        return warn("cores", found, f"few threads for these cores: unset OMP_NUM_THREADS, or set it to {whole}")
    return ok("cores", found)


def cpu_quota() -> float | None:
    """Cores' time that a container may take; None without a limit. From Linux's control groups of version 2 or 1."""
    try:
        if (CGROUP / "cpu.max").is_file():
            quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # not there; "max": no limit
        return None
    return cores if cores > 0 else None  # -1: no limit


def memory() -> Check:
    """Main memory, containers' limits respected."""
    free = available_bytes()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{gib(free)} free of {gib(total)}"
    if free < LITTLE_MEMORY:
        remedy = "close other programs, or give the container more (docker run --memory): large scans will not fit"
        return warn("main memory", found, remedy)
    return ok("main memory", found)


def devices(name: str) -> tuple[list[Check], torch.device]:
    """The CUDA devices with their memory, or why there are none; and the device that will be taken.

    Args:
        name: the device that must be there; "auto" takes what there is.
    """
    try:
        chosen = choose_device(name)
    except MedsegError as error:
        return [fail("device", f"{error.message}: {error.got}", error.remedy or "")], torch.device("cpu")
    if torch.cuda.is_available():
        return [_gpu(number) for number in range(torch.cuda.device_count())], chosen
    there = driver()
    if there is None:
        return [ok("device", "CPU; no NVIDIA driver is loaded")], chosen
    if torch.version.cuda is None:
        remedy = "pip install torch torchvision, from an index with CUDA builds"
        return [warn("device", f"CPU: there is a GPU (driver {there}), but torch is built for CPUs", remedy)], chosen
    found = f"CPU: driver {there} is loaded, but torch (for CUDA {torch.version.cuda}) finds no GPU"
    remedy = "update the driver, or give the container its GPU (docker run --gpus all); see nvidia-smi"
    return [warn("device", found, remedy)], chosen


def _gpu(number: int) -> Check:
    name = f"cuda:{number}"
    try:
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
    except RuntimeError as error:
        return fail(
            name, in_short(error), "see nvidia-smi; restart the GPU's driver, or choose another by device=cuda:N"
        )
    found = f"{torch.cuda.get_device_name(number)} (compute {major}.{minor}), {gib(free)} free of {gib(total)}"
    if free < (1 - TAKEN) * total:
        return warn(name, found, "another program holds the rest: see nvidia-smi, or choose another by device=cuda:N")
    return ok(name, found)


def precisions(device: torch.device) -> list[Check]:
    """Which precisions a device really has: each is tried on a convolution, its gradients and a product of matrices."""
    auto = choose_precision("auto", device)
    checks = []
    for name in ("fp32", "bf16", "fp16"):
        if name == "fp16" and device.type == "cpu":
            continue  # not on offer there
        try:
            worst = relative_error(name, device)
        except (RuntimeError, NotImplementedError) as error:
            found, needed = f"{name} does not work: {in_short(error)}", name in (auto, "fp32")
            remedy = "install a build of torch for this device" if name == "fp32" else "set precision=fp32"
            checks.append((fail if needed else warn)(f"{name} on {device}", found, remedy))
            continue
        if not worst <= TOLERANCES[name]:
            found = f"wrong results: off by {worst:.2g}, at most {TOLERANCES[name]:g} was expected"
            remedy = "do not trust this device with this torch: update both, or take another device or precision"
            checks.append(fail(f"{name} on {device}", found, remedy))
            continue
        notes = ["auto takes it"] if name == auto else []
        if name == "bf16" and device.type == "cpu" and not cpu_has_bf16():
            notes.append("this processor has no instructions for it: slower than fp32")
        checks.append(ok(f"{name} on {device}", "; ".join(["works", *notes])))
    return checks


def relative_error(precision: str, device: torch.device) -> float:
    """The largest relative error, as a norm, of what a training step computes in a precision, against float64.

    Raises:
        RuntimeError: the device cannot do it.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 8, 10, 10, 10, generator=generator)
    weight = torch.randn(16, 8, 3, 3, 3, generator=generator) / 15  # the square root of a filter's 216 weights
    mixing = torch.randn(16, 16, generator=generator) / 4
    exact = _step(image.double(), weight.double(), mixing.double())
    on_device = [tensor.to(device) for tensor in (image, weight, mixing)]
    with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
        got = _step(*on_device)
    errors = [(g.double().cpu() - e).norm() / e.norm() for g, e in zip(got, exact, strict=True)]
    return float(torch.stack(errors).nan_to_num(nan=torch.inf).max())


def _step(image: Tensor, weight: Tensor, mixing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution and a product of matrices, and the gradients of both."""
    weight, mixing = weight.detach().requires_grad_(), mixing.detach().requires_grad_()
    result = conv3d(image, weight, padding=1).flatten(2).transpose(1, 2) @ mixing
    of_weight, of_mixing = torch.autograd.grad(result.to(image.dtype).square().mean(), (weight, mixing))
    return result.detach(), of_weight, of_mixing


def compiling(device: torch.device) -> Check:
    """Whether torch.compile has what it needs."""
    if device.type != "cuda":
        return ok("torch.compile", "not used on CPUs")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    found = [] if find_spec("triton") else ["no triton"]
    found += [] if compiler else ["no C compiler"]
    if found:
        remedy = "trainings run uncompiled, and slower: install gcc, and torch with triton (Linux)"
        return warn("torch.compile", ", ".join(found), remedy)
    return ok("torch.compile", f"triton and a C compiler ({Path(str(compiler)).name})")
