"""What fine-tuning gives back, and how it is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebm_guard.files import replace_file
from ebm_guard.gate import Guard
from ebm_guard.model.wrappers import unwrapped
from ebm_guard.training.acceptance import Acceptance
from ebm_guard.training.density.record import DENSITY_FILE, EnergyDensity
from ebm_guard.training.history import HISTORY_FILE, Line, plain, write_history
from ebm_guard.training.selection import ValidationParts

ACCEPTED = "accepted"
START_RETURNED = "start returned"
SCHEMA = "ebm_guard.finetune_facts/1"
WEIGHTS_FILE = "weights.safetensors"
GUARD_FILE = "guard.safetensors"
FACTS_FILE = "finetune.json"


@dataclass(frozen=True)
class FinetuneResult:
    """The outcome of a run.

    Args:
        status: ``accepted`` or ``start returned``.
        reason: why, in one sentence.
        story: what happened, sentence by sentence.
        model: the winner in eval mode; where the start is returned, the user's own model as it is.
        guard: fitted around the winner. Where the start is returned: the guard as it was given,
            or one fitted on the refit rows.
        candidate: the best state found, in eval mode, or None where none was within its limits.
        start: the user's own model, untouched.
        acceptance: the acceptance test, or None where there was no candidate.
        history: the lines of the run.
        settings: of the run, as JSON types.
        seconds: wall time.
        interrupted: whether Ctrl-C ended the run early.
        parts: the validation rows by use; the acceptance rows are the ones to report on where
            there are no others.
        density: what an objective that learns one offers, with what was measured of it; None
            where nothing was.
        no_density: why nothing was measured, where the objective learns a density.
    """

    status: str
    reason: str
    story: tuple[str, ...]
    model: nn.Module
    guard: Guard
    candidate: nn.Module | None
    start: nn.Module
    acceptance: Acceptance | None
    history: tuple[Line, ...]
    settings: dict[str, Any]
    seconds: float
    interrupted: bool
    parts: ValidationParts = field(repr=False)
    density: EnergyDensity | None = None
    no_density: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the candidate took the start's place."""
        return self.status == ACCEPTED

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON types; the history is a file of its own."""
        facts: dict[str, Any] = plain(
            {
                "schema": SCHEMA,
                "status": self.status,
                "reason": self.reason,
                "story": list(self.story),
                "acceptance": None if self.acceptance is None else self.acceptance.to_dict(),
                "settings": self.settings,
                "rows": self.parts.sizes(),
                "seconds": round(self.seconds, 3),
                "interrupted": self.interrupted,
                "has_candidate": self.candidate is not None,
                "density": None if self.density is None else self.density.to_dict(),
            }
        )
        return facts

    def save(self, folder: str | Path) -> Path:
        """Write the winner: weights, guard, history, facts, and a density where one is offered.

        ``weights.safetensors`` holds the weights of the plain model, and loads into the user's own,
        also inside DataParallel or ``torch.compile``:
        ``ebm_guard.model.loading.load_weights(model, "weights.safetensors")``.

        Args:
            folder: made where it is missing; other files in it stay.

        Raises:
            DataError: the place cannot be written.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        # Each under its own name and in its own memory: shared weights are written twice, and load.
        state = {
            name: value.detach().cpu().clone().contiguous()
            for name, value in unwrapped(self.model).state_dict().items()
            if isinstance(value, torch.Tensor)
        }
        with replace_file(folder / WEIGHTS_FILE) as new:
            save_file(state, new)
        self.guard.save(folder / GUARD_FILE)
        write_history(folder / HISTORY_FILE, self.history)
        if self.density is not None and self.density.offered:
            self.density.save(folder / DENSITY_FILE)
        else:
            # One of an earlier run into this folder would belong to other weights.
            (folder / DENSITY_FILE).unlink(missing_ok=True)
        with replace_file(folder / FACTS_FILE) as new:
            text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
            new.write_text(text + "\n", encoding="utf-8")
        return folder
