"""Samplers by name: what the command line and settings files give."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ebm_guard import registry
from ebm_guard.errors import InvalidInputError, suggest
from ebm_guard.sampling.sampler import Sampler

_PRESETS = {"sgld": ("short_run", "langevin")}


def make_sampler(sampler: str | Sampler = "sgld:short_run", **settings: Any) -> Sampler:
    """Build a sampler from its registered name, with a preset where it has some.

    Args:
        sampler: ``sgld:short_run`` (also ``sgld``), ``sgld:langevin``, ``mala``, ``hmc``; or a
            sampler, which is returned as it is.
        settings: of the preset or the class, such as ``num_steps``.

    Raises:
        InvalidInputError: no such sampler, preset or setting, or settings beside a sampler that is
            built already.

    Example:
        >>> make_sampler("sgld:langevin", step_size=0.02).settings()["temperature"]
        1.0
        >>> make_sampler("hmc", num_steps=3).num_steps
        3
    """
    if not isinstance(sampler, (str, Sampler)):
        raise InvalidInputError(
            f"got a {type(sampler).__name__} as sampler; needed a registered name, or an object "
            "made from Sampler"
        )
    if isinstance(sampler, Sampler):
        if settings:
            raise InvalidInputError(
                f"got a {type(sampler).__name__} and the settings {', '.join(settings)}; build "
                "the sampler with them, or give its name"
            )
        return sampler
    name, _, preset = sampler.partition(":")
    presets = _PRESETS.get(name, ())
    build: Callable[..., Sampler] = registry.get("sampler", name).load()
    if preset and preset not in presets:
        known = ", ".join(presets) if presets else "none"
        raise InvalidInputError(
            f"got preset {preset!r} of {name}; known: {known}{suggest(preset, presets)}"
        )
    if presets:
        build = getattr(build, preset or presets[0])
    parameters = inspect.signature(build).parameters
    if unknown := set(settings) - set(parameters):
        raise InvalidInputError(
            f"got {', '.join(sorted(unknown))} for {sampler}; its settings are "
            f"{', '.join(parameters)}"
        )
    missing = [
        each.name
        for each in parameters.values()
        if each.default is each.empty and each.name not in settings
    ]
    if missing:
        raise InvalidInputError(f"{sampler} needs {', '.join(missing)}")
    return build(**settings)
