"""What an attacker of the bare classifier wants: another class, by one of several losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ebm_guard import energy as formulas
from ebm_guard.attacks.engine import Goal
from ebm_guard.attacks.rows import Examples
from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.model.isolation import Forward


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute -log p(y|x) = logsumexp f(x) - f(x)[y], (B,).

    Its gradient vanishes where the net is sure: never the only loss of a report.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.6931])
    """
    return -formulas.log_probabilities(logits).gather(1, labels[:, None]).squeeze(1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute max_{j != y} f(x)[j] - f(x)[y], (B,): positive where the class is wrong.

    References:
        Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, 2017, f_6.

    Example:
        >>> margin(torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0]))
        tensor([-1.5000])
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    return others - own


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the difference of logits ratio, (B,); the plain margin with fewer than 3 classes.

    DLR = -(z_y - max_{j != y} z_j) / (z_p1 - z_p3), with z_p1 >= z_p2 >= ... the sorted logits:
    unchanged when all logits are scaled, so that confident nets do not saturate it.

    References:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness, ICML 2020, eq. 4.

    Example:
        >>> dlr(torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0]))
        tensor([-0.5000])
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    ordered = logits.topk(3, dim=1).values
    return margin(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Compute the targeted difference of logits ratio, (B,); z_t - z_y with fewer than 4 classes.

    DLR_t = -(z_y - z_t) / (z_p1 - (z_p3 + z_p4) / 2).

    References:
        Croce and Hein, ICML 2020, eq. 6.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5, -1.0, -1.0]])
        >>> targeted_dlr(logits, torch.tensor([0]), torch.tensor([1]))
        tensor([-0.5000])
    """
    difference = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
    if logits.shape[1] < 4:
        return difference
    ordered = logits.topk(4, dim=1).values
    return difference / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12)


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
}
LOSSES = tuple(_LOSSES)


class Misclassify(Goal):
    """Make the classifier name any other class (aim A: the gate is not asked).

    A row with a NaN logit names no class, and counts as wrong.

    Args:
        loss: ``ce``, ``margin`` or ``dlr``.

    Raises:
        InvalidInputError: unknown loss.
    """

    name = "misclassify"

    def __init__(self, loss: str = "ce") -> None:
        if loss not in _LOSSES:
            raise InvalidInputError(
                f"got loss {loss!r}; known are {', '.join(_LOSSES)}{suggest(loss, _LOSSES)}"
            )
        self.loss = loss

    def objective(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Compute the loss of each image, (B,)."""
        logits = output.logits.float()
        return _LOSSES[self.loss](logits, examples.labels.to(logits.device))

    def success(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Tell whether the named class is wrong, (B,) bool."""
        return wrong(output.logits, examples.labels)


class TargetedMisclassify(Misclassify):
    """Climb towards one class: the k-th most likely wrong one of the clean image.

    Success is any wrong class, as in AutoAttack, not only the target.

    Args:
        rank: 1 for the most likely wrong class of the clean image, 2 for the next, ...
    """

    name = "targeted"

    def __init__(self, rank: int = 1) -> None:
        super().__init__("dlr")
        if rank < 1:
            raise InvalidInputError(f"got rank {rank}; the first wrong class has rank 1")
        self.rank = rank

    def prepare(self, forward: Forward, examples: Examples) -> Examples:
        """Choose the targets on the clean images.

        Raises:
            InvalidInputError: the classifier has fewer wrong classes than the rank.
        """
        parts = []
        for start in range(0, len(examples), 64):
            with torch.no_grad():
                parts.append(forward(examples.pixels[start : start + 64]).logits)
        logits = torch.cat(parts)
        if self.rank > logits.shape[1] - 1:
            raise InvalidInputError(
                f"got rank {self.rank} for {logits.shape[1]} classes; there are "
                f"{logits.shape[1] - 1} wrong ones"
            )
        labels = examples.labels.to(logits.device)
        others = logits.scatter(1, labels[:, None], -math.inf)
        targets = others.topk(self.rank, dim=1).indices[:, -1]
        return Examples(examples.pixels, examples.labels, examples.ids, targets)

    def objective(self, output: ClassifierOutput, examples: Examples) -> Tensor:
        """Compute the targeted loss, (B,)."""
        if examples.targets is None:
            raise InvalidInputError("got no target classes; run the attack through climb()")
        logits = output.logits.float()
        labels, targets = examples.labels.to(logits.device), examples.targets.to(logits.device)
        return targeted_dlr(logits, labels, targets)


def wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """Tell for each row whether the largest logit is not the label's; NaN is wrong, (B,) bool.

    Example:
        >>> wrong(torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]), torch.tensor([0, 0]))
        tensor([False,  True])
    """
    broken = torch.isnan(logits).any(dim=1)
    return broken | (logits.argmax(dim=1) != labels.to(logits.device))
