"""Batches from the sampler onto the device."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import torch

from medseg.data.sampling import BatchItem


def on_device(batches: Generator[BatchItem, None, None], device: torch.device) -> Generator[BatchItem, None, None]:
    """The same batches on a device; closing this closes them.

    On CUDA each is copied out of pinned memory in a stream of its own. Nothing waits for it but the step that uses it,
    on the GPU: while the GPU still works on the last step, the next batch is under way.

    Args:
        batches: (step, image, label) in the computer's memory.
        device: where they go.
    """
    with closing(batches):
        if device.type != "cuda":
            for step, image, label in batches:
                yield step, image.to(device), label.to(device)
            return
        copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        for step, image, label in batches:
            with torch.cuda.stream(copying):
                moved = [tensor.pin_memory().to(device, non_blocking=True) for tensor in (image, label)]
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(copying)
            for tensor in moved:
                tensor.record_stream(computing)  # its memory is not taken again before the step is done with it
            yield step, moved[0], moved[1]
