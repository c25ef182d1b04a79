"""The model options of a command that reads no data: the model and how it is run. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from ebm_guard.cli.options import Command, ModelOptions, model_options

_NAMES = (
    "model",
    "checkpoint",
    "pretrained",
    "num_classes",
    "device",
    "amp",
    "channels_last",
)
# What reading data would need; these options are not offered.
_REST: dict[str, Any] = {
    "mean": None,
    "std": None,
    "img_size": None,
    "batch_size": 1,
    "workers": 0,
    "seed": 0,
    "strict": False,
    "limit": None,
    "quiet": True,
    "data_dir": None,
    "split": None,
    "class_map": None,
}


def live_model_options(command: Command) -> Command:
    """Add the options that say which model runs and where; the command gets ``options``.

    Preprocessing is not among them: the artefact holds it.
    """

    def wrapped(**values: Any) -> Any:
        own = {name: values.pop(name) for name in _NAMES}
        return command(options=ModelOptions(**own, **_REST), **values)

    wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
    wrapped.__click_params__ = [  # type: ignore[attr-defined]
        *getattr(command, "__click_params__", []),
        *_params(),
    ]
    return wrapped


def _params() -> list[click.Parameter]:
    def bare() -> None:
        """Carry the options."""

    all_of_them: Callable[..., Any] = model_options(bare)
    found = {param.name: param for param in getattr(all_of_them, "__click_params__", [])}
    # Click keeps the parameters of a decorated function from the last to the first.
    return [found[name] for name in reversed(_NAMES)]


if set(_NAMES) | set(_REST) != {item.name for item in fields(ModelOptions)}:
    raise TypeError("live_options and ModelOptions name different options")
