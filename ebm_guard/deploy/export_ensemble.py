"""An ensemble of classifiers as a program: its formula without the checks that look at values."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ebm_guard import energy as formulas
from ebm_guard.model import EnergyClassifier, EnergyEnsemble
from ebm_guard.model.wrappers import unwrapped


class EnsembleProgram(nn.Module):
    """Compute the logits of a fitted :class:`EnergyEnsemble`; its numbers are fixed in the graph.

    Args:
        ensemble: fitted.

    Raises:
        NotFittedError: the ensemble is not fitted.
    """

    def __init__(self, ensemble: EnergyEnsemble) -> None:
        super().__init__()
        self._members = [without_checks(member) for member in ensemble.classifiers]
        # Registered, so that their weights are the program's.
        self.members = nn.ModuleList(member.model for member in self._members)  # type: ignore[misc]
        self.training = self.members.training = ensemble.training
        self._temperatures: list[float] = ensemble.temperatures.tolist()
        self._means: list[float] = ensemble.energy_mean.tolist()
        self._stds: list[float] = ensemble.energy_std.tolist()
        weights = ensemble.weights
        self._mixture = ensemble.combine == "mixture"
        if self._mixture:
            weights = (weights / weights.sum()).log()
        self._weights: list[float] = weights.tolist()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits -E(x, y), (B, C), as :meth:`EnergyEnsemble.compose` has them."""
        energies = []
        for m, member in enumerate(self._members):
            known = member.preprocessing
            logits = member(pixels if known is None else known.normalize(pixels))
            own = -formulas.log_probabilities(logits, self._temperatures[m])
            shift = (formulas.energy(logits) - self._means[m]) / self._stds[m]
            energies.append(own + shift[:, None])
        stacked = torch.stack(energies)
        weights = stacked.new_tensor(self._weights)
        # The functions of `composition` compare shapes, which a tracer does not have as numbers.
        if self._mixture:
            return torch.logsumexp(weights[:, None, None] - stacked, dim=0)
        total: Tensor = torch.tensordot(weights, stacked, dims=1)
        return -total


def without_checks(classifier: EnergyClassifier) -> EnergyClassifier:
    """Return a classifier whose ensemble, if it is one, can be traced; others as they are."""
    model = unwrapped(classifier.model)
    if not isinstance(model, EnergyEnsemble):
        return classifier
    own = copy.copy(classifier)
    own.model = EnsembleProgram(model)
    return own
