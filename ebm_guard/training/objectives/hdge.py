"""Hybrid discriminative-generative energy: log p(x|y) with the batch and a queue as normaliser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_guard import energy as formulas
from ebm_guard.sampling.checks import check_choice, check_number, check_whole
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.objectives.base import LossTerms, Objective
from ebm_guard.training.objectives.terms import (
    UNLABELLED,
    item,
    warmed_up,
)

# The temperature of the paper's code belongs to normalised logits, which lie in [-1, 1].
TEMPERATURES = {"raw": 1.0, "normalised": 0.1}


class Hdge(Objective):
    """Contrast each image with other images under its own class; no sampler is needed.

    L = L_class - r w / B sum_i log [ exp(f(x_i)[y_i] / T) / sum_k exp(f(x_k)[y_i] / T) ], k over
    the batch and a queue of logits of earlier batches, which are held fixed. The sum over images
    takes the place of the integral over x in p(x|y). Images of the same class stay in it: it is
    the normaliser over all images.

    Only training images are compared with each other: nothing pushes up the energy off the data.
    ``raw`` contrasts the logits themselves, which are the deployed energies; their scale grows
    with the weight, so it is small. ``normalised`` divides each row by its L2 norm (the authors'
    code): bounded, but it trains an energy that is not the one deployed.

    Args:
        weight: w >= 0.
        form: ``raw`` or ``normalised``.
        temperature: T > 0; default: 1 for raw, 0.1 for normalised.
        queue: logits kept, 0 for the batch alone.
        warm_up: share of the run over which r rises from 0 to 1.

    Raises:
        InvalidInputError: settings out of range.

    References:
        Liu and Abbeel, Hybrid Discriminative-Generative Training via Contrastive Learning,
        arXiv 2007.09070, 2020. Differs from the released code: the logit of the class is
        gathered, where a product with a one-hot row inside a logsumexp counts C - 1 zeros.

    Example:
        >>> Hdge(form="normalised").temperature
        0.1
    """

    name = "hdge"

    def __init__(
        self,
        weight: float = 0.01,
        form: str = "raw",
        temperature: float | None = None,
        queue: int = 2048,
        warm_up: float = 0.1,
    ) -> None:
        self.form = check_choice("form", form, tuple(TEMPERATURES))
        self.queue = check_whole("queue", queue)
        chosen = TEMPERATURES[form] if temperature is None else temperature
        self.weight = check_number("weight", weight)
        self.temperature = check_number("temperature", chosen, open_low=True)
        self.warm_up = check_number("warm_up", warm_up, high=1.0)
        self._kept = torch.empty(0, 0)

    def begin(self, context: Context, batch: TrainingBatch) -> None:
        """Forget the logits of an earlier run."""
        self._kept = torch.empty(0, 0)

    def loss(self, context: Context, batch: TrainingBatch) -> LossTerms:
        """Compute the class loss and the contrast from one forward pass."""
        logits = context.together(augmented=batch.augmented, data=batch.pixels)
        values = logits["data"]
        if self.form == "normalised":
            values = F.normalize(values, dim=1)
        kept = self._kept.to(values)
        contrast = contrastive(values, batch.labels, kept, self.temperature)
        terms = {
            "class": context.class_loss(logits["augmented"], batch.labels),
            "contrast": self.weight * warmed_up(context, self.warm_up) * contrast,
        }
        self._remember(values.detach())
        return LossTerms(
            terms["class"] + terms["contrast"],
            {name: item(term) for name, term in terms.items()},
            energy_data=formulas.energy(logits["data"].detach()),
        )

    def _remember(self, values: Tensor) -> None:
        if self.queue:
            new = values.float().cpu()
            self._kept = torch.cat([new, self._kept] if len(self._kept) else [new])[: self.queue]

    def rolled_back(self, context: Context) -> None:
        """Forget the logits of the net that is given up."""
        self._kept = torch.empty(0, 0)

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {
            "objective": self.name,
            "weight": self.weight,
            "form": self.form,
            "temperature": self.temperature,
            "queue": self.queue,
            "warm_up": self.warm_up,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the queue."""
        return {"queue": self._kept.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the queue."""
        self._kept = state["queue"].clone()


def contrastive(values: Tensor, labels: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Compute -mean_i log [exp(v_i[y_i] / T) / sum_k exp(v_k[y_i] / T)] over labelled rows.

    Args:
        values: (B, C), with gradients.
        labels: (B,); rows labelled -1 count in the sum over k alone.
        queue: (K, C), fixed; or empty.
        temperature: T.

    Example:
        >>> contrastive(torch.zeros(2, 3), torch.tensor([0, 2]), torch.empty(0, 0), 1.0)
        tensor(0.6931)
    """
    known = labels != UNLABELLED
    everything = torch.cat([values, queue.detach()]) if len(queue) else values
    normaliser = torch.logsumexp(everything / temperature, dim=0)
    own = values[known].gather(1, labels[known][:, None]).squeeze(1) / temperature
    summed = (normaliser[labels[known]] - own).sum()
    return summed / max(1, int(known.sum()))
