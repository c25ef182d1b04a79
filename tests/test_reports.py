"""The committed reports: valid, up to date with their views, and fit to be published."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from ebm_guard.report.render import render_markdown
from ebm_guard.report.rows import ReportRows

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "reports").rglob("report.json"))
SCHEMA = json.loads((ROOT / "ebm_guard" / "report" / "schema.json").read_text(encoding="utf-8"))


def name_of(folder):
    return str(folder.relative_to(ROOT / "reports"))


def test_there_are_reports():
    assert {name_of(folder) for folder in FOLDERS} >= {
        "cifar10_resnet20",
        "imagenet_efficientnet_lite0",
        "mnist0to7_densenet/energy_ft",
        "mnist0to7_densenet/pretrained",
        "mnist_convnet/baseline",
        "mnist_convnet/tune",
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_report(folder):
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, SCHEMA)
    assert render_markdown(report) == (folder / "report.md").read_text(encoding="utf-8")
    for view in ("report.html", "rows.npz", "figures/reliability.png", "figures/roc.svg"):
        assert (folder / view).stat().st_size > 0
    assert not report["gallery"]["images"], "these data sets have no free licence"
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "data:image/png" not in text
    assert not re.search(r"(?<![\w$.])/(home|root|tmp|work|mnt|Users)/", text)
    rows = ReportRows.read(folder / "rows.npz")
    assert len(rows.labels) == report["data"]["evaluation"]["n"]
    script = next(
        path / "command.sh" for path in (folder, folder.parent) if (path / "command.sh").exists()
    )
    assert report["meta"]["title"].split(":")[0] in script.read_text(encoding="utf-8")


def test_lite0_says_what_is_special_about_it():
    folder = ROOT / "reports" / "imagenet_efficientnet_lite0"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "underconfident" in text
    assert report["energy"]["ranking"]["energy_rank"] == 4
    assert "is better by" in text
    assert "| vim | not run: 1 image per class" in text


def test_the_index_names_every_report():
    index = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    for folder in FOLDERS:
        assert f"[{name_of(folder)}]" in index
