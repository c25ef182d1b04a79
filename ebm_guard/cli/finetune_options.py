"""Options of a training run. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

import click

from ebm_guard.cli.options import Command, grouped
from ebm_guard.registry import methods

SCOPES = "all, last_block, head or regex:PATTERN"


@dataclass(frozen=True)
class TrainingChoices:
    """What the command line says about training."""

    objective: str
    objective_setting: tuple[str, ...]
    class_loss: str
    regulariser: tuple[str, ...]
    labelled_share: float
    updates: int | None
    epochs: float | None
    learning_rate: float | None
    train_batch_size: int
    optimizer: str
    weight_decay: float
    scope: str | None
    augment: str
    evaluate_every: int | None
    max_acc_drop: float
    max_nll_rise: float
    max_ece_rise: float
    outlier_share: float
    selection_rows: int
    outlier_rows: int
    warm_up: float
    gradient_clip: float
    ema: float
    attempts: int
    precision: str
    resume: bool


# Choices that `ebm_guard.finetune` takes under the same name.
PASSED = (
    "epochs",
    "labelled_share",
    "learning_rate",
    "optimizer",
    "weight_decay",
    "scope",
    "evaluate_every",
    "max_acc_drop",
    "max_nll_rise",
    "max_ece_rise",
    "outlier_share",
    "selection_rows",
    "outlier_rows",
    "warm_up",
    "gradient_clip",
    "ema",
    "attempts",
    "precision",
    "resume",
)


_TRAINING_OPTIONS = (
    click.option(
        "--objective",
        default="margin",
        show_default=True,
        metavar="NAME|FILE.py:CALL",
        help=f"{', '.join(row.name for row in methods('objective'))}, or a function (context, "
        "batch) -> loss of your own.",
    ),
    click.option(
        "--objective-setting",
        multiple=True,
        metavar="NAME=VALUE",
        help="Of the objective, such as weight=0.5. Repeatable.",
    ),
    click.option(
        "--class-loss",
        default="nll",
        show_default=True,
        metavar="NAME[,SETTING=VALUE...]",
        help=f"Class term of every objective, such as hinge,m=2: "
        f"{', '.join(row.name for row in methods('class_loss'))}.",
    ),
    click.option(
        "--regulariser",
        multiple=True,
        metavar="NAME[,SETTING=VALUE...]",
        help="Added to the objective, such as dsm,weight=0.01: "
        f"{', '.join(row.name for row in methods('regulariser'))}. Repeatable.",
    ),
    click.option(
        "--labelled-share",
        type=click.FloatRange(min=0, max=1, min_open=True),
        default=0.5,
        show_default=True,
        help="Of every batch, where some training images have no label.",
    ),
    click.option(
        "--updates", type=click.IntRange(min=1), help="Steps of the optimiser; default: 200."
    ),
    click.option(
        "--epochs",
        type=click.FloatRange(min=0, min_open=True),
        help="Passes over the images with a label, instead of --updates.",
    ),
    click.option(
        "--lr",
        "learning_rate",
        type=click.FloatRange(min=0, min_open=True),
        help="Highest learning rate; default: the objective's.",
    ),
    click.option(
        "--train-batch-size",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        help="Images of an update, over all processes.",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["adamw", "sgd"]),
        default="adamw",
        show_default=True,
        help="sgd has Nesterov momentum 0.9.",
    ),
    click.option(
        "--weight-decay",
        type=click.FloatRange(min=0),
        default=1e-4,
        show_default=True,
        help="Of matrices and kernels.",
    ),
    click.option(
        "--scope",
        metavar="SCOPE",
        help=f"What moves: {SCOPES}; default: the objective's, mostly all.",
    ),
    click.option(
        "--augment",
        default="none",
        show_default=True,
        metavar="none|flip_crop|FILE.py:CALL",
        help="Of the images of the class loss alone.",
    ),
    click.option(
        "--evaluate-every",
        type=click.IntRange(min=1),
        help="Updates between evaluations; default: eight times a run.",
    ),
    click.option(
        "--max-acc-drop",
        type=click.FloatRange(min=0, max=1, min_open=True),
        default=0.01,
        show_default=True,
        help="Largest loss of accuracy that is accepted, as a share.",
    ),
    click.option(
        "--max-nll-rise",
        type=click.FloatRange(min=0, min_open=True),
        default=0.02,
        show_default=True,
        help="Largest rise of the NLL after temperature that is accepted, in nats.",
    ),
    click.option(
        "--max-ece-rise",
        type=click.FloatRange(min=0, min_open=True),
        default=0.02,
        show_default=True,
        help="Largest rise of the ECE after temperature of a state that may be chosen.",
    ),
    click.option(
        "--outlier-share",
        type=click.FloatRange(min=0, max=1, min_open=True),
        default=0.5,
        show_default=True,
        help="Share of the negatives that --outliers make up.",
    ),
    click.option(
        "--selection-rows",
        type=click.IntRange(min=2),
        default=1000,
        show_default=True,
        help="Most rows that an evaluation looks at.",
    ),
    click.option(
        "--outlier-rows",
        type=click.IntRange(min=2),
        default=250,
        show_default=True,
        help="Most outliers of each kind, in evaluations and in the acceptance test.",
    ),
    click.option(
        "--warm-up",
        type=click.FloatRange(min=0, max=1),
        default=0.05,
        show_default=True,
        help="Share of the run over which the learning rate rises.",
    ),
    click.option(
        "--gradient-clip",
        type=click.FloatRange(min=0, min_open=True),
        default=5.0,
        show_default=True,
        help="Largest norm of a gradient.",
    ),
    click.option(
        "--ema",
        type=click.FloatRange(min=0, max=1, max_open=True),
        default=0.99,
        show_default=True,
        help="Decay of the mean of the weights that is evaluated and returned; 0: none.",
    ),
    click.option(
        "--attempts",
        type=click.IntRange(min=0),
        default=3,
        show_default=True,
        help="How often the run may go back to its last good state.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="auto: bfloat16 on CUDA where the device has it.",
    ),
    click.option("--resume", is_flag=True, help="Go on with a run that was interrupted."),
)


def training_options(command: Command) -> Command:
    """Add the options of :class:`TrainingChoices`; the command gets them as ``training``."""
    return grouped(command, "training", TrainingChoices, _TRAINING_OPTIONS)
