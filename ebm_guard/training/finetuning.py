"""One call: fine-tune a copy, test the best of it on rows of its own, and return the winner."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ebm_guard.distributed import world_of
from ebm_guard.errors import InvalidInputError
from ebm_guard.gate import Guard
from ebm_guard.model import EnergyClassifier
from ebm_guard.training.augment import Augment
from ebm_guard.training.checkpoint import check_no_checkpoint
from ebm_guard.training.class_losses import ClassLoss
from ebm_guard.training.finishing import finish
from ebm_guard.training.history import Line
from ebm_guard.training.images import Images, TrainingImages, as_training_images
from ebm_guard.training.objectives import Objective
from ebm_guard.training.options import FineTuneOptions
from ebm_guard.training.order import shares
from ebm_guard.training.preparing import make_training_objective, prepare
from ebm_guard.training.regularisers import Regularisers
from ebm_guard.training.result import FinetuneResult
from ebm_guard.training.scope import frozen_random
from ebm_guard.training.sets import Sets, check_names
from ebm_guard.training.train_copy import train_copy
from ebm_guard.training.working_copy import classifier_of


def finetune(
    guard: Guard | EnergyClassifier | Callable[..., Any],
    train: Images,
    validation: Images,
    *,
    objective: str | Objective | Callable[..., Any] = "margin",
    objective_settings: Mapping[str, Any] | None = None,
    class_loss: str | ClassLoss = "nll",
    regularisers: Regularisers = (),
    unlabelled: Images | None = None,
    labelled_share: float = 0.5,
    updates: int = 200,
    epochs: float | None = None,
    batch_size: int = 64,
    learning_rate: float | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 1e-4,
    warm_up: float = 0.05,
    scope: str | None = None,
    augment: str | Augment | None = None,
    outliers: Images | None = None,
    outlier_share: float = 0.5,
    ood_validation: Images | Mapping[str, Images] | None = None,
    evaluate_every: int | None = None,
    selection_rows: int = 1000,
    outlier_rows: int = 250,
    max_acc_drop: float = 0.01,
    max_nll_rise: float = 0.02,
    max_ece_rise: float = 0.02,
    gradient_clip: float = 5.0,
    ema: float = 0.99,
    precision: str = "auto",
    seed: int = 0,
    attempts: int = 3,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    on_event: Callable[[Line], None] | None = None,
) -> FinetuneResult:
    """Improve the energy of a trained classifier, or give the start back.

    A deep copy is trained, in eval mode: batch-norm statistics stay fixed and dropout is off. The
    user's model is never changed. A quarter of the validation rows chooses the best state, half
    decides whether it may take the start's place, and a quarter fits the new guard. All sets have
    images of one shape, and no set may share images with another. Training images labelled -1,
    and those of ``unlabelled``, have no label: the class loss leaves them out, and every term on
    energies takes them in.

    Under ``torchrun`` each process trains on its share of every batch; call it in the same way on
    all of them. The objectives ``nce`` and ``fce`` run in one process; on features they
    train the head alone.

    Args:
        guard: a :class:`~ebm_guard.gate.Guard`, fitted or not, a classifier, or a model.
        train: labelled images: :class:`~ebm_guard.training.TrainingImages`, (pixels, labels), or a
            loader of the model's own inputs; a label of -1 means none.
        validation: labelled images that the model was not trained on.
        objective: a registered name, an objective, or a function ``(context, batch) -> loss``.
        objective_settings: of a named objective, such as ``{"weight": 0.5}``.
        class_loss: what every objective takes for its class term: a registered name, or
            ``make_class_loss(name, **settings)``; ``nll`` is the cross-entropy.
        regularisers: terms added to the objective's loss: names such as ``dsm`` and ``entropy``, or
            ``make_regulariser(name, **settings)``.
        unlabelled: more images of the same classes, without labels.
        labelled_share: of every batch, where some images have no label.
        updates: steps of the optimiser.
        epochs: passes over the images with a label, instead of ``updates``.
        batch_size: images of an update, over all processes.
        learning_rate: highest of the schedule; default: the objective's, for AdamW.
        optimizer: ``adamw`` or ``sgd`` (Nesterov momentum 0.9).
        weight_decay: of matrices and kernels.
        warm_up: share of the run over which the learning rate rises; then it falls as a cosine.
        scope: ``all``, ``last_block``, ``head`` or ``regex:PATTERN``; default: the objective's,
            mostly ``all``. Weights that you froze stay frozen in the first two; see
            :func:`ebm_guard.training.scope.set_scope`.
        augment: ``flip_crop`` or a function (pixels, generator) -> pixels, for the images of the
            class loss alone; default: none.
        outliers: images off the data to train on.
        outlier_share: their share of the negatives, in (0, 1]; the rest are those of the objective
            (synthetic ones for ``margin`` and ``dat``).
        ood_validation: OOD images, or several sets by name, to choose and to accept on; half of
            each set for either. At least 4 different images in each.
        evaluate_every: updates between evaluations; default: eight times a run.
        selection_rows: most rows that an evaluation looks at.
        outlier_rows: most outliers of each kind, in evaluations and in the acceptance test.
        max_acc_drop: largest loss of accuracy that is accepted, as a share.
        max_nll_rise: largest rise of the NLL after temperature that is accepted, in nats.
        max_ece_rise: largest rise of the ECE after temperature of a state that may be chosen.
        gradient_clip: largest norm of a gradient.
        ema: decay of the mean of the weights, which is what is evaluated and returned; 0: none.
        precision: ``float32``, ``bfloat16`` (by autocast) or ``auto``: bfloat16 on CUDA where the
            device has it.
        seed: of everything random.
        attempts: how often the run may go back to its last good state, with half the learning
            rate, before it gives up. It goes back when the safeguard ends an attempt, and when an
            attempt ends without a state that may be chosen.
        checkpoint: folder for ``checkpoint.pt`` and ``history.jsonl``; without ``resume`` it must
            hold no checkpoint.
        resume: go on from the checkpoint in that folder.
        progress: show a bar on stderr.
        on_event: called with each line of the history.

    Returns:
        The winner, its guard and the story.

    Raises:
        InvalidInputError: settings or images that cannot be used; fewer validation rows than any
            net could pass the acceptance test with.
        DataError: two sets share images; a checkpoint of another run, or one that is in the way.
        UnsupportedModelError: the model cannot be copied, its logits for an image depend on the
            others of the batch, or no gradient reaches its weights.
        ModelOutputError: the model's logits are not finite.

    Example:
        >>> from ebm_guard.data.demo import demo_classifier, load_demo
        >>> sets = [load_demo(role) for role in ("train", "calibration")]
        >>> train, validation = ((part.images, part.labels) for part in sets)
        >>> result = finetune(
        ...     demo_classifier(), train, validation, updates=4, max_acc_drop=0.05
        ... )
        >>> result.status in ("accepted", "start returned")
        True
    """
    started = time.perf_counter()
    classifier, given = classifier_of(guard)
    images = as_training_images(train, classifier, "train")
    if unlabelled is not None:
        images = images.joined(as_training_images(unlabelled, classifier, "unlabelled"))
    if epochs is not None:
        updates = _updates(epochs, images, batch_size, labelled_share)
    options = FineTuneOptions(
        updates=updates,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        weight_decay=weight_decay,
        warm_up=warm_up,
        scope=scope,
        augment=augment,
        class_loss=class_loss,
        labelled_share=labelled_share,
        outlier_share=outlier_share,
        evaluate_every=evaluate_every,
        selection_rows=selection_rows,
        outlier_rows=outlier_rows,
        max_acc_drop=max_acc_drop,
        max_nll_rise=max_nll_rise,
        max_ece_rise=max_ece_rise,
        gradient_clip=gradient_clip,
        ema=ema,
        precision=precision,
        seed=seed,
        attempts=attempts,
        objective_settings=dict(objective_settings or {}),
    )
    ood = ood_validation if isinstance(ood_validation, Mapping) else None
    if ood is None:
        ood = {} if ood_validation is None else {"ood_validation": ood_validation}
    check_names(ood)
    sets = Sets(
        train=images,
        validation=as_training_images(validation, classifier, "validation"),
        outliers=None if outliers is None else as_training_images(outliers, classifier, "outliers"),
        ood={name: as_training_images(part, classifier, name) for name, part in ood.items()},
    )
    folder = None if checkpoint is None else Path(checkpoint)
    if resume and folder is None:
        raise InvalidInputError("got resume=True without checkpoint=; needed its folder")
    if folder is not None and not resume:
        check_no_checkpoint(folder)
    with world_of(classifier.device) as world, frozen_random(classifier.device):
        prepared = prepare(
            classifier,
            given,
            sets,
            make_training_objective(objective, sets.outliers, options, regularisers),
            options,
            world,
        )
        trained = train_copy(prepared, folder, on_event, resume=resume, progress=progress)
        return finish(prepared, trained, time.perf_counter() - started)


def _updates(epochs: float, images: TrainingImages, batch_size: int, labelled_share: float) -> int:
    if not epochs > 0 or batch_size < 1:
        raise InvalidInputError(f"got epochs={epochs!r} and batch_size={batch_size!r}; both > 0")
    rows = len(images.labelled)
    each = batch_size if rows == len(images) else shares(batch_size, labelled_share)[0]
    return max(1, round(epochs * rows / each))
