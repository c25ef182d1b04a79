"""The base of everything fitted: modules whose float64 buffers survive ``.half()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class KeepDouble(nn.Module):
    """A module whose float64 buffers move between devices and never change their dtype.

    A threshold or a temperature that was fitted in float64 must not be rounded because somebody
    calls ``.half()`` on the module that holds it.

    Example:
        >>> module = KeepDouble()
        >>> module.register_buffer("cut", torch.zeros((), dtype=torch.float64))
        >>> module.half().cut.dtype
        torch.float64
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype == torch.float64 and moved.dtype != torch.float64:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
