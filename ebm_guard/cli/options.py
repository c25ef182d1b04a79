"""Options that several commands share, in timm's words. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click

from ebm_guard.registry import methods

Command = Callable[..., Any]
SPEC_HELP = (
    "[folder:]PATH, list:FILE, npz:FILE[#split][SLICE][?classes=0-7], logits:FILE, "
    "predictions:DIR, demo:[ROLE], or a timm reader: torch/NAME, hfds/NAME, hfids/NAME, wds/ "
    "(with [#split])"
)


@dataclass(frozen=True)
class ModelOptions:
    """What the command line says about the model and how to run it."""

    model: str | None
    checkpoint: str | None
    pretrained: bool
    num_classes: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    img_size: int | None
    batch_size: int
    workers: int
    device: str | None
    amp: bool
    channels_last: bool
    seed: int
    strict: bool
    limit: int | None
    quiet: bool
    data_dir: str | None = None
    split: str | None = None
    class_map: str | None = None


@dataclass(frozen=True)
class CheckOptions:
    """What must hold, and where CI finds the verdict."""

    require: tuple[str, ...]
    require_file: str | None
    baseline: str | None
    max_regression: tuple[str, ...]
    allow_unclear: bool
    junit: str | None
    model_card: str | None


class Numbers(click.ParamType[tuple[float, ...]]):
    """Comma-separated numbers."""

    name = "NUMBERS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Parse ``0.5,0.5,0.5``."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"got {value!r}; needed numbers such as 0.485,0.456,0.406", param, ctx)


_MODEL_OPTIONS = (
    click.option(
        "-m",
        "--model",
        metavar="NAME|MODULE:FACTORY",
        help="timm name, module:factory or file.py:factory; not needed with demo:, logits:, "
        "predictions:.",
    ),
    click.option(
        "--checkpoint",
        metavar="FILE",
        help="Weights: .safetensors, or a torch file (read with weights_only=True).",
    ),
    click.option("--pretrained", is_flag=True, help="Let timm load its published weights."),
    click.option("--num-classes", type=int, help="Classes of a timm model."),
    click.option(
        "--mean",
        type=Numbers(),
        help="Per channel, in [0, 1] units; default: the model's pretrained_cfg.",
    ),
    click.option("--std", type=Numbers(), help="Per channel, in [0, 1] units."),
    click.option(
        "--img-size", type=int, help="Input side in pixels; default: the model's pretrained_cfg."
    ),
    click.option(
        "--data-dir",
        metavar="ROOT",
        help="Root folder of timm's readers (torch/, hfds/, hfids/, wds/).",
    ),
    click.option(
        "--split",
        metavar="NAME",
        help="Split of timm's readers where the spec has no #split; default: validation.",
    ),
    click.option(
        "--class-map",
        metavar="FILE",
        help="Numbers the class folders: one name a line, or `name number` lines.",
    ),
    click.option(
        "-b",
        "--batch-size",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="Images per forward pass.",
    ),
    click.option(
        "-j",
        "--workers",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Processes that decode images; 0 decodes in this one, as streams always do.",
    ),
    click.option(
        "--device", help="Where the model runs, such as cpu or cuda; default: where it is."
    ),
    click.option(
        "--amp", is_flag=True, help="Run the model under autocast; scores stay in float32."
    ),
    click.option("--channels-last", is_flag=True, help="Use the channels_last memory layout."),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Of folds, bootstraps and --limit."
    ),
    click.option(
        "--strict", is_flag=True, help="Fail on the first unreadable image instead of skipping it."
    ),
    click.option(
        "--limit",
        type=click.IntRange(min=2),
        help="Use N random rows of each set; the report says so.",
    ),
    click.option("-q", "--quiet", is_flag=True, help="No progress bars."),
)
# A combination of scores is made in Python: it needs a list of them.
_SCORES = [
    row.name
    for family in ("score", "feature_score")
    for row in methods(family)
    if row.name != "combine"
]
_SCORE_OPTION = click.option(
    "--score",
    type=click.Choice(_SCORES),
    default="energy",
    show_default=True,
    help="The gate's score.",
)
_SCORE_OR_AUTO_OPTION = click.option(
    "--score",
    type=click.Choice([*_SCORES, "auto"]),
    default="energy",
    show_default=True,
    help="The gate's score; auto takes the best on outliers made from --data itself.",
)
_GATE_OPTIONS = (
    click.option(
        "--threshold",
        type=click.Choice([row.name for row in methods("threshold")]),
        default="pac",
        show_default=True,
        help="How the cut is chosen.",
    ),
    click.option(
        "--false-reject-rate",
        type=float,
        default=0.05,
        show_default=True,
        help="Target for the share of familiar inputs refused.",
    ),
    click.option(
        "--assurance",
        type=float,
        default=0.95,
        show_default=True,
        help="Probability that the target is met (pac).",
    ),
)


_CHECK_OPTIONS = (
    click.option(
        "--require",
        multiple=True,
        metavar="BOUND",
        help="Such as 'ece<=0.05', 'auroc>=0.9@lower', 'gate.coverage>=0.94'; @upper, @lower or "
        "@value compares that one number, not the interval. Repeatable.",
    ),
    click.option(
        "--require-file",
        metavar="FILE.toml",
        help="More bounds: the tables [requirements] and [max-regression].",
    ),
    click.option(
        "--baseline",
        metavar="REPORT.json",
        help="An older report (with its rows.npz) to compare with, row by row.",
    ),
    click.option(
        "--max-regression",
        multiple=True,
        metavar="METRIC=AMOUNT",
        help="How much worse than --baseline is too much, such as 'ece=0.005'. Repeatable.",
    ),
    click.option("--allow-unclear", is_flag=True, help="Let bounds inside an interval pass."),
    click.option("--junit", metavar="FILE", help="Write the requirements as JUnit XML."),
    click.option(
        "--model-card",
        metavar="FILE",
        help="Write a Hugging Face model card; a file that is not ours is never overwritten.",
    ),
)


def model_options(command: Command) -> Command:
    """Add the options of :class:`ModelOptions`; the command gets them as ``options``."""
    return grouped(command, "options", ModelOptions, _MODEL_OPTIONS)


def check_options(command: Command) -> Command:
    """Add the options of :class:`CheckOptions`; the command gets them as ``checks``."""
    return grouped(command, "checks", CheckOptions, _CHECK_OPTIONS)


def gate_options(command: Command) -> Command:
    """Add score, threshold, false reject rate and assurance."""
    return _with(command, (_SCORE_OPTION, *_GATE_OPTIONS))


def fit_gate_options(command: Command) -> Command:
    """Add what a gate is fitted with: as :func:`gate_options`, and ``--score auto``."""
    return _with(command, (_SCORE_OR_AUTO_OPTION, *_GATE_OPTIONS))


def calibrator_option(command: Command) -> Command:
    """Add ``--calibrator``."""
    names = [row.name for row in methods("calibrator")]
    return click.option(
        "--calibrator",
        type=click.Choice(names),
        default="temperature",
        show_default=True,
        help="What turns logits into honest confidence; auto chooses by cross-validated NLL.",
    )(command)


def json_option(command: Command) -> Command:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(command)


def grouped(
    command: Command,
    name: str,
    record: type[Any],
    options: tuple[Callable[[Command], Command], ...],
) -> Command:
    """Add options that the command gets as one record of this name."""

    def wrapped(**values: Any) -> Any:
        own = {item.name: values.pop(item.name) for item in fields(record)}
        return command(**{name: record(**own)}, **values)

    wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
    wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
    return _with(wrapped, options)


def _with(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
