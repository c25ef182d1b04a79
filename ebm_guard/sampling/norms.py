"""Fold batch norm of eval mode into the layer before it, in a traced graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Fold:
    """One norm layer that went into the layer before it.

    Args:
        layer: name of the convolution or linear layer.
        norm: name of the norm layer.
        eps: of the norm layer.
    """

    layer: str
    norm: str
    eps: float

    @property
    def own_names(self) -> tuple[str, str]:
        """Names of the folded layer's weight and bias."""
        return f"{self.layer}.weight", f"{self.layer}.bias"


class _Tracer(fx.Tracer):
    """Keep every kind of batch norm whole: inside, it looks at its flags and counters."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, nn.modules.batchnorm._BatchNorm)
        return whole or super().is_leaf_module(m, module_qualified_name)


def fold_norms(model: nn.Module) -> tuple[fx.GraphModule, list[Fold], int]:
    """Trace a model in eval mode and fold what can be folded.

    A norm layer is folded where it is the only reader of a convolution or linear layer, and both
    are called once::

        w' = w g / sqrt(var + eps),    b' = (b - mean) g / sqrt(var + eps) + beta

    Args:
        model: a copy of the user's model, in eval mode; its layers are used, and changed.

    Returns:
        The traced model, what was folded, and the number of batch norm layers that it calls.

    Raises:
        Exception: whatever tracing raises, such as control flow that hangs on values.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
        >>> net, folds, norms = fold_norms(model)
        >>> folds[0].layer, norms
        ('0', 1)
    """
    tracer = _Tracer()
    graph = tracer.trace(model)
    net = fx.GraphModule(tracer.root, graph)
    # A graph module starts in train mode, whatever it was made of.
    for part in net.modules():
        part.training = False
    modules = dict(net.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    # By identity: one layer may be called under two names.
    uses = Counter(id(modules[str(node.target)]) for node in calls)
    folds = []
    for node in calls:
        if fold := _foldable(node, modules, uses):
            _fold(fold, modules)
            _take_out(node, graph, modules)
            folds.append(fold)
    net.delete_all_unused_submodules()
    graph.lint()
    net.recompile()
    kinds = nn.modules.batchnorm._BatchNorm
    norms = sum(isinstance(modules[str(node.target)], kinds) for node in calls)
    return net, folds, norms


def _foldable(
    node: fx.Node, modules: Mapping[str, nn.Module], uses: Mapping[int, int]
) -> Fold | None:
    # Exact types: a subclass may do more in its forward.
    norm = modules[str(node.target)]
    if not isinstance(norm, _NORMS) or norm.running_mean is None:
        return None
    if type(norm) not in _NORMS and not _after(norm):
        return None
    if len(node.args) != 1 or node.kwargs:
        return None
    before = node.args[0]
    if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
        return None
    layer = modules[str(before.target)]
    fits = type(layer) in _CONVOLUTIONS or (
        # After a linear layer, (B, D) and (B, L, D) are normalised along other dimensions: on
        # (B, L, D) this fold is wrong unless L is D, and the comparison of energies finds it.
        type(layer) is nn.Linear and type(norm) is nn.BatchNorm1d
    )
    if not fits or uses[id(layer)] != 1 or uses[id(norm)] != 1:
        return None
    return Fold(str(before.target), str(node.target), norm.eps)


def _after(norm: nn.Module) -> tuple[str, ...]:
    """Name the parts that run after the norm itself, in timm's norm with activation."""
    # By name: timm is not imported here. The comparison of energies finds another such class.
    known = type(norm).__name__ == "BatchNormAct2d" and hasattr(norm, "act")
    return tuple(part for part in ("drop", "act") if known and hasattr(norm, part))


def _take_out(node: fx.Node, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Let the readers of a norm layer read the layer before it, through what is left to do."""
    left = node.args[0]
    with graph.inserting_before(node):
        for part in _after(modules[str(node.target)]):
            left = graph.call_module(f"{node.target}.{part}", (left,))
    node.replace_all_uses_with(left)  # type: ignore[arg-type]
    graph.erase_node(node)


def _fold(fold: Fold, modules: Mapping[str, nn.Module]) -> None:
    live = {
        f"{name}.{part}": value
        for name in (fold.layer, fold.norm)
        for part, value in modules[name].state_dict().items()
    }
    weight, bias = folded_weights(fold, live)
    layer = modules[fold.layer]
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)


def folded_weights(fold: Fold, live: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute weight and bias of a folded layer from those of the two layers, by name."""
    weight, mean = live[f"{fold.layer}.weight"], live[f"{fold.norm}.running_mean"]
    scale = torch.rsqrt(live[f"{fold.norm}.running_var"] + fold.eps)
    gain, shift = live.get(f"{fold.norm}.weight"), live.get(f"{fold.norm}.bias")
    bias = live.get(f"{fold.layer}.bias")
    if gain is not None:
        scale = scale * gain
    folded = (-mean if bias is None else bias - mean) * scale
    if shift is not None:
        folded = folded + shift
    shaped = weight * scale.view(-1, *[1] * (weight.ndim - 1)).to(weight.dtype)
    return shaped.detach(), folded.detach().to(weight.dtype)


@torch.no_grad()
def refresh_fold(fold: Fold, own: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Write a folded layer's weights anew, in place, from those of the live model."""
    weight, bias = folded_weights(fold, live)
    own[f"{fold.layer}.weight"].copy_(weight)
    own[f"{fold.layer}.bias"].copy_(bias)
