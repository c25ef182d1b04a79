"""Look through what PyTorch puts around a model: DataParallel, DDP, torch.compile, export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def unwrapped(model: Any) -> Any:
    """Return the model inside DataParallel, DistributedDataParallel and ``torch.compile``.

    Example:
        >>> inner = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(inner)) is inner
        True
    """
    *_, inner = _inwards(model)
    return inner


def is_exported(part: nn.Module) -> bool:
    """Whether a module is the ``.module()`` of an exported program.

    Its mode was fixed by the export: its ``training`` flags say nothing, and its ``eval`` raises.
    """
    return isinstance(part, torch.fx.GraphModule) and {"train", "eval"} <= vars(part).keys()


def eager_run(model: nn.Module) -> Callable[..., Any] | None:
    """Return an uncompiled run of a model that hooks must not be put on, None for other models.

    A hook that is there while ``torch.compile`` compiles becomes a part of the compiled code, which
    then gives other logits for good; a hook that comes later is not called. Replicas on several
    GPUs are copies, whose hooks belong to nobody. So the features of such a model come from a
    second, plain run of the inner module, and the logits from the model itself.

    Example:
        >>> eager_run(nn.Linear(2, 2)) is None
        True
    """
    chain = list(_inwards(model))
    replicas = any(isinstance(part, nn.DataParallel) and len(part.device_ids) > 1 for part in chain)
    if not replicas and not any(map(_is_compiled, chain)):
        return None
    forward: Callable[..., Any] | None = _compiled_forward(chain[-1])
    if forward is not None:
        return forward
    # Module.__call__ takes the compiled path of `model.compile()`; this one does not.
    run: Callable[..., Any] = chain[-1]._call_impl
    return run


def open_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules that hooks work on: nothing inside a compiled or scripted part.

    Names are those inside the unwrapped model.

    Example:
        >>> [name for name, _ in open_parts(nn.DataParallel(nn.Sequential(nn.ReLU())))]
        ['', '0']
    """
    inner = unwrapped(model)
    closed: set[nn.Module] = set()
    for name, part in inner.named_modules():
        if part in closed:
            continue
        compiled = part is not inner and _is_compiled(part)
        if compiled or isinstance(part, torch.jit.ScriptModule):
            closed.update(part.modules())
            continue
        yield name, part


def why_closed(model: nn.Module) -> str:
    """Say in words why no layer of a model can be watched, '' where that is not so."""
    parts = list(unwrapped(model).modules())
    if any(isinstance(part, torch.jit.ScriptModule) for part in parts):
        return "TorchScript hides its layers; wrap the Python module for scores on features"
    if any(map(is_exported, parts)):
        return "an exported program has no layers; wrap the Python module for scores on features"
    if any(map(_is_compiled, parts[1:])):
        return (
            "its last layer is inside a compiled part; compile the whole model, or all but the head"
        )
    return ""


def _inwards(model: Any) -> Iterator[Any]:
    """Yield a model, what it wraps, and so on."""
    while True:
        yield model
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif _is_compiled_wrapper(model):
            model = model._orig_mod
        else:
            return


def _is_compiled_wrapper(part: Any) -> bool:
    # By name: importing torch._dynamo takes a second, and a model made by it has imported it.
    return isinstance(part, nn.Module) and type(part).__name__ == "OptimizedModule"


def _compiled_forward(part: nn.Module) -> Any:
    """Return the original of ``model.forward = torch.compile(model.forward)``, else None."""
    return getattr(vars(part).get("forward"), "_torchdynamo_orig_callable", None)


def _is_compiled(part: nn.Module) -> bool:
    return (
        _is_compiled_wrapper(part)
        or getattr(part, "_compiled_call_impl", None) is not None
        or _compiled_forward(part) is not None
    )
