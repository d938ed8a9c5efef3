"""A network's forward pass, compiled where that is wanted and works."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from medseg.errors import Code, MedsegError

log = logging.getLogger(__name__)

Compile = Literal["auto", "on", "off"]
"""Whether to compile; "auto" where it pays, which training and prediction each know for themselves."""


class Forward:
    """Calls a network, through its compiled form if wanted; where that cannot be made, plainly and with a note.

    The network itself stays as it is: its weights keep their names, and what has other sizes can use it uncompiled.

    Args:
        model: the network.
        compiled: whether to compile it.
        must: a network that cannot be compiled is refused instead.
        option: how the user asked for it, for the refusal.
        after: calls that go through the network itself before it is compiled.

    Attributes:
        largest_batch: more than so many images at once do not fit into the memory; None as long as nobody found out.
    """

    def __init__(
        self, model: nn.Module, *, compiled: bool, must: bool, option: str = "trainer.compile=on", after: int = 0
    ) -> None:
        self.model, self.compiled, self.must, self.option, self.after = model, compiled, must, option, after
        self.largest_batch: int | None = None
        self._call: Callable[[torch.Tensor], Any] = model

    def __call__(self, image: torch.Tensor) -> Any:
        """What the network gives for (N, C, *P).

        Raises:
            MedsegError: E_CONFIG if the network cannot be compiled but must be.
        """
        if not self.compiled:
            return self.model(image)
        if self.after > 0:
            self.after -= 1
            return self.model(image)
        try:
            if self._call is self.model:
                self._call = torch.compile(self.model)
            return self._call(image)
        except _compiler_errors() as error:
            reason = " ".join(str(error).split())[:300]
            if self.must:
                raise MedsegError(
                    Code.CONFIG,
                    "the network cannot be compiled on this machine",
                    where=self.option,
                    got=reason,
                    remedy=f"{self.option.removesuffix('on')}auto goes on without; on a CPU a C++ compiler is needed",
                ) from error
            log.warning("the network cannot be compiled here and runs as it is: %s", reason)
            self.compiled = False
            return self.model(image)


def _compiler_errors() -> type[Exception]:
    """What torch raises where it cannot compile; its compiler takes a second to import, and mostly nobody needs it."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException
