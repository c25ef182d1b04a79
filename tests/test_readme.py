"""Every code block of the README runs; the install commands are those that CI runs."""

from __future__ import annotations

import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from ebm_guard.cli import run

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One working folder: later blocks use what earlier ones wrote, as a reader would."""
    return tmp_path_factory.mktemp("readme")


def test_there_are_blocks_of_both_kinds():
    assert {kind for kind, _ in BLOCKS} == {"python", "bash"}
    assert len(BLOCKS) >= 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "text"), BLOCKS, ids=[f"{kind}{i}" for i, (kind, _) in enumerate(BLOCKS)]
)
def test_block(kind, text, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if kind == "bash":
        for line in filter(None, text.splitlines()):
            run_line(line)
        return
    import timm

    create = timm.create_model

    def tiny(name, *, pretrained):
        # Published weights need the network; timm's own tiny architecture stands in for them.
        assert name
        assert pretrained
        return create("test_resnet", num_classes=10)

    monkeypatch.setattr(timm, "create_model", tiny)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 64, 64, generator=generator)
    labels = torch.randint(0, 10, (64,), generator=generator)
    names = {"validation_loader": [(images, labels)], "images": images[:4]}
    with pytest.warns() if "validation_loader" in text else nullcontext():
        exec(compile(text, "README.md", "exec"), names)
    if "decision = " in text:
        decision = names["decision"]
        assert len(decision) == 4
        assert decision.accept.dtype == torch.bool


def run_line(line):
    install, _, command = line.rpartition("&&")
    if install:
        in_ci = (ROOT / ".ci" / "run").read_text()
        assert 'pip install --quiet ".[dev]"' in in_ci
        assert install.strip() in ("pip install .", 'pip install ".[test]"')
    if command.strip() == "pytest":
        return
    program, *arguments = shlex.split(command)
    assert program == "ebm-guard"
    assert run(arguments) == 0, command
