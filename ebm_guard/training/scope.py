"""Which weights may move."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ebm_guard.errors import InvalidInputError, UnsupportedModelError
from ebm_guard.model import EnergyClassifier
from ebm_guard.training.context import PixelNet

SCOPES = ("all", "last_block", "head", "regex:PATTERN")
_REGEX = "regex:"
_KEEP_FROZEN = ("all", "last_block")
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
)


def check_scope(scope: str) -> None:
    """Refuse a scope that is none.

    Raises:
        InvalidInputError: an unknown word, or a pattern that is no regular expression.

    Example:
        >>> check_scope("regex:layer4")
    """
    if scope.startswith(_REGEX):
        try:
            re.compile(scope.removeprefix(_REGEX))
        except re.error as error:
            raise InvalidInputError(
                f"got scope {scope!r}, which is no regular expression: {error}"
            ) from None
    elif scope not in SCOPES[:3]:
        raise InvalidInputError(f"got scope {scope!r}; known are {', '.join(SCOPES)}")


def set_scope(net: PixelNet, classifier: EnergyClassifier, scope: str, probe: Tensor) -> list[str]:
    """Let gradients reach the weights in scope, and no others.

    Weights that no gradient reaches (branches that are off in eval mode) stay out too. So do, in
    ``all`` and ``last_block``, weights that the user froze (``requires_grad=False``), unless that
    leaves none: a model that is frozen as a whole was only prepared for inference. ``head`` and
    ``regex:`` name weights, and may move frozen ones.

    Args:
        net: the working copy, its ``requires_grad`` flags as the user's.
        classifier: around the same module.
        scope: ``all``; ``head`` (the verified last linear layer); ``last_block`` (the head and the
            last block before it, by the order of their first use; normalisation that follows the
            block belongs to it); or ``regex:PATTERN``, searched for in parameter names.
        probe: (B, C, H, W) pixels, B >= 2 that differ.

    Returns:
        The names of the weights that will be trained, as the user's model names them.

    Raises:
        InvalidInputError: nothing is in scope.
        UnsupportedModelError: no gradient reaches any weight, or the head is not found.
    """
    check_scope(scope)
    names = _wanted(net, classifier, scope, probe)
    if scope in _KEEP_FROZEN:
        free = {name for name, part in net.model.named_parameters() if part.requires_grad}
        names = [name for name in names if name in free] or names
    wanted = set(names)
    for name, part in net.model.named_parameters():
        part.requires_grad_(name in wanted and part.is_floating_point())
    reached = _reached(net, probe)
    for name, part in net.model.named_parameters():
        part.requires_grad_(name in reached)
    found = [name for name, part in net.model.named_parameters() if part.requires_grad]
    if not found:
        raise UnsupportedModelError(
            f"no gradient reaches the {len(wanted)} weights in scope {scope!r}: the model detaches "
            "them, runs under no_grad, or its weights are quantised. Give the plain model"
        )
    return found


def _wanted(net: PixelNet, classifier: EnergyClassifier, scope: str, probe: Tensor) -> list[str]:
    names = [name for name, _ in net.model.named_parameters()]
    if not names:
        raise UnsupportedModelError(
            f"this {classifier.name} has no parameters; fine-tuning needs weights to train (frozen "
            "TorchScript holds constants: give the Python module)"
        )
    if scope == "all":
        return names
    if scope.startswith(_REGEX):
        pattern = re.compile(scope.removeprefix(_REGEX))
        found = [name for name in names if pattern.search(name)]
        if not found:
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise InvalidInputError(
                f"got scope {scope!r}, which matches none of {len(names)} weights: {shown}"
            )
        return found
    head = _head(net, classifier, probe)
    return head if scope == "head" else _last_block(net, probe, head)


def _head(net: PixelNet, classifier: EnergyClassifier, probe: Tensor) -> list[str]:
    found = classifier.probe_head(classifier.pixels(probe))
    if not found.found:
        raise UnsupportedModelError(
            f"the head of this {classifier.name} was not found: {found.message}. Use scope='all', "
            "or name the weights: scope='regex:PATTERN'"
        )
    own = {id(part) for layer in found.layers for part in layer.parameters()}
    return [name for name, part in net.model.named_parameters() if id(part) in own]


def _last_block(net: PixelNet, probe: Tensor, head: list[str]) -> list[str]:
    """Walk back from the head over the blocks of the net, in the order of their first use."""
    inside = set(head)
    owner: nn.Module = net.model
    prefix = ""
    while True:
        blocks = [
            (prefix + name, child)
            for name, child in _used_order(net, owner, probe)
            if any(prefix + name + "." + key not in inside for key, _ in child.named_parameters())
        ]
        if len(blocks) != 1 or not list(blocks[0][1].children()):
            break
        # One child holds everything: its own blocks are meant.
        prefix, owner = blocks[0][0] + ".", blocks[0][1]
    taken = list(head)
    for name, block in reversed(blocks):
        taken += [f"{name}.{key}" for key, _ in block.named_parameters()]
        if not _only_norms(block):
            break
    return list(dict.fromkeys(taken))


def _only_norms(block: nn.Module) -> bool:
    owners = (part for part in block.modules() if list(part.parameters(recurse=False)))
    return all(isinstance(part, _NORMS) for part in owners)


def _used_order(net: PixelNet, owner: nn.Module, probe: Tensor) -> list[tuple[str, nn.Module]]:
    """Return the children of a module in the order in which a forward pass first uses them."""
    children = {child: name for name, child in owner.named_children()}
    seen: list[nn.Module] = []

    def hook(module: nn.Module, _: object) -> None:
        if module not in seen:
            seen.append(module)

    # A child that is a plain list is never called itself: its parts stand for it.
    parts = {part: child for child in children for part in child.modules()}
    handles = [part.register_forward_pre_hook(hook) for part in parts]
    try:
        with torch.no_grad():
            net(probe)
    finally:
        for handle in handles:
            handle.remove()
    ordered = list(dict.fromkeys(parts[part] for part in seen if part in parts))
    return [(children[child], child) for child in ordered if list(child.parameters())]


def _reached(net: PixelNet, probe: Tensor) -> set[str]:
    trained = {name: part for name, part in net.model.named_parameters() if part.requires_grad}
    if not trained:
        return set()
    with frozen_random(probe.device), torch.enable_grad():
        total = torch.logsumexp(net(probe), dim=1).sum()
        if not total.requires_grad:
            return set()
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return {name for name, part in zip(trained, gradients, strict=True) if part is not None}


@contextmanager
def frozen_random(device: torch.device | None) -> Iterator[None]:
    """Put torch's global random numbers, on the CPU and this device, back afterwards."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
