"""The public page: names, signatures, docstrings and examples.

After a wanted change: EBM_GUARD_REGENERATE=1 pytest tests/test_public_api.py
"""

import doctest
import importlib
import inspect
import json
import os
import pkgutil
from pathlib import Path

import pytest

import ebm_guard

GOLDEN = Path(__file__).parent / "fixtures" / "public_api.json"
ROOMS = ("model", "data", "predictions", "calibration", "ood", "gate", "report")
# The command line needs no examples of its own: the README's commands are executed elsewhere.
WALKED = sorted(
    info.name
    for info in pkgutil.walk_packages(ebm_guard.__path__, "ebm_guard.")
    if not info.name.startswith(("ebm_guard.cli", "ebm_guard.__main__"))
)


def signature(function):
    """Parameters as text: the same on every version of Python."""
    parts = []
    for item in inspect.signature(function).parameters.values():
        text = {
            item.VAR_POSITIONAL: f"*{item.name}",
            item.VAR_KEYWORD: f"**{item.name}",
        }.get(item.kind, item.name)
        if item.kind is item.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        if item.default is not item.empty:
            text += f"={item.default!r}" if "0x" not in repr(item.default) else "=..."
        parts.append(text)
    return f"({', '.join(parts)})"


def described(value):
    if inspect.isclass(value):
        members = {}
        for name, member in inspect.getmembers(value):
            if name.startswith("_") or not defined_here(value, name):
                continue
            if isinstance(member, property) or not callable(member):
                members[name] = "attribute"
            else:
                members[name] = signature(member)
        return {"init": signature(value), "members": members}
    return signature(value) if callable(value) else repr(value)


def defined_here(owner, name):
    """Whether a member is the package's own, and not from nn.Module or Exception."""
    home = next(base for base in owner.__mro__ if name in vars(base))
    return home.__module__.startswith("ebm_guard")


def public():
    found = {}
    for home in ("ebm_guard", *(f"ebm_guard.{room}" for room in ROOMS)):
        module = importlib.import_module(home)
        for name in module.__all__:
            found[f"{home}.{name}"] = getattr(module, name)
    return found


def test_signatures_are_those_of_the_golden_file():
    now = {name: described(value) for name, value in public().items()}
    text = json.dumps(now, indent=1, sort_keys=True) + "\n"
    if os.environ.get("EBM_GUARD_REGENERATE"):
        GOLDEN.write_text(text)
    assert json.loads(text) == json.loads(GOLDEN.read_text())


def test_all_is_what_resolves():
    assert len(set(ebm_guard.__all__)) == len(ebm_guard.__all__)
    assert set(ebm_guard.__all__) == set(ebm_guard._HOMES)
    for name in ebm_guard.__all__:
        value = getattr(ebm_guard, name)
        home = importlib.import_module(ebm_guard._HOMES[name])
        assert value is getattr(home, name)
        assert name in home.__all__


def test_dir_lists_the_public_names():
    assert dir(ebm_guard) == sorted([*ebm_guard.__all__, "__version__"])


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert ebm_guard.__version__ == version("ebm-guard")


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"'ebm_guard' has no attribute 'Gaurd'"):
        _ = ebm_guard.Gaurd


def test_star_import_gives_all():
    space = {}
    exec("from ebm_guard import *", space)
    assert set(ebm_guard.__all__) <= set(space)


@pytest.mark.parametrize("name", WALKED)
def test_module_and_all_its_public_parts_are_documented(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    missing = []
    for part, value in vars(module).items():
        own = getattr(value, "__module__", None) == name
        if part.startswith("_") or not own or not (inspect.isclass(value) or callable(value)):
            continue
        if not (inspect.getdoc(value) or "").strip():
            missing.append(part)
        # What dataclasses write by themselves says nothing.
        if inspect.isclass(value) and (value.__doc__ or "").startswith(f"{part}("):
            missing.append(part)
        if inspect.isclass(value):
            for method, function in vars(value).items():
                plain = inspect.unwrap(getattr(function, "__func__", function))
                if method.startswith("_") or not inspect.isfunction(plain):
                    continue
                if not (inspect.getdoc(getattr(value, method)) or "").strip():
                    missing.append(f"{part}.{method}")
    assert missing == []


@pytest.mark.parametrize("name", ["ebm_guard", *WALKED])
# Examples may warn: a doctest is a reader's session, not a strict one.
@pytest.mark.filterwarnings("ignore::ebm_guard.errors.EbmGuardWarning")
def test_examples_run(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_examples_exist():
    finder = doctest.DocTestFinder()
    count = sum(
        len(test.examples) for name in WALKED for test in finder.find(importlib.import_module(name))
    )
    assert count >= 50
