"""A fingerprint of a model's weights that survives moving, compiling and wrapping."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_PREFIXES = ("module.", "_orig_mod.")


def weights_hash(model: object) -> str | None:
    """Hash all parameters and buffers of a module, or return None where there are none.

    The hash covers names, dtypes, shapes and values. It ignores the device, the memory layout,
    and the prefixes that DataParallel (``module.``) and torch.compile (``_orig_mod.``) add.

    Args:
        model: any object; only an ``nn.Module`` with state has a hash.

    Returns:
        ``sha256:`` and 64 hexadecimal digits, or None.

    Example:
        >>> weights_hash(nn.Linear(2, 2)) == weights_hash(nn.Linear(2, 2))
        False
        >>> weights_hash(lambda x: x) is None
        True
    """
    if not isinstance(model, nn.Module):
        return None
    # A list and not a dict: two names may differ by their prefix alone.
    state = sorted(
        ((_bare(name), name, value) for name, value in model.state_dict().items()),
        key=lambda item: item[:2],
    )
    tensors = [(name, value) for name, _, value in state if isinstance(value, torch.Tensor)]
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name, value in tensors:
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _bare(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name
