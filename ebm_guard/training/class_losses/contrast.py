"""InfoNCE: each image against the other images of the batch, under its own class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebm_guard.sampling.checks import check_positive
from ebm_guard.training.class_losses.base import UNLABELLED, ClassLoss


class InfoNce(ClassLoss):
    """Pick the image that belongs to a class out of all images of the batch.

    L_i = -log [ exp(-E(x_i, y_i) / T) / sum_k exp(-E(x_k, y_i) / T) ]. The class y_i is the query,
    the images are the candidates. The sum runs over *all* B images of the batch: x_i itself,
    others of its own class, and those without label. So the optimum is not 0: with n images of
    class y_i in the batch, L_i is about log n where these share all the weight; and a batch of one
    costs 0. With several processes each one's own rows are the candidates.

    Cross-entropy compares the classes of one image, this the images of one class. A number added
    to the energies of one class over all images changes nothing, so it does not settle which class
    of an image is lowest: no margin. The objective ``hdge`` is this sum, with a queue of earlier
    batches in its denominator, added with a weight to the class loss that settles it.

    Args:
        temperature: T > 0.

    Raises:
        InvalidInputError: the temperature is not positive.

    References:
        van den Oord, Li and Vinyals, Representation Learning with Contrastive Predictive Coding,
        arXiv 1807.03748, eq. 4, with the class for the context; Liu and Abbeel, arXiv 2007.09070.

    Example:
        >>> InfoNce()(torch.zeros(4, 3), torch.tensor([0, 2, -1, -1]))
        tensor(1.3863)
    """

    name = "info_nce"
    margin = "none"
    caution = (
        "the class loss info_nce compares images, not classes: an offset of a whole class costs "
        "nothing, so accuracy is not held; hdge adds it to a loss that holds it"
    )

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = check_positive("temperature", temperature)

    def rows(self, energies: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each labelled row, (n,); all rows are candidates."""
        known = labels != UNLABELLED
        values = -energies / self.temperature
        if not len(values):
            return values.sum(dim=1)
        own = values[known].gather(1, labels[known][:, None]).squeeze(1)
        return torch.logsumexp(values, dim=0)[labels[known]] - own

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return {"class_loss": self.name, "temperature": self.temperature}
