"""What a loop works on, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ebm_guard.distributed import World
from ebm_guard.model import ClassifierOutput, EnergyClassifier
from ebm_guard.sampling.folding import SamplingNet
from ebm_guard.training.context import Context, PixelNet
from ebm_guard.training.history import History
from ebm_guard.training.images import TrainingImages
from ebm_guard.training.objectives.base import Objective
from ebm_guard.training.options import FineTuneOptions
from ebm_guard.training.selection import Evaluation, Look, Panel


@dataclass
class Setup:
    """What a loop works on.

    Args:
        options: of the run.
        world: the processes.
        classifier: around the working copy.
        net: the same, from pixels to logits; gradients reach the weights in scope.
        images: training images, labelled.
        objective: begun, or with the state of an interrupted run.
        context: of the objective.
        panel: the selection rows.
        start: the start's look at them.
        history: of the run.
        highest: learning rate at the top of the schedule.
        settings: of the run and its data, as JSON types, for the checkpoint.
        folder: of the checkpoint, or None.
        progress: show a bar.
    """

    options: FineTuneOptions
    world: World
    classifier: EnergyClassifier
    net: PixelNet
    images: TrainingImages
    objective: Objective
    context: Context
    panel: Panel
    start: Look
    history: History
    highest: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    progress: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a loop ended.

    Args:
        best: weights by parameter name of the best state, or None where none was good.
        evaluation: its evaluation.
        update: when that was.
        interrupted: by Ctrl-C.
        stopped: why it gave up, or ''.
        rollbacks: how often it went back.
    """

    best: Mapping[str, Tensor] | None
    evaluation: Evaluation | None
    update: int
    interrupted: bool
    stopped: str
    rollbacks: int


class FreshForward:
    """The net for gradients with respect to pixels: made on first use, kept up to date after that.

    Args:
        classifier: around the working copy.
        probe: (B, C, H, W) pixels.
        precision: ``float32`` or ``auto``.
    """

    def __init__(self, classifier: EnergyClassifier, probe: Tensor, precision: str) -> None:
        self._classifier, self._probe = classifier, probe
        self._precision: Any = precision
        self._net: SamplingNet | None = None
        self._stale = False

    def __call__(self, pixels: Tensor) -> ClassifierOutput:
        """Run the net with the weights as they are now."""
        if self._net is None:
            self._net = SamplingNet(self._classifier, self._probe, precision=self._precision)
        elif self._stale:
            self._net.refresh()
        self._stale = False
        return self._net(pixels)

    def outdated(self) -> None:
        """Say that the weights have changed."""
        self._stale = True
