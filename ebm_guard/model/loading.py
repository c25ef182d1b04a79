"""Make a model from what a command line can say: a timm name, or a factory in a module or file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from ebm_guard.errors import (
    DataError,
    InvalidInputError,
    UnsupportedModelError,
    first_line,
    suggest,
)
from ebm_guard.files import expanded
from ebm_guard.model.wrappers import unwrapped

_TIMM_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
_WRAPPERS = ("module.", "_orig_mod.")
_NESTED = ("state_dict", "model_state_dict", "model", "net")


def load_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
) -> nn.Module:
    """Make a model in eval mode.

    Args:
        name: ``module:factory``, ``file.py:factory`` (called without arguments), or a timm name,
            also ``hf-hub:...`` and ``local-dir:...``.
        checkpoint: ``.safetensors``, or a ``torch.save`` file read with ``weights_only=True``;
            loaded strictly.
        pretrained: let timm load its published weights (needs the network, or timm's cache).
        num_classes: classes of a timm model.

    Raises:
        InvalidInputError: no such module, factory or timm model.
        UnsupportedModelError: the factory does not return an ``nn.Module``.
        DataError: the checkpoint is missing, unreadable, or does not fit.

    Example:
        >>> load_model("ebm_guard.data.demo:demo_classifier").training
        False
    """
    if ":" in name and not name.startswith(_TIMM_PREFIXES):
        if pretrained or num_classes is not None:
            raise InvalidInputError(
                f"got --pretrained or --num-classes with the factory {name!r}; they are for timm "
                "names, a factory decides for itself"
            )
        model = _from_factory(name)
    else:
        model = _from_timm(name, pretrained=pretrained, num_classes=num_classes)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model.eval()


def load_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """Load weights strictly; wrappers such as ``module.`` and ``{"state_dict": ...}`` are undone.

    So are those around the model: DataParallel, DistributedDataParallel and ``torch.compile``.

    Raises:
        DataError: missing, unreadable, or keys and shapes that do not fit.
    """
    path = expanded(checkpoint)
    if not path.is_file():
        raise DataError(f"got checkpoint {path}, which is not a file")
    state = _read_state(path)
    target = unwrapped(model)
    known = target.state_dict().keys()
    # A model's own part may be called `module`: names that fit are left alone.
    while state and state.keys() != known:
        prefix = next((p for p in _WRAPPERS if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    try:
        target.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise DataError(
            f"{path.name} does not fit this {type(model).__name__}: "
            f"{' '.join(line.strip() for line in lines[1:4])[:400]}"
        ) from None


def _read_state(path: Path) -> dict[str, Any]:
    from pickle import UnpicklingError

    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"cannot read checkpoint {path}: {error}") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"cannot read checkpoint {path}: {first_line(error)}. Only tensors are loaded "
            "(weights_only=True), never pickled objects: save model.state_dict() as .safetensors"
        ) from None
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise DataError(f"checkpoint {path} holds a {type(loaded).__name__}; needed a state dict")
    if not all(isinstance(key, str) for key in loaded):
        raise DataError(f"checkpoint {path} is not a state dict: its keys are not all names")
    return dict(loaded)


def import_callable(name: str, what: str = "model") -> Callable[..., Any]:
    """Import ``module:attribute`` or ``file.py:attribute``.

    Args:
        name: where it lies; modules of the working folder are found.
        what: word for messages.

    Raises:
        InvalidInputError: no such module, file or callable.

    Example:
        >>> import_callable("math:sqrt")(4)
        2.0
    """
    place, _, attribute = name.rpartition(":")
    module = _import_file(place) if place.endswith(".py") else _import_module(name, place)
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [key for key in vars(module) if not key.startswith("_")]
        raise InvalidInputError(
            f"got {what} {name!r}; {place} has no callable {attribute!r}{suggest(attribute, known)}"
        )
    return cast("Callable[..., Any]", found)


def _from_factory(name: str) -> nn.Module:
    factory = import_callable(name)
    try:
        model = factory()
    except TypeError as error:
        raise InvalidInputError(
            f"got model {name!r}; calling {name.rpartition(':')[2]}() failed: {error}. A factory "
            "is called without arguments and returns the model"
        ) from error
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"got model {name!r}, which returned a {type(model).__name__}; needed an nn.Module"
        )
    return model


def _import_module(name: str, place: str) -> ModuleType:
    # Like `python -m`, so that a factory in the working folder is found.
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise InvalidInputError(
            f"got model {name!r}; cannot import {error.name!r}. Needed module:factory, "
            "file.py:factory, or a timm model name"
        ) from None
    finally:
        sys.path.pop(0)


def _import_file(place: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        near = suggest(path.name, (item.name for item in path.parent.glob("*.py")))
        raise InvalidInputError(f"got model file {place!r}, which does not exist{near}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InvalidInputError(f"got model file {place!r}, which Python cannot import")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles of the file's classes look the module up by name.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _from_timm(name: str, *, pretrained: bool, num_classes: int | None) -> nn.Module:
    timm = import_timm()
    options = {} if num_classes is None else {"num_classes": num_classes}
    known = name.startswith(_TIMM_PREFIXES) or timm.is_model(name.partition(".")[0])
    if not known:
        near = suggest(name, timm.list_models())
        raise InvalidInputError(
            f"got model {name!r}, which timm does not know{near}. Needed a timm name, "
            "module:factory or file.py:factory"
        )
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except (RuntimeError, OSError, ValueError) as error:
        raise InvalidInputError(
            f"timm cannot create {name!r}: {first_line(error)}. Without a network leave "
            "out --pretrained and give the weights with --checkpoint"
        ) from error
    return model


def import_timm() -> ModuleType:
    """Import timm.

    Raises:
        InvalidInputError: it is missing, or fails on a torchvision that does not fit torch.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise InvalidInputError(f"timm cannot be imported: {error}; pip install timm") from None
    except RuntimeError as error:
        raise InvalidInputError(
            f"timm cannot be imported, because torchvision does not fit this torch: {error}. "
            "Install both from the same index, such as pip install --force-reinstall torch "
            "torchvision; models from a factory (module:factory) work without timm"
        ) from None
