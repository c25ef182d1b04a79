"""Every setting of a fine-tuning run, checked before anything is run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.training.augment import Augment, make_augment
from ebm_guard.training.class_losses import ClassLoss, make_class_loss
from ebm_guard.training.scope import check_scope

OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class FineTuneOptions:
    """Settings of a run; see :func:`ebm_guard.training.finetuning` for their meaning.

    Args:
        updates: steps of the optimiser.
        batch_size: images of an update, over all processes.
        learning_rate: highest of the schedule; None takes the objective's.
        optimizer: ``adamw`` or ``sgd``.
        weight_decay: of matrices and kernels; not of biases and norms.
        warm_up: share of the run over which the learning rate rises.
        scope: weights that may move; None takes the objective's.
        augment: of the images of the class loss.
        class_loss: a name or a class loss.
        labelled_share: of a batch, where some training images have no label.
        outlier_share: share of the given outliers among the negatives.
        evaluate_every: updates between evaluations; None makes eight of a run.
        selection_rows: most rows that an evaluation looks at.
        outlier_rows: most outliers of each kind.
        max_acc_drop: largest loss of accuracy, as a share.
        max_nll_rise: largest rise of the NLL after temperature, in nats.
        max_ece_rise: largest rise of the ECE after temperature for a checkpoint to be chosen.
        gradient_clip: largest norm of a gradient.
        ema: decay of the mean of the weights; 0 for none.
        precision: ``auto``, ``float32`` or ``bfloat16``.
        seed: of everything random.
        attempts: how often a run may be rolled back before it stops.

    Raises:
        InvalidInputError: a setting out of range.

    Example:
        >>> FineTuneOptions(updates=80).interval
        10
    """

    updates: int = 200
    batch_size: int = 64
    learning_rate: float | None = None
    optimizer: str = "adamw"
    weight_decay: float = 1e-4
    warm_up: float = 0.05
    scope: str | None = None
    augment: str | Augment | None = None
    class_loss: str | ClassLoss = "nll"
    labelled_share: float = 0.5
    outlier_share: float = 0.5
    evaluate_every: int | None = None
    selection_rows: int = 1000
    outlier_rows: int = 250
    max_acc_drop: float = 0.01
    max_nll_rise: float = 0.02
    max_ece_rise: float = 0.02
    gradient_clip: float = 5.0
    ema: float = 0.99
    precision: str = "auto"
    seed: int = 0
    attempts: int = 3
    objective_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        for name in ("updates", "batch_size", "selection_rows", "outlier_rows"):
            _whole(name, getattr(self, name), 1)
        for name in ("seed", "attempts"):
            _whole(name, getattr(self, name), 0)
        if self.evaluate_every is not None:
            _whole("evaluate_every", self.evaluate_every, 1)
        if self.learning_rate is not None:
            _number("learning_rate", self.learning_rate, above=0)
        for name in ("max_acc_drop", "outlier_share", "labelled_share"):
            _number(name, getattr(self, name), above=0, most=1)
        for name in ("max_nll_rise", "max_ece_rise", "gradient_clip"):
            _number(name, getattr(self, name), above=0)
        _number("weight_decay", self.weight_decay, least=0)
        _number("warm_up", self.warm_up, least=0, most=1)
        _number("ema", self.ema, least=0, below=1)
        for name, known in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in known:
                near = suggest(str(value), known)
                raise InvalidInputError(f"got {name} {value!r}; known are {', '.join(known)}{near}")
        if self.scope is not None:
            check_scope(self.scope)
        make_augment(self.augment)
        make_class_loss(self.class_loss)

    @property
    def interval(self) -> int:
        """Updates between evaluations."""
        return self.evaluate_every or max(1, self.updates // 8)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types; a function by its name."""
        settings = {item.name: getattr(self, item.name) for item in fields(self)}
        settings |= {"objective_settings": described(self.objective_settings)}
        settings["class_loss"] = make_class_loss(self.class_loss).identity()
        if callable(self.augment):
            settings["augment"] = getattr(self.augment, "__name__", type(self.augment).__name__)
        return settings


def described(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON types; an object by its own settings or its type.

    Example:
        >>> described({"weight": 1.0, "sampler": object()})
        {'weight': 1.0, 'sampler': 'object'}
    """
    known: dict[str, Any] = {}
    for name, value in settings.items():
        # As they were given: an object that took part in a run may have measured settings.
        own = getattr(value, "identity", None) or getattr(value, "settings", None)
        if callable(own):
            known[name] = own()
        elif isinstance(value, (str, int, float, bool)) or value is None:
            known[name] = value
        elif isinstance(value, (tuple, list)):
            known[name] = [described({"": item})[""] for item in value]
        else:
            known[name] = type(value).__name__
    return known


def learning_rate_at(update: int, updates: int, highest: float, warm_up: float) -> float:
    """Compute the learning rate: a linear rise over the first share, then half a cosine to 0.

    Args:
        update: from 0.
        updates: of the whole run.
        highest: at the end of the rise.
        warm_up: share of the run in [0, 1].

    References:
        Loshchilov and Hutter, SGDR, ICLR 2017, eq. 5, without restarts.

    Example:
        >>> [round(learning_rate_at(u, 4, 1.0, 0.25), 3) for u in range(4)]
        [1.0, 1.0, 0.75, 0.25]
    """
    rising = round(warm_up * updates)
    if update < rising:
        return highest * (update + 1) / rising
    done = (update - rising) / max(1, updates - rising)
    return highest * (1 + math.cos(math.pi * done)) / 2


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidInputError(f"got {name}={value!r}; needed a whole number >= {least}")


def _number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if known and math.isfinite(value) and least <= value <= most and above < value < below:
        return
    low = f"> {above:g}" if above > -math.inf else f">= {least:g}"
    high = f" and <= {most:g}" if most < math.inf else ""
    high = f" and < {below:g}" if below < math.inf else high
    raise InvalidInputError(f"got {name}={value!r}; needed a number {low}{high}")
