"""From what was prepared to a run of the loop, fresh or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebm_guard import energy as formulas
from ebm_guard.distributed import World
from ebm_guard.errors import DataError
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.isolation import pixel_forward
from ebm_guard.model.wrappers import unwrapped
from ebm_guard.training.checkpoint import load_checkpoint
from ebm_guard.training.class_losses import make_class_loss
from ebm_guard.training.context import Context, Measured, PixelNet, TrainingBatch
from ebm_guard.training.density.first_rows import first_batch
from ebm_guard.training.density.measuring import contrastive_objective
from ebm_guard.training.history import History, Line
from ebm_guard.training.loop import Loop
from ebm_guard.training.preparing import Prepared
from ebm_guard.training.scope import set_scope
from ebm_guard.training.selection import Evaluation
from ebm_guard.training.setup import FreshForward, Outcome, Setup

# Training images whose energies the margins are set from.
_MEASURED = 512
# Plain gradient descent needs larger steps than AdamW.
_SGD_FACTOR = 10


@dataclass(frozen=True)
class Trained:
    """What a run of the loop left.

    Args:
        outcome: its best state.
        history: its lines.
        settings: of the run, as JSON types.
    """

    outcome: Outcome
    history: History
    settings: dict[str, Any]


def train_copy(
    of: Prepared,
    folder: Path | None,
    on_event: Callable[[Line], None] | None,
    *,
    resume: bool,
    progress: bool,
) -> Trained:
    """Train the working copy.

    Args:
        of: what the run starts from.
        folder: for checkpoint and history, or None.
        on_event: called with each line of the history.
        resume: go on from the checkpoint in ``folder``.
        progress: show a bar.
    """
    options, world, objective = of.options, of.world, of.objective
    net = PixelNet(of.copied, _autocast(options.precision, world.device))
    scope = options.scope or objective.default_scope
    trained = set_scope(net, of.copied, scope, of.probe.to(world.device))
    highest = options.learning_rate or objective.default_learning_rate * (
        _SGD_FACTOR if options.optimizer == "sgd" else 1
    )
    settings = _settings(of, highest, len(trained))
    state = _stored(folder, settings, world) if resume and folder is not None else None
    forward = FreshForward(of.copied, of.probe, options.precision)
    first = _first_batch(of)
    context = Context(
        net=net,
        forward=forward,
        num_classes=of.num_classes,
        measured=_measured(of.copied, first) if state is None else Measured(**state["measured"]),
        updates=options.updates,
        seed=options.seed,
        rank=world.rank,
        world=world.size,
        device=world.device,
        class_loss=make_class_loss(options.class_loss),
        classifier=of.copied,
    )
    if state is None:
        _begin(of, context, first)
    else:
        objective.load_state_dict(state["objective"])
    lines = () if state is None else state["history"]
    history = History(folder if world.first else None, on_event if world.first else None, lines)
    setup = Setup(
        options=options,
        world=world,
        classifier=of.copied,
        net=net,
        images=of.sets.train,
        objective=objective,
        context=context,
        panel=of.selection,
        start=of.on_selection,
        history=history,
        highest=highest,
        settings=settings,
        folder=folder,
        progress=progress and world.first,
    )
    loop = Loop(setup, forward)
    if state is None:
        evaluation = Evaluation.of(of.on_selection).to_dict()
        history.add("evaluation", 0, **evaluation, eligible=False, best=False)
        cautions = [context.class_loss.caution] if context.class_loss.caution else []
        for note in (*of.notes, *cautions, *_frozen(net, of.classifier, scope)):
            history.add("event", 0, text=note)
    else:
        loop.load(state)
        history.add("event", int(state["now"]["update"]), text="resumed")
    return Trained(loop.run(), history, settings | {"objective": objective.settings()})


def _begin(of: Prepared, context: Context, first: TrainingBatch) -> None:
    """Let the objective begin; one that learns a density gets rows to fit known ones on."""
    if contrastive_objective(of.objective) is None:
        of.objective.begin(context, first)
        return
    rows = first_batch(first, of.sets.train, of.num_classes, of.options.seed)
    of.objective.begin(context, rows)
    # The head may be another one now, and its energies with it.
    context.measured = _measured(of.copied, first)


def _stored(folder: Path, settings: dict[str, Any], world: World) -> dict[str, Any]:
    """Read this process's checkpoint, and see that all processes stopped at the same update."""
    state = load_checkpoint(folder, settings, world.rank)
    at = [float(state["now"]["update"]), float(state["attempt"])]
    if world.any(world.from_first(at) != at):
        raise DataError(
            f"the checkpoints of the {world.size} processes in {folder} are not of one update: one "
            "of them was stopped while it wrote. Start without resume"
        )
    return state


def _settings(of: Prepared, highest: float, trained: int) -> dict[str, Any]:
    """Return the settings that a checkpoint must agree with, as they were given.

    Nothing measured is among them: the same objective object may take part in several runs.
    """
    roles = of.selection.roles
    return of.options.to_dict() | {
        "objective": of.objective.identity(),
        "learning_rate": highest,
        "scope": of.options.scope or of.objective.default_scope,
        "evaluate_every": of.options.interval,
        "trained_weights": trained,
        "processes": of.world.size,
        "device": of.world.device.type,
        "model": of.classifier.name,
        "weights": of.classifier.weights_hash(),
        "data": of.sets.facts(),
        "negative_kinds": list(of.objective.negative_kinds),
        "guard_kinds": [name for name, role in roles.items() if role == "guard"],
    }


def _frozen(net: PixelNet, classifier: EnergyClassifier, scope: str) -> list[str]:
    """Say what becomes of weights that the user froze."""
    given = unwrapped(classifier.model).named_parameters()
    now = dict(net.model.named_parameters())
    frozen = [name for name, part in given if not part.requires_grad]
    moved = sum(now[name].requires_grad for name in frozen)
    if not frozen:
        return []
    return [
        f"{len(frozen):,} weights of the model are frozen (requires_grad=False): "
        + (f"scope {scope!r} trains {moved:,} of them" if moved else "they stay as they are")
    ]


def _first_batch(of: Prepared) -> TrainingBatch:
    """Return the rows that energies are measured on, the same on every process."""
    images, device = of.sets.train, of.world.device
    order = np.random.default_rng([of.options.seed, 53]).permutation(len(images))
    rows = order[:_MEASURED].astype(np.int64)
    labels = images.require_labels(of.num_classes, "train", some=True)
    pixels = images.pixels(rows).to(device)
    chosen = torch.from_numpy(rows)
    return TrainingBatch(pixels, labels[chosen].to(device), pixels, chosen)


def _measured(classifier: EnergyClassifier, batch: TrainingBatch) -> Measured:
    forward = pixel_forward(classifier)
    with torch.no_grad():
        parts = [formulas.energy(forward(part).logits) for part in torch.split(batch.pixels, 128)]
    return Measured.of(torch.cat(parts))


def _autocast(precision: str, device: torch.device) -> torch.dtype | None:
    if precision == "bfloat16":
        return torch.bfloat16
    on_gpu = precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_gpu else None
