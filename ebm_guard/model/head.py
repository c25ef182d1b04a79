"""Find the last linear layer of a classifier, and prove that it is the one.

The penultimate features h are what the last layer takes: logits = h @ W.T + b. There is no
universal attribute for that layer, so candidates are tried in a fixed order and each is
*verified* on a probe batch. Averaged heads fold exactly: h holds the heads' inputs side by side,
W = [W1/k ... Wk/k], b = mean(b_i).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ebm_guard.errors import ModelOutputError
from ebm_guard.model.wrappers import open_parts, unwrapped, why_closed

_HEAD_NAMES = ("classifier", "fc", "head", "heads", "score", "linear", "last_linear")
# Relative to max |logits|; half-precision models round each product.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}
# Differences between rows below this share of max |logits| drown in rounding.
_ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 0.1, torch.bfloat16: 0.3}
# A wrong layer misses by about the spread itself, the right one by rounding alone.
_OF_SPREAD = 0.1


@dataclass(frozen=True)
class Head:
    """The verified last linear layer, or the reason why there is none.

    Args:
        layers: the Linear or 1x1 Conv layers whose average gives the logits; empty if none.
        names: their names inside the model, without the prefixes of DataParallel and torch.compile.
        message: what was found, or why nothing was, in words.
    """

    layers: tuple[nn.Module, ...] = field(repr=False)
    names: tuple[str, ...]
    message: str

    @property
    def found(self) -> bool:
        """Whether a verified layer exists."""
        return bool(self.layers)

    @property
    def weight(self) -> Tensor:
        """W (C, D), so that features @ W.T + b == logits."""
        return torch.cat([_weight(layer) / len(self.layers) for layer in self.layers], dim=1)

    @property
    def bias(self) -> Tensor:
        """Bias b (C,), zeros where no layer has one."""
        return torch.stack([_bias(layer) for layer in self.layers]).mean(dim=0)

    def features(self, inputs: dict[nn.Module, list[Tensor]]) -> Tensor:
        """Join the captured inputs of the layers to features (B, D).

        Raises:
            ModelOutputError: a layer did not run exactly once in this pass.
        """
        parts = []
        for layer, name in zip(self.layers, self.names, strict=True):
            seen = inputs.get(layer, [])
            if len(seen) != 1:
                raise ModelOutputError(
                    f"the head {name!r} ran {len(seen)} times in one forward pass; features need "
                    "exactly one. The model takes another path for this input"
                )
            parts.append(_flat(seen[0]))
        return torch.cat(parts, dim=1)


@contextmanager
def capture_inputs(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Record what layers receive during a forward pass of this thread.

    The hooks are there only inside the block, and ignore other threads.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with capture_inputs([layer]) as inputs:
        ...     _ = layer(torch.ones(1, 2))
        >>> inputs[layer][0].shape
        torch.Size([1, 2])
    """
    owner = threading.get_ident()
    inputs: dict[nn.Module, list[Tensor]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == owner and args and isinstance(args[0], Tensor):
            inputs.setdefault(module, []).append(args[0])

    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def find_head(
    model: object,
    run: Callable[[Sequence[nn.Module]], tuple[Tensor, dict[nn.Module, list[Tensor]]]],
) -> Head:
    """Find and verify the head of a model on one probe pass.

    Order: ``get_classifier()`` (timm), usual attribute names (torchvision, Hugging Face), every
    executed layer with C outputs from the last to the first, all of them averaged. The first whose
    ``features @ W.T + b`` equals the logits within 1e-4 max |logits| (float32), and within a tenth
    of what they differ between rows, is taken.

    Args:
        model: the user's model.
        run: runs the model on a probe batch, B >= 2 rows that differ; takes the layers to watch,
            returns logits (B, C) and what each of these layers received.

    Returns:
        The head; ``found`` is False where none could be verified, and ``message`` says why.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> def run(layers):
        ...     with capture_inputs(layers) as inputs:
        ...         return net(torch.randn(8, 3)), inputs
        >>> find_head(net, run).names
        ('2',)
    """
    if not isinstance(model, nn.Module):
        return Head((), (), f"a {type(model).__name__} is not an nn.Module: no layers to look at")
    layers = {layer: name for name, layer in open_parts(model) if _is_linear(layer)}
    output, inputs = run(list(layers))
    logits = output.detach()
    problem = _probe_problem(logits)
    if problem:
        return Head((), (), f"not verifiable: {problem}")
    classes = logits.shape[1]
    ran = [layer for layer in layers if layer in inputs and _weight(layer).shape[0] == classes]
    for candidate in _candidates(unwrapped(model), ran):
        head = Head(candidate, tuple(layers[layer] for layer in candidate), "")
        if _verified(head, inputs, logits):
            kind = type(candidate[0]).__name__
            many = f" (average of {len(candidate)})" if len(candidate) > 1 else ""
            return Head(candidate, head.names, f"{kind} {', '.join(head.names)}{many}, verified")
    reason = "" if ran else why_closed(model)
    if not reason:
        reason = (
            f"none of {len(ran)} executed linear layers with {classes} outputs gives the logits"
        )
    return Head((), (), f"{reason}; logit scores work, scores on features do not")


def _candidates(model: nn.Module, ran: list[nn.Module]) -> Iterator[tuple[nn.Module, ...]]:
    getter = getattr(model, "get_classifier", None)
    declared = getter() if callable(getter) else None
    groups = [_parts(declared), *(_parts(getattr(model, name, None)) for name in _HEAD_NAMES)]
    for group in groups:
        inside = tuple(layer for layer in ran if layer in group)
        if inside:
            yield inside[-1:]
            yield inside
    for layer in reversed(ran):
        yield (layer,)
    if len(ran) > 1:
        yield tuple(ran)


def _parts(head: object) -> set[nn.Module]:
    if isinstance(head, nn.Module):
        return set(head.modules())
    if isinstance(head, (tuple, list)):
        return {part for item in head for part in _parts(item)}
    return set()


def _verified(head: Head, inputs: dict[nn.Module, list[Tensor]], logits: Tensor) -> bool:
    if any(len(inputs[layer]) != 1 or not _is_flat(inputs[layer][0]) for layer in head.layers):
        return False
    features = head.features(inputs).detach().double()
    if len(features) != len(logits) or features.shape[1] != head.weight.shape[1]:
        return False
    rebuilt = features @ head.weight.detach().double().T + head.bias.detach().double()
    error = float((rebuilt - logits.double()).abs().max())
    tolerance = _TOLERANCE.get(logits.dtype, 1e-4) * float(logits.abs().max())
    return error <= min(tolerance, _OF_SPREAD * _spread(logits))


def _spread(logits: Tensor) -> float:
    values = logits.double()
    return float((values.amax(dim=0) - values.amin(dim=0)).max())


def _probe_problem(logits: Tensor) -> str:
    if len(logits) < 2:
        return f"the probe batch has {len(logits)} row; give a batch of two or more"
    if not torch.isfinite(logits).all():
        return "the logits of the probe batch are not finite"
    spread = _spread(logits)
    if spread <= _ROUNDING.get(logits.dtype, 0.1) * float(logits.abs().max()):
        return (
            f"the logits vary by only {spread:.3g} between the rows of the probe batch, so any "
            "layer would pass"
        )
    return ""


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1


def _is_flat(value: Tensor) -> bool:
    return value.ndim == 2 or (value.ndim == 4 and value.shape[2:] == (1, 1))


def _flat(value: Tensor) -> Tensor:
    return value.flatten(1)


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight tensor")
    return weight.flatten(1)


def _bias(layer: nn.Module) -> Tensor:
    bias = layer.bias
    return bias if isinstance(bias, Tensor) else torch.zeros_like(_weight(layer)[:, 0])
